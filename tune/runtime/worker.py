"""Training one configuration in a Ray worker."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from ray._raylet import setproctitle  # type: ignore[attr-defined]  # its stubs are not complete
from ray.tune import get_context, report

from carmodels.models.classifier import save_weights
from carmodels.models.facts import short_name
from carmodels.records import Cause, State, TrialRecord
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.features import FeatureStore
from carmodels.training.held_out import splits_for
from carmodels.training.run import Run
from carmodels.training.trainer import TrainResult, fit
from tune.budget.costs import Costs
from tune.runtime.job import Job, Workers


def train_trial(values: dict[str, Any], job: Job) -> None:
    """Train one configuration in a Ray worker, free its memory, and send the last report."""
    _clear(job)  # a pruned trial holds its tensors until its thread ends
    try:
        last = _train_trial(values, job)
    finally:
        _clear(job)
    report({**last, "done": True})  # Ray ends the trial as it reads this: nothing comes in between


def _clear(job: Job) -> None:
    """Free a trial's memory: once per trial, since once per step would be slow."""
    gc.collect()
    _trim_heap()
    if job.workers.gpus:
        torch.cuda.empty_cache()
        torch.compiler.reset()  # else compiling stops after a few trials


def _trim_heap() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only; others trim by themselves
    if trim is not None:
        trim(0)


def _train_trial(values: dict[str, Any], job: Job) -> dict[str, Any]:
    """Train, and report every epoch but the last. Returns the last report, which carries `state`."""
    packed, job = job.workers.packed, replace(job, workers=_own(job.workers))
    share = job.workers.gpus if packed else 1.0  # of the GPU on which costs were measured
    job.begin()
    run = Run.from_dict(values)
    title = f"ray::{trial_name(run)}"  # shown in the dashboard, ps and top
    setproctitle(title)
    started = steady_time()
    if job.workers.gpus:
        torch.cuda.reset_peak_memory_stats()

    def report_of(metrics: EpochMetrics, **more: Any) -> dict[str, Any]:
        elapsed = steady_time() - started
        gpu_bytes = torch.cuda.max_memory_reserved() if job.workers.gpus else 0
        return {
            run.origin.metric: metrics.value,
            "run_id": run.id,
            "elapsed": elapsed,  # seconds since the trial's start; `seconds` counts one epoch
            "gpu_bytes": gpu_bytes,
            **asdict(metrics),
            **more,
        }

    def on_epoch(metrics: EpochMetrics) -> None:
        if not metrics.ending:  # the last epoch is reported after the trial's files are written
            report(report_of(metrics))
            setproctitle(title)  # Ray overwrites the title with each report

    trained = fit(
        run,
        job.splits,
        weights=job.weights,
        on_epoch=on_epoch,
        device=job.workers.device,
        processes=job.workers.processes,
        features=FeatureStore(job.cache / "features"),
        compiled=job.costs is not None and job.costs.pays_to_compile(run.config),
        until=job.until,
        epoch_seconds=_epoch_seconds(run.config, job.costs, share),
        start=job.study.weights_file(run.origin.continues) if run.origin.continues else None,
    )
    end = _end_of(trained)
    complete = end["state"] is State.COMPLETE
    if complete and not _falls_short(trained, job.study):
        _leave(trained, job)
    kept = trained.best if complete and trained.best else trained.history[-1]
    return report_of(trained.history[-1], **end, best_value=kept.value)


def _epoch_seconds(config: TrialConfig, costs: Costs | None, share: float) -> Callable[[int], float] | None:
    """What each epoch of a configuration should take, on a share of a GPU; None without measured costs."""
    return None if costs is None else lambda number: costs.epoch(config, number) / share


def _own(workers: Workers) -> Workers:
    """This trial's resources. Ray grants them per trial if shares differ."""
    if not workers.packed:
        return workers
    granted = get_context().get_trial_resources().required_resources
    return Workers(1, int(granted["CPU"]), granted.get("GPU", 0.0))


def _end_of(trained: TrainResult) -> dict[str, Any]:
    """How training ended: `state`, `cause`, `cut_short` and `reason` as in `TrialRecord`."""
    last, config = trained.history[-1].epoch, trained.run.config
    if trained.ending == "diverged":
        reason = f"the loss was not finite in epoch {last}"
        return {"state": State.FAILED, "cause": Cause.DIVERGED, "cut_short": False, "reason": reason}
    reason = {
        "patience": f"no better {trained.run.origin.metric} for {config.patience} epochs",
        "time": f"the time was up after epoch {last} of {config.epochs}",
    }.get(trained.ending, f"ran its {last} epochs")
    return {"state": State.COMPLETE, "cause": None, "cut_short": trained.ending == "time", "reason": reason}


def completed_before(study: Study, trial_id: str) -> TrialRecord | None:
    """The record of an earlier complete run of the same id."""
    return next((r for r in study.records() if r.trial_id == trial_id and r.state is State.COMPLETE), None)


def _falls_short(trained: TrainResult, study: Study) -> bool:
    """Whether the clock ended the run earlier than a previous run, whose files are then kept."""
    before = completed_before(study, trained.run.id) if trained.ending == "time" else None
    return before is not None and len(trained.history) < before.epochs_run


def _leave(trained: TrainResult, job: Job) -> None:
    """Write a complete trial's weights, and its predictions on val, holdout and test."""
    splits = splits_for(trained.run.origin, job.splits)
    job.study.delete_predictions(trained.run.id)  # of an earlier run
    for split in (splits.val, splits.holdout, splits.test):
        if len(split):
            predictions = job.predict(trained.model, trained.run.config, split)
            predictions.save(job.study.predictions_file(trained.run.id, split.name))
    save_weights(trained.model, job.study.weights_file(trained.run.id))


def trial_name(run: Run) -> str:
    """A run's name in Ray, in metrics and in file names."""
    config = run.config
    backbone = re.sub(r"[^\w.-]", "_", short_name(config.backbone))
    return f"{backbone}-{config.image_size}px-{config.unfreeze}-{run.id}"

"""Training one configuration in a Ray worker."""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from ray._raylet import setproctitle  # type: ignore[attr-defined]  # its stubs are not complete
from ray.tune import get_context, report

from carmodels.models.classifier import save_weights
from carmodels.records import Status, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.features import FeatureStore
from carmodels.training.held_out import splits_for
from carmodels.training.trainer import TrainResult, fit
from tune.runtime.job import Job, Workers


def train_trial(values: dict[str, Any], job: Job) -> None:
    """Train one configuration in a Ray worker, and leave nothing of it behind in the worker."""
    _clear(job)  # a trial that was stopped held its tensors until its thread had ended
    try:
        _train_trial(values, job)
    finally:
        _clear(job)


def _clear(job: Job) -> None:
    """Give back what a trial had, once a trial, not in every step."""
    gc.collect()
    _give_memory_back()
    if job.workers.gpus:
        torch.cuda.empty_cache()
        torch.compiler.reset()  # else after a few trials nothing would be compiled any more


def _give_memory_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others give back by themselves
    if trim is not None:
        trim(0)


def _train_trial(values: dict[str, Any], job: Job) -> None:
    """Train and report every epoch; the last report carries `status`."""
    job = replace(job, workers=_own(job.workers))
    job.workers.take()
    config = TrialConfig.from_dict(values)
    title = f"ray::{trial_name(config)}"  # by which the dashboard, ps and top tell workers apart
    setproctitle(title)
    started = time.time()
    if job.workers.gpus:
        torch.cuda.reset_peak_memory_stats()

    def send(metrics: EpochMetrics, **more: Any) -> None:
        elapsed = time.time() - started
        gpu_bytes = torch.cuda.max_memory_reserved() if job.workers.gpus else 0
        report(
            {
                config.metric: metrics.value,
                "config_id": config.id,
                "elapsed": elapsed,  # seconds of the whole trial so far, where `seconds` are the epoch's
                "gpu_bytes": gpu_bytes,
                **asdict(metrics),
                **more,
            }
        )
        setproctitle(title)  # Ray puts its own there, an actor's method, with each report

    def on_epoch(metrics: EpochMetrics) -> None:
        if not metrics.ending:  # the last epoch is reported when all that the trial leaves is on disk
            send(metrics)

    fitted = fit(
        config,
        job.splits,
        weights=job.weights,
        on_epoch=on_epoch,
        device=job.workers.device,
        processes=job.workers.processes,
        features=FeatureStore(job.cache / "features"),
        compiled=job.costs is not None and job.costs.pays_to_compile(config),
        until=job.until,
        start=job.study.weights_file(config.continues) if config.continues else None,
    )
    status, reason = _verdict(fitted)
    if status is Status.FINISHED and not _falls_short(fitted, job.study):
        _leave(fitted, job)
    told = fitted.best if status is Status.FINISHED and fitted.best else fitted.history[-1]
    send(fitted.history[-1], status=str(status), reason=reason, best_value=told.value)


def _own(workers: Workers) -> Workers:
    """What this trial itself may use, as Ray has granted it, where trials differ in that."""
    if not workers.packed:
        return workers
    granted = get_context().get_trial_resources().required_resources
    return Workers(1, int(granted["CPU"]), granted.get("GPU", 0.0))


def _verdict(fitted: TrainResult) -> tuple[Status, str]:
    last = fitted.history[-1].epoch
    if fitted.ending == "diverged":
        return Status.DIVERGED, f"the loss was not finite in epoch {last}"
    if fitted.ending == "patience":
        return Status.FINISHED, f"no better {fitted.config.metric} for {fitted.config.patience} epochs"
    if fitted.ending == "time":
        return Status.FINISHED, f"the time was up after epoch {last} of {fitted.config.epochs}"
    return Status.FINISHED, f"ran its {last} epochs"


def finished_before(study: Study, trial_id: str) -> TrialRecord | None:
    """The record of a finished run of just that configuration."""
    return next((r for r in study.records() if r.trial_id == trial_id and r.status is Status.FINISHED), None)


def _falls_short(fitted: TrainResult, study: Study) -> bool:
    """Whether the clock cut it short before it came as far as a run before it, whose files then stay."""
    before = finished_before(study, fitted.config.id) if fitted.ending == "time" else None
    return before is not None and len(fitted.history) < before.epochs_run


def _leave(fitted: TrainResult, job: Job) -> None:
    """Write a finished trial's probabilities of what it did not learn from, and its weights."""
    splits = splits_for(fitted.config, job.splits)
    job.study.forget_predictions(fitted.config.id)  # those of an earlier run of it
    for split in (splits.val, splits.holdout, splits.test):
        if len(split):
            predictions = job.predict(fitted.model, fitted.config, split)
            predictions.save(job.study.predictions_file(fitted.config.id, split.name))
    save_weights(fitted.model, job.study.weights_file(fitted.config.id))


def trial_name(config: TrialConfig) -> str:
    """What the configuration is called in Ray, in its metrics and in file names."""
    return f"{config.backbone}-{config.image_size}px-{config.unfreeze}-{config.id}"

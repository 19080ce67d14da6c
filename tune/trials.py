"""Running configurations side by side through Ray Tune, and writing down how each of them ended."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # trials.jsonl holds every result
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # `Interrupts` ends a run in better order
os.environ.setdefault("RAY_worker_niceness", "0")  # training is what the machine is here for
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "Traceback")  # a dying worker's; its record has the reason
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # it would print over our own lines
# The C library gives freed memory back and asks for it anew in every step otherwise, and a page that is
# touched for the first time costs more than what is computed on it: 17 % of the time of mobilenetv2_100 at
# 128 px.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",  # a trial trains in a thread, whose own arena would be given back whole
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
# Read by the workers as they start; those of a cluster are sent it.
WORKER_ENVIRONMENT = {
    **MALLOC,
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a stopped trial's loaders end in time
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in WORKER_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray
import torch
from ray._raylet import setproctitle  # type: ignore[attr-defined]  # its stubs are not complete
from ray.tune import (
    Callback,
    FailureConfig,
    PlacementGroupFactory,
    RunConfig,
    Stopper,
    TuneConfig,
    Tuner,
    get_context,
    report,
    with_parameters,
    with_resources,
)
from ray.tune.error import TuneError
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

import carmodels
from carmodels.data import Split, Splits
from carmodels.features import FeatureStore
from carmodels.models import Classifier, Weights, load_weights, save_weights
from carmodels.predictions import Predictions
from carmodels.space import EpochMetrics, TrialConfig
from carmodels.study import Status, Study, TrialRecord
from carmodels.training import Fitted, fit, parted, predict
from tune.costs import Costs

logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what a trial ended with is in its record

HOPELESS = 10  # failed trials in a row, beyond those side by side, that end a run
LONGEST_SILENCE = 6 * 3600.0  # seconds from one epoch's end to the next before a worker counts as hung
SHORTEST_SILENCE, MUCH_SLOWER = 1800.0, 20.0  # likewise, where an epoch's cost is known: seconds, times that
ANSWERS_SLOWER = 5.0  # likewise for what a finished trial is shown: times what that should take
RETRIES = 1  # of a trial that died or failed: machines go, memory is short for a while
MOST_LOADERS = 16  # loader processes of a trial on a GPU
WEIGHTS_KEPT = 12  # best trials of the search whose weights stay on disk

Say = Callable[[str], None]  # prints a line


@dataclass(frozen=True)
class Workers:
    """How many trials run side by side, and what each of them may use."""

    count: int
    cpus: int  # of each
    gpus: float  # of each
    packed: int = 0  # most trials at once where each takes the share of a GPU it needs; 0: all take `gpus`

    @property
    def at_once(self) -> int:
        """Most trials side by side."""
        return self.packed or self.count

    def take(self) -> None:
        """Keep this process to its share of the cores and of a GPU's memory: its neighbours keep theirs."""
        torch.set_num_threads(self.cpus)
        if 0 < self.gpus < 1:
            torch.cuda.set_per_process_memory_fraction(self.gpus)

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def processes(self) -> int:
        """Loader processes of a trial: none where its one core trains as well."""
        return min(MOST_LOADERS, max(0, self.cpus - 1)) if self.gpus else 0


@dataclass(frozen=True)
class Job:
    """What every trial of a study shares; sent to the workers once."""

    study: Study
    splits: Splits
    weights: Weights
    workers: Workers
    cache: Path  # folder of what all studies on this machine share
    costs: Costs | None = None  # what training costs here, where that was measured
    spent: Mapping[str, float] = field(default_factory=dict)  # seconds of earlier commands, by stage
    until: float = math.inf  # time.time() by which a trial ends of itself, with the best epoch it has

    def predict(
        self, model: Classifier, config: TrialConfig, pictures: Split, view: str = "plain"
    ) -> Predictions:
        """A trained model's probabilities for the pictures, seen through a view, in this process."""
        return predict(
            model,
            self.splits,
            pictures,
            config=config,
            view=view,
            device=self.workers.device,
            processes=self.workers.processes,
        )

    def predict_again(self, run: TrialRecord, pictures: Split, views: Sequence[str]) -> list[Predictions]:
        """The same from the weights that a run has left, view by view, with a worker's share of the cores."""
        self.workers.take()
        weights = self.study.weights_file(run.trial_id)
        model = load_weights(run.config, weights, classes=len(self.splits.classes))
        return [self.predict(model, run.config, pictures, view) for view in views]


def as_task(function: Callable[..., Any], workers: Workers) -> Any:
    """The function as a Ray task with a worker's share; a GPU's memory is free again when it ends."""
    calls = 1 if workers.gpus else 0  # 0: the process may be used again
    return ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus, max_calls=calls)(function)


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


def _verdict(fitted: Fitted) -> tuple[Status, str]:
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


def _falls_short(fitted: Fitted, study: Study) -> bool:
    """Whether the clock cut it short before it came as far as a run before it, whose files then stay."""
    before = finished_before(study, fitted.config.id) if fitted.ending == "time" else None
    return before is not None and len(fitted.history) < before.epochs_run


def _leave(fitted: Fitted, job: Job) -> None:
    """Write a finished trial's probabilities of what it did not learn from, and its weights."""
    splits = parted(fitted.config, job.splits)
    job.study.forget_predictions(fitted.config.id)  # those of an earlier run of it
    for split in (splits.val, splits.audit, splits.test):
        if len(split):
            predictions = job.predict(fitted.model, fitted.config, split)
            predictions.save(job.study.predictions_file(fitted.config.id, split.name))
    save_weights(fitted.model, job.study.weights_file(fitted.config.id))


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into an orderly end of the running stage; the second is immediate."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.default_int_handler)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """While inside, signals are noted instead of raised."""
        before = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _StaysHere:
    """Ray pickles a Tuner's parts for `Tuner.restore`; we resume from trials.jsonl, so nothing is kept."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class _Ender(_StaysHere, Stopper):
    """Ends the whole run when the time is up or the user says so."""

    def __init__(self, end: float, interrupts: Interrupts, recorder: Recorder) -> None:
        self._end, self._interrupts, self._recorder = end, interrupts, recorder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._interrupts.seen or time.time() >= self._end or self._recorder.hopeless


@dataclass
class Watch:
    """What a run tells whoever looks on: each epoch, each trial's end, and how things stand meanwhile."""

    on_record: Callable[[TrialRecord], None] = lambda record: None
    on_step: Callable[[Recorder], None] = lambda recorder: None
    on_epoch: Callable[[str, TrialConfig, EpochMetrics, int], None] = lambda *epoch: None


def together(*watches: Watch) -> Watch:
    """One watch that passes everything on to all of them, in their order."""

    def on_record(record: TrialRecord) -> None:
        for watch in watches:
            watch.on_record(record)

    def on_step(recorder: Recorder) -> None:
        for watch in watches:
            watch.on_step(recorder)

    def on_epoch(stage: str, config: TrialConfig, epoch: EpochMetrics, gpu_bytes: int) -> None:
        for watch in watches:
            watch.on_epoch(stage, config, epoch, gpu_bytes)

    return Watch(on_record, on_step, on_epoch)


@dataclass
class Silence:
    """Ends workers that were not heard of for too long: of a hung loader, disk or GPU nothing else is seen.

    `costs` say what an epoch should take; without them a trial may be silent for LONGEST_SILENCE.
    """

    costs: Costs | None
    until: dict[str, tuple[Any, float, float]] = field(default_factory=dict)  # trial, moment, seconds
    ended: dict[str, str] = field(default_factory=dict)  # Ray's trial id -> why, in words

    def heard(self, trial: Any, config: TrialConfig) -> None:
        """It has begun, or an epoch has ended."""
        seconds = self.allowed(config)
        self.until[trial.trial_id] = trial, time.monotonic() + seconds, seconds

    def forget(self, trial: Any) -> None:
        """It has ended."""
        self.until.pop(trial.trial_id, None)

    def allowed(self, config: TrialConfig) -> float:
        """Seconds from one epoch's end to the next, or to the first, before the worker counts as hung."""
        if self.costs is None:
            return LONGEST_SILENCE
        epoch = max(self.costs.epoch(config, number) for number in range(1, config.epochs + 1))
        last = ANSWERS_SLOWER * self.costs.answers(config)  # the last one is told of when these are written
        return min(LONGEST_SILENCE, max(SHORTEST_SILENCE, MUCH_SLOWER * epoch) + last)

    def end(self) -> None:
        """Kill the workers whose time is over; Ray then tells of a worker that died."""
        over = [entry for entry in self.until.values() if time.monotonic() > entry[1]]
        for trial, _, seconds in over:
            self.forget(trial)
            if (actor := trial.temporary_state.ray_actor) is not None:
                self.ended[trial.trial_id] = f"no epoch ended in {seconds:.0f} s, its worker was hung"
                ray.kill(actor)


@dataclass
class Recorder(_StaysHere, Callback):
    """Writes each trial into the study as it ends; the only writer of trials.jsonl."""

    study: Study
    stage: str
    begun: float  # time.time() at the stage's start; earlier where it was gone on with
    reasons: dict[str, str]  # Ray's trial id -> why the scheduler stopped it
    watch: Watch
    notes: dict[str, str] = field(default_factory=dict)  # config id -> note
    running: dict[str, list[EpochMetrics]] = field(default_factory=dict)  # Ray's trial id -> epochs so far
    configs: dict[str, TrialConfig] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    retried: dict[str, str] = field(default_factory=dict)  # Ray's trial id -> what its first attempt died of
    silence: Silence = field(default_factory=lambda: Silence(None))
    most_failures: int = HOPELESS
    failures: int = 0  # in a row
    last_failure: str = ""

    @property
    def hopeless(self) -> bool:
        """Whether so many trials failed one after the other that the next ones would, too."""
        return self.failures >= self.most_failures

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write down that it runs, so that it is run again should this process die."""
        self._begun(trial)
        self.silence.heard(trial, self.configs[trial.trial_id])

    def _begun(self, trial: Any) -> None:
        """Know of it, once. A worker that dies early ends a trial whose start Ray has not told."""
        if trial.trial_id not in self.running and trial.trial_id not in self.recorded:
            self.running[trial.trial_id] = []
            self.configs[trial.trial_id] = TrialConfig.from_dict(trial.config)
            config_id = self.configs[trial.trial_id].id
            if not finished_before(self.study, config_id):  # one that had been cut short stays what it was
                self.study.append(self._record(trial, Status.RUNNING, ""))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It begins anew, on any machine: its worker died, or it ended in an error for the first time."""
        self._begun(trial)
        self.running[trial.trial_id] = []
        self.retried[trial.trial_id] = self._cause(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        epoch = EpochMetrics(**{name: result[name] for name in EpochMetrics.__dataclass_fields__})
        self.running[trial.trial_id].append(epoch)
        self.silence.heard(trial, self.configs[trial.trial_id])
        self.watch.on_epoch(self.stage, self.configs[trial.trial_id], epoch, result.get("gpu_bytes", 0))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        if last.get("status"):
            self._write(trial, Status(last["status"]), last["reason"], value=last["best_value"])
        else:
            self._write(trial, Status.STOPPED, self.reasons.get(trial.trial_id, "stopped"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._begun(trial)
        self._write(trial, Status.FAILED, self._cause(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.silence.end()
        self.watch.on_step(self)

    def _cause(self, trial: Any) -> str:
        """What its worker ended with, in words."""
        return self.silence.ended.pop(trial.trial_id, "") or _last_line(trial)

    def close(self, trials: list[Any], interrupted: bool) -> None:
        """Write down the trials that the end of the run cut off."""
        for trial in trials:
            if trial.trial_id in self.running and trial.trial_id not in self.recorded:
                if trial.status == "ERROR":
                    self._write(trial, Status.FAILED, self._cause(trial))
                elif interrupted:
                    self._write(trial, Status.INTERRUPTED, "interrupted by the user")
                elif self.hopeless:
                    self._write(trial, Status.INTERRUPTED, f"{self.failures} trials before it failed")
                else:
                    self._write(trial, Status.STOPPED, "the time was up")

    def _write(self, trial: Any, status: Status, reason: str, value: float | None = None) -> None:
        if trial.trial_id in self.recorded or trial.trial_id not in self.configs:
            return
        if trial.trial_id in self.retried:
            reason += f" (begun anew, first ended by: {self.retried[trial.trial_id]})"
        record = self._record(trial, status, reason, value)
        self.recorded.add(trial.trial_id)
        self.silence.forget(trial)
        if status is Status.FAILED:
            self.failures, self.last_failure = self.failures + 1, reason
        elif status is not Status.INTERRUPTED:
            self.failures = 0
        self.running.pop(trial.trial_id, None)
        self.study.append(record)
        self.study.write_table()
        if status is Status.FINISHED and self.stage == "search":
            self.study.keep_weights(WEIGHTS_KEPT, also=self.notes)
        self.watch.on_record(record)

    def _record(self, trial: Any, status: Status, reason: str, value: float | None = None) -> TrialRecord:
        config, curve = self.configs[trial.trial_id], tuple(self.running.get(trial.trial_id, ()))
        if value is None and curve:
            value = curve[-1].value
        return TrialRecord(
            trial_id=config.id,
            config=config,
            status=status,
            epochs_run=len(curve),
            value=None if status in (Status.DIVERGED, Status.FAILED) else _finite(value),
            seconds=sum(e.seconds for e in curve),
            reason=reason,
            stage=self.stage,
            note=self.notes.get(config.id, ""),
            at=time.time() - self.begun,
            curve=curve,
        )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def trial_name(config: TrialConfig) -> str:
    """What the configuration is called in Ray, in its metrics and in file names."""
    return f"{config.backbone}-{config.image_size}px-{config.unfreeze}-{config.id}"


def _last_line(trial: Any) -> str:
    """The error's own words, from the file Ray keeps of it."""
    path = Path(trial.error_file) if trial.error_file else None
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path and path.is_file() else []
    words = [line.strip() for line in lines if line.strip()]
    return words[-1][:300] if words else "the worker died"


def run_trials(
    job: Job,
    *,
    stage: str,
    begun: float,
    end: float,
    search_alg: Searcher,
    scheduler: TrialScheduler | None = None,
    notes: dict[str, str],
    watch: Watch,
    packing: Callable[[dict[str, Any]], PlacementGroupFactory] | None = None,
) -> bool:
    """Run what the searcher hands out until it has no more or the time is `end`; False if interrupted.

    `packing` says what each configuration asks of Ray; without it all ask for the same. Raises ValueError
    where so many trials failed in a row that it is no use to go on.
    """
    interrupts = Interrupts()
    reasons = getattr(scheduler, "reasons", {})
    recorder = Recorder(
        job.study,
        stage,
        begun - job.spent.get(stage, 0.0),
        reasons,
        watch,
        notes,
        silence=Silence(job.costs),
        most_failures=HOPELESS + job.workers.at_once,
    )
    resources = packing or {"cpu": job.workers.cpus, "gpu": job.workers.gpus}
    # where trials ask for different shares, one is drawn only when those before it have found room
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "1" if packing else "auto"
    tuner = Tuner(
        with_resources(with_parameters(train_trial, job=job), resources),
        tune_config=TuneConfig(
            search_alg=search_alg,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=job.workers.at_once,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial_name(TrialConfig.from_dict(trial.config)),
            trial_dirname_creator=lambda trial: f"{trial}-{trial.trial_id}",
        ),
        run_config=RunConfig(
            name=f"{stage}-{int(time.time())}",
            storage_path=str(job.study.ray_folder),
            stop=_Ender(end, interrupts, recorder),
            callbacks=[recorder],
            failure_config=FailureConfig(max_failures=RETRIES),
            verbose=0,
        ),
    )
    with interrupts.caught():
        results = _fitted(tuner, job.study)
    recorder.close(results._experiment_analysis.trials, interrupts.seen)
    if recorder.hopeless:
        raise ValueError(
            f"{job.study.folder}: {recorder.failures} trials in a row failed, the last by: "
            f"{recorder.last_failure}; mend that, then search.py --resume goes on"
        )
    return not interrupts.seen


def _fitted(tuner: Tuner, study: Study) -> Any:
    """What `Tuner.fit` gives; an OSError of the recorder's, which Ray hides in its own, is one again."""
    try:
        return tuner.fit()
    except (TuneError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(
            f"{study.folder}: {cause.strerror or cause}; mend that, then search.py --resume goes on"
        ) from None


def start_ray(*, address: str | None, cores: int, gpus: int) -> str:
    """Start a Ray of our own or join the cluster at `address`; returns the dashboard's URL, if any.

    A cluster is sent our own code, so that its machines need what that imports, and no more.
    """
    arguments: dict[str, Any] = (
        {
            "address": address,
            "runtime_env": {
                "py_modules": [str(Path(package).parent) for package in (carmodels.__file__, __file__)],
                "excludes": ["__pycache__"],
                "env_vars": {name: os.environ[name] for name in WORKER_ENVIRONMENT},
            },
        }
        if address
        else {
            "address": "local",
            "num_cpus": cores,
            "num_gpus": gpus,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "object_store_memory": 256 * 2**20,
        }
    )
    context = ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""

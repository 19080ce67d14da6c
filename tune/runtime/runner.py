"""Runs configurations in parallel with Ray Tune and records how each ended."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.tune import (
    FailureConfig,
    PlacementGroupFactory,
    RunConfig,
    Stopper,
    TuneConfig,
    Tuner,
    with_parameters,
    with_resources,
)
from ray.tune.error import TuneError
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from carmodels.formatting import first_line
from carmodels.records import Role
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from carmodels.training.run import Run
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job
from tune.runtime.recorder import HOPELESS, NotPickled, Recorder
from tune.runtime.watchdog import Watchdog
from tune.runtime.worker import train_trial, trial_name

logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's record holds its error
RETRIES = 1  # of a failed trial: a machine may leave, memory may be short for a while


class Interrupts:
    """The first Ctrl-C or SIGTERM ends the running stage in order. The second ends it at once."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.default_int_handler)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Inside the block, a signal sets `seen` instead of raising."""
        before = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class DeadlineStopper(NotPickled, Stopper):
    """Ends the run at the deadline, on an interrupt, after too many failures, or after a fault."""

    def __init__(self, end: float, interrupts: Interrupts, recorder: Recorder) -> None:
        self._end, self._interrupts, self._recorder = end, interrupts, recorder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        ended = self._recorder.hopeless or self._recorder.fault is not None
        return ended or self._interrupts.seen or steady_time() >= self._end


def run_trials(
    job: Job,
    *,
    stage: str,
    begun: float,
    end: float,
    search_alg: Searcher,
    scheduler: TrialScheduler | None = None,
    roles: Mapping[str, Role],
    watch: ProgressCallback,
    packing: Callable[[dict[str, Any]], PlacementGroupFactory] | None = None,
) -> bool:
    """Run the searcher's configurations until it has no more or until `end`. False if interrupted.

    `packing` gives the resources of each configuration; without it all request the same. Raises ValueError if
    too many trials fail in a row, OSError if a file cannot be written or Ray fails.
    """
    interrupts = Interrupts()
    stops = getattr(scheduler, "stops", {})
    recorder = Recorder(
        job.study,
        stage,
        begun - job.spent.get(stage, 0.0),
        stops,
        watch,
        roles,
        watchdog=Watchdog(job.costs),
        most_failures=HOPELESS + job.workers.at_once,
    )
    resources = packing or {"cpu": job.workers.cpus, "gpu": job.workers.gpus}
    # if shares differ, the next trial is drawn only after earlier ones are placed
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "1" if packing else "auto"
    tuner = Tuner(
        with_resources(with_parameters(train_trial, job=job), resources),
        tune_config=TuneConfig(
            search_alg=search_alg,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=job.workers.at_once,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial_name(Run.from_dict(trial.config)),
            trial_dirname_creator=lambda trial: f"{trial}-{trial.trial_id}",
        ),
        run_config=RunConfig(
            name=f"{stage}-{int(time.time())}",
            storage_path=str(job.study.ray_folder),
            stop=DeadlineStopper(end, interrupts, recorder),
            callbacks=[recorder],
            failure_config=FailureConfig(max_failures=RETRIES),
            verbose=0,
        ),
    )
    with interrupts.caught():
        try:
            tuner.fit()
        except Exception as error:  # raised below, when what ran is recorded
            recorder.fault = recorder.fault or error
        recorder.close(interrupts.seen)
    if recorder.fault:
        raise _in_one_line(recorder.fault, job.study)
    if recorder.hopeless:
        raise ValueError(
            f"{job.study.folder}: {recorder.failures} trials in a row failed, the last by: "
            f"{recorder.last_failure}; mend that, then search.py --resume goes on"
        )
    return not interrupts.seen


def _in_one_line(error: Exception, study: Study) -> Exception:
    """An OSError that names the study, if the machine or Ray failed; else the error itself."""
    cause: BaseException | None = error
    while cause and not _of_machine(cause):
        cause = cause.__cause__ or (cause.__context__ if isinstance(cause, TuneError) else None)
    if cause is None:
        return error
    return OSError(f"{study.folder}: {first_line(cause)}; mend that, then search.py --resume goes on")


def _of_machine(error: BaseException) -> bool:
    return isinstance(error, OSError) or (isinstance(error, RayError) and not isinstance(error, RayTaskError))

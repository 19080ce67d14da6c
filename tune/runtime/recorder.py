"""Records each trial in the study when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from ray.tune import Callback

from carmodels.formatting import first_line
from carmodels.records import Cause, Role, State, TrialRecord
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from carmodels.training.config import EpochMetrics
from carmodels.training.run import Run
from tune.budget.stages import WEIGHTS_KEPT
from tune.optim.failures import cause_of
from tune.optim.scheduler import StopDecision
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.watchdog import Watchdog
from tune.runtime.worker import completed_before

HOPELESS = 10  # failed trials in a row that end a run, on top of the number of parallel trials


class NotPickled:
    """Pickles as an empty object. Ray pickles a Tuner for `Tuner.restore`; we resume from trials.jsonl."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


def _kept(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook, with its exception kept in `fault`.

    From `on_trial_complete` Ray would swallow it and train the trial again.
    """

    @wraps(hook)
    def guarded(self: Recorder, *arguments: Any, **named: Any) -> None:
        try:
            hook(self, *arguments, **named)
        except Exception as error:  # raised again by `run_trials`, once the run has ended
            self.fault = self.fault or error

    return guarded


@dataclass
class Recorder(NotPickled, Callback):
    """Records each trial in the study when it ends. The only writer of trials.jsonl.

    After a `fault` the run must end: what a hook raised is not known to Ray.
    """

    study: Study
    stage: str
    begun: float  # steady_time() at the stage's start, less the seconds of earlier commands
    stops: Mapping[str, StopDecision]  # why the scheduler pruned a trial, by Ray's trial id
    watch: ProgressCallback
    roles: Mapping[str, Role] = field(default_factory=dict)  # by run id
    running: dict[str, list[EpochMetrics]] = field(default_factory=dict)  # Ray's trial id -> epochs so far
    runs: dict[str, Run] = field(default_factory=dict)  # by Ray's trial id
    trials: dict[str, Any] = field(default_factory=dict)  # Ray's trials, by their ids
    recorded: set[str] = field(default_factory=set)
    retried: dict[str, str] = field(default_factory=dict)  # Ray's trial id -> error of its first attempt
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(None))
    most_failures: int = HOPELESS
    failures: int = 0  # in a row
    last_failure: str = ""
    fault: Exception | None = None  # the first that was raised outside a trial

    @property
    def hopeless(self) -> bool:
        """Whether too many trials failed in a row to go on."""
        return self.failures >= self.most_failures

    @_kept
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the trial as running. If this process dies, a resumed search runs it again."""
        self._register(trial)
        self.watchdog.heard(trial, self.runs[trial.trial_id].config)

    def _register(self, trial: Any) -> None:
        """Register the trial once. If its worker dies early, Ray reports its end without its start."""
        if trial.trial_id not in self.running and trial.trial_id not in self.recorded:
            self.running[trial.trial_id] = []
            self.runs[trial.trial_id] = Run.from_dict(trial.config)
            self.trials[trial.trial_id] = trial
            run_id = self.runs[trial.trial_id].id
            if not completed_before(self.study, run_id):  # a run that was cut short keeps its record
                self.study.append(self._record(trial, State.RUNNING, ""))

    @_kept
    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Restarted on any node, after its worker died or after its first error."""
        self._register(trial)
        if self._ended_by_itself(trial):
            self._blame_hook(trial)
            return
        self.running[trial.trial_id] = []
        self.retried[trial.trial_id] = self._failure(trial)[1]

    @_kept
    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if trial.trial_id in self.recorded:  # after a fault
            return
        epoch = EpochMetrics(**{name: result[name] for name in EpochMetrics.__dataclass_fields__})
        self.running[trial.trial_id].append(epoch)
        self.watchdog.heard(trial, self.runs[trial.trial_id].config)
        self.watch.on_epoch(self.stage, self.runs[trial.trial_id], epoch, result.get("gpu_bytes", 0))

    @_kept
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial)

    def _ended_by_itself(self, trial: Any) -> bool:
        """Whether the trial has sent its last report, or the scheduler has stopped it."""
        return bool((trial.last_result or {}).get("state")) or trial.trial_id in self.stops

    def _end(self, trial: Any) -> None:
        """Record a trial that ended by itself or was stopped."""
        last = trial.last_result or {}
        if last.get("state"):
            self._write(
                trial,
                State(last["state"]),
                last["reason"],
                cause=Cause(last["cause"]) if last["cause"] else None,
                cut_short=last["cut_short"],
                value=last["best_value"],
            )
        else:
            stop = self.stops.get(trial.trial_id, StopDecision(State.PRUNED, "stopped by the scheduler"))
            self._write(trial, stop.state, stop.reason)

    def _blame_hook(self, trial: Any) -> None:
        """Record a trial whose end raised in a hook of the searcher or the scheduler.

        Ray takes that for a failure of the trial.
        """
        self._end(trial)
        self.fault = self.fault or RuntimeError(f"at the end of trial {trial.trial_id}: {_error_text(trial)}")

    @_kept
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._register(trial)
        if self._ended_by_itself(trial):
            self._blame_hook(trial)
            return
        cause, reason = self._failure(trial)
        self._write(trial, State.FAILED, reason, cause=cause)

    @_kept
    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.watchdog.end()
        self.watch.on_step(self)

    def _failure(self, trial: Any) -> tuple[Cause, str]:
        """The cause of a failure, and its reason as text."""
        if hung := self.watchdog.ended.pop(trial.trial_id, ""):
            return Cause.MACHINE, hung
        return cause_of(trial.get_pickled_error()), _reason(trial)

    def close(self, interrupted: bool) -> None:
        """Record the trials whose end is not recorded: most were running when the run ended."""
        for trial in list(self.trials.values()):
            self._close(trial, interrupted)

    @_kept
    def _close(self, trial: Any, interrupted: bool) -> None:
        if trial.trial_id in self.recorded:
            return
        if self._ended_by_itself(trial):
            self._end(trial)
        elif trial.status == "ERROR":
            cause, reason = self._failure(trial)
            self._write(trial, State.FAILED, reason, cause=cause)
        elif interrupted:
            self._write(trial, State.INTERRUPTED, "interrupted by the user")
        elif self.fault:
            self._write(trial, State.INTERRUPTED, f"the run ended before it: {first_line(self.fault)}")
        elif self.hopeless:
            self._write(trial, State.INTERRUPTED, f"{self.failures} trials before it failed")
        else:
            self._write(trial, State.OUT_OF_TIME, "the time was up")

    def _write(self, trial: Any, state: State, reason: str, **more: Any) -> None:
        if trial.trial_id in self.recorded or trial.trial_id not in self.runs:
            return
        if trial.trial_id in self.retried:
            reason += f" (restarted, first ended by: {self.retried[trial.trial_id]})"
        record = self._record(trial, state, reason, **more)
        self.study.append(record)  # first: until then the trial has not ended
        self.recorded.add(trial.trial_id)
        del self.trials[trial.trial_id]
        self.watchdog.forget(trial)
        if state is State.FAILED and not record.diverged:
            self.failures, self.last_failure = self.failures + 1, reason
        elif state is not State.INTERRUPTED:
            self.failures = 0
        self.running.pop(trial.trial_id, None)
        self.study.write_table()
        if state is State.COMPLETE and self.stage == "search":
            self.study.keep_weights(WEIGHTS_KEPT, also=self.roles)
        self.watch.on_record(record)

    def _record(
        self,
        trial: Any,
        state: State,
        reason: str,
        *,
        cause: Cause | None = None,
        cut_short: bool = False,
        value: float | None = None,
    ) -> TrialRecord:
        run, curve = self.runs[trial.trial_id], tuple(self.running.get(trial.trial_id, ()))
        role = self.roles.get(run.id, Role())
        if value is None and curve:
            value = curve[-1].value
        return TrialRecord(
            trial_id=run.id,
            config=run.config,
            origin=run.origin,
            state=state,
            epochs_run=len(curve),
            value=None if state is State.FAILED else _finite(value),
            seconds=sum(e.seconds for e in curve),
            reason=reason,
            cause=cause,
            cut_short=cut_short,
            stage=self.stage,
            baseline=role.baseline,
            repeats=role.repeats,
            note=role.note,
            at=steady_time() - self.begun,
            curve=curve,
        )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _error_text(trial: Any) -> str:
    """The error file that Ray writes; empty if there is none."""
    path = Path(trial.error_file) if trial.error_file else None
    return path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else ""


def _reason(trial: Any) -> str:
    """The last line of the error file."""
    words = [line.strip() for line in _error_text(trial).split("\n") if line.strip()]
    return words[-1][:300] if words else "the worker died"

"""Writes each trial into the study as it ends."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.tune import Callback

from carmodels.records import Status, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.watchdog import Watchdog
from tune.runtime.worker import finished_before

HOPELESS = 10  # failed trials in a row, beyond those side by side, that end a run
WEIGHTS_KEPT = 12  # best trials of the search whose weights stay on disk


class NotPickled:
    """Ray pickles a Tuner's parts for `Tuner.restore`; we resume from trials.jsonl, so nothing is kept."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


@dataclass
class Recorder(NotPickled, Callback):
    """Writes each trial into the study as it ends; the only writer of trials.jsonl."""

    study: Study
    stage: str
    begun: float  # time.time() at the stage's start; earlier where it was gone on with
    reasons: dict[str, str]  # Ray's trial id -> why the scheduler stopped it
    watch: ProgressCallback
    notes: dict[str, str] = field(default_factory=dict)  # config id -> note
    running: dict[str, list[EpochMetrics]] = field(default_factory=dict)  # Ray's trial id -> epochs so far
    configs: dict[str, TrialConfig] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    retried: dict[str, str] = field(default_factory=dict)  # Ray's trial id -> what its first attempt died of
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(None))
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
        self.watchdog.heard(trial, self.configs[trial.trial_id])

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
        self.watchdog.heard(trial, self.configs[trial.trial_id])
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
        self.watchdog.end()
        self.watch.on_step(self)

    def _cause(self, trial: Any) -> str:
        """What its worker ended with, in words."""
        return self.watchdog.ended.pop(trial.trial_id, "") or _last_line(trial)

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
        self.watchdog.forget(trial)
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


def _last_line(trial: Any) -> str:
    """The error's own words, from the file Ray keeps of it."""
    path = Path(trial.error_file) if trial.error_file else None
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path and path.is_file() else []
    words = [line.strip() for line in lines if line.strip()]
    return words[-1][:300] if words else "the worker died"

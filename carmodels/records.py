"""What is written down of a trial: how it ended, its learning curve, where it comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from carmodels.files import json_ready
from carmodels.training.config import EpochMetrics, TrialConfig


class Status(StrEnum):
    """How a trial ended."""

    FINISHED = "finished"  # by its own schedule or its own patience
    STOPPED = "stopped"  # by the scheduler or the clock
    DIVERGED = "diverged"  # its loss was no longer finite
    FAILED = "failed"  # an error
    INTERRUPTED = "interrupted"  # by the user; to be run again
    RUNNING = "running"  # or cut off by a dying process; where nothing runs, to be run again


FOLD, FOLDS, FOLD_IN = "fold", "folds", "fold-in"  # stages: one fold, all of a configuration, everything
TRAINED = ("search", "confirm", "retrain")  # stages whose models were trained on train by a configuration
BASELINE = "the baseline"  # how the note on that trial begins
CUT_OFF = (Status.INTERRUPTED, Status.RUNNING)


@dataclass(frozen=True)
class TrialRecord:
    """One line of trials.jsonl: a trial as it begins, or how it ended."""

    trial_id: str  # of a soup or student, whose configuration alone does not make it, not the configuration's
    config: TrialConfig
    status: Status
    epochs_run: int
    value: float | None  # metric on val at the best epoch; of a stopped trial, at its last; of a fold, on it
    seconds: float
    reason: str  # why it ended, a sentence
    stage: str = "search"  # or one of those above, "soup", "student"; in the study of stops "holdout"
    note: str = ""  # e.g. that this is the baseline
    at: float = 0.0  # seconds of its stage, since its command began and in earlier commands, up to its end
    curve: tuple[EpochMetrics, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it ended of itself, and not since its time was up."""
        return not self.curve or self.curve[-1].ending != "time"

    @property
    def by_the_clock(self) -> bool:
        """Whether it was stopped for want of time, not for what it came to."""
        return self.status is Status.STOPPED and self.reason.startswith("the time")

    @property
    def is_baseline(self) -> bool:
        """Whether it is the yardstick, which the search did not draw."""
        return self.note.startswith(BASELINE)

    def to_json(self) -> str:
        """One line, without a line end."""
        return json.dumps(json_ready(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> TrialRecord:
        """Raises ValueError for a line that is no record."""
        try:
            values = json.loads(line)
            curve = tuple(_epoch(epoch) for epoch in values.pop("curve"))
            config = TrialConfig.from_dict(values.pop("config"))
            return cls(config=config, status=Status(values.pop("status")), curve=curve, **values)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no trial record: {error}") from error


def _epoch(values: Mapping[str, Any]) -> EpochMetrics:
    """An epoch as it was written; JSON has no NaN, a number that was not finite is null there."""
    finite: dict[str, Any] = {name: math.nan if value is None else value for name, value in values.items()}
    return EpochMetrics(**finite)

"""What is written down of a trial: how it ended, its learning curve, where it comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from carmodels.files import json_ready
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run


class State(StrEnum):
    """How a trial stands. Optuna's names where it has them."""

    RUNNING = "running"  # or cut off by a dying process
    COMPLETE = "complete"  # ended by its schedule or its patience; cut short where `cut_short` says so
    PRUNED = "pruned"  # by the scheduler at a rung
    OUT_OF_TIME = "out_of_time"  # the time for its stage was up
    INTERRUPTED = "interrupted"  # by the user
    FAILED = "failed"  # `cause` says by what


class Cause(StrEnum):
    """Why a trial failed. Only a failure of the machine is worth another try."""

    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"  # its loss was not finite
    MACHINE = "machine"  # its worker died, was hung or lost
    ERROR = "error"  # any other exception


FOLD, FOLDS, FOLD_IN = "fold", "folds", "fold-in"  # stages: one fold, all of a configuration, everything
TRAINED = ("search", "confirm", "retrain")  # stages whose models were trained on train by a configuration
CUT_OFF = (State.INTERRUPTED, State.RUNNING)


@dataclass(frozen=True)
class Role:
    """What a run is in its study, beside its configuration."""

    baseline: bool = False  # the competitor's configuration, which the search did not draw
    repeats: str = ""  # trial_id of the search's trial of which it is a repeat, fold or longer schedule
    note: str = ""  # the same for people


@dataclass(frozen=True)
class TrialRecord:
    """One line of trials.jsonl: a trial as it begins, or how it ended."""

    trial_id: str  # the run's id; soups and students have their own
    config: TrialConfig
    state: State
    epochs_run: int
    value: float | None  # metric on val: best epoch; of a pruned trial the last one; of a fold, on the fold
    seconds: float
    reason: str  # why it ended, a sentence for people
    cause: Cause | None = None  # of a failure
    cut_short: bool = False  # complete, but ended early for want of time: the same run may go further
    stage: str = "search"  # or "confirm", "retrain", one of those above, "soup", "student", "stop_check"
    baseline: bool = False  # as in `Role`
    repeats: str = ""  # as in `Role`
    ingredients: tuple[str, ...] = ()  # trial_ids that a soup was made of
    note: str = ""  # for people
    at: float = 0.0  # seconds of its stage, since its command began and in earlier commands, up to its end
    origin: Origin = field(default_factory=Origin)
    curve: tuple[EpochMetrics, ...] = ()

    @property
    def run(self) -> Run:
        """Its configuration and where it comes from."""
        return Run(self.config, self.origin)

    @property
    def whole(self) -> bool:
        """Whether it ended of itself, and not since its time was up."""
        return not self.cut_short

    @property
    def diverged(self) -> bool:
        """Whether its loss was not finite."""
        return self.cause is Cause.DIVERGED

    @property
    def unfinished(self) -> bool:
        """Whether it was cut off or lost with its machine, so that `--resume` runs it again."""
        return self.state in CUT_OFF or self.cause is Cause.MACHINE

    def to_json(self) -> str:
        """One line, without a line end."""
        return json.dumps(json_ready(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> TrialRecord:
        """Raises ValueError for a line that is no record."""
        try:
            values = json.loads(line)
            run = Run.from_dict({name: values.pop(name) for name in ("config", "origin")})
            cause = values.pop("cause")
            return cls(
                config=run.config,
                origin=run.origin,
                state=State(values.pop("state")),
                cause=None if cause is None else Cause(cause),
                curve=tuple(_epoch(epoch) for epoch in values.pop("curve")),
                ingredients=tuple(values.pop("ingredients")),
                **values,
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no trial record: {error}") from error


def _epoch(values: Mapping[str, Any]) -> EpochMetrics:
    """An epoch as it was written; JSON has no NaN, a number that was not finite is null there."""
    finite: dict[str, Any] = {name: math.nan if value is None else value for name, value in values.items()}
    return EpochMetrics(**finite)

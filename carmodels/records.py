"""Trial records: a trial's state, learning curve, configuration and origin, as a line of trials.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from carmodels.files import NUMBER, json_ready, other_kind
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run


class State(StrEnum):
    """A trial's state, with Optuna's names where it has them."""

    RUNNING = "running"  # also what a killed process leaves behind
    COMPLETE = "complete"  # ended by its schedule or patience, or early where `cut_short` is set
    PRUNED = "pruned"  # by the scheduler at a rung
    OUT_OF_TIME = "out_of_time"  # its stage's time was up
    INTERRUPTED = "interrupted"  # by the user, or by what ended the run
    FAILED = "failed"  # see `cause`


class Cause(StrEnum):
    """Why a trial failed. The sampler avoids the first two, `--resume` runs MACHINE again."""

    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"  # non-finite loss
    MACHINE = "machine"  # its worker died or hung, its disk was full, a download failed
    ERROR = "error"  # any other exception: it says nothing of the configuration


FOLD, FOLDS, FOLD_IN = "fold", "folds", "fold-in"  # stages: one fold, all folds, all labelled images
TRAIN_SPLIT_STAGES = ("search", "confirm", "retrain")  # whose models are trained on the train split
NOT_ENDED = (State.INTERRUPTED, State.RUNNING)


@dataclass(frozen=True)
class Role:
    """A run's role in its study."""

    baseline: bool = False  # the baseline, which the search did not draw
    repeats: str = ""  # trial_id of the search trial it repeats, with another seed, fold or schedule
    note: str = ""  # the role in words


@dataclass(frozen=True)
class TrialRecord:
    """One line of trials.jsonl, written when a trial starts and again when it ends."""

    trial_id: str  # the run's id; soups and students have their own
    config: TrialConfig
    state: State
    epochs_run: int
    value: float | None  # metric on val (a fold's: on the fold) at the best epoch; if pruned, at the last
    seconds: float
    reason: str  # why it ended, in words
    cause: Cause | None = None  # of a failure
    cut_short: bool = False  # complete, but ended early for lack of time; the same run may train longer
    stage: str = "search"  # "search", "confirm", "retrain", "fold", "soup", "student", "stop_check", ...
    baseline: bool = False  # as in `Role`
    repeats: str = ""  # as in `Role`
    ingredients: tuple[str, ...] = ()  # a soup's trial_ids
    note: str = ""  # as in `Role`
    at: float = 0.0  # end of the trial, in seconds since its stage began, summed over all commands
    origin: Origin = field(default_factory=Origin)
    curve: tuple[EpochMetrics, ...] = ()

    @property
    def run(self) -> Run:
        return Run(self.config, self.origin)

    @property
    def diverged(self) -> bool:
        return self.cause is Cause.DIVERGED

    @property
    def resumable(self) -> bool:
        """Whether `--resume` runs it again, because it was interrupted or lost its machine."""
        return self.state in NOT_ENDED or self.cause is Cause.MACHINE

    @property
    def best_epoch(self) -> EpochMetrics | None:
        """The epoch that `value` is of; None if the record has no curve or no value.

        If several epochs have the value, the one with the lowest log loss, which `fit` keeps.
        """
        if not self.curve or self.value is None:
            return None
        if self.state is not State.COMPLETE or self.origin.keeps_last_epoch:
            return self.curve[-1]
        value = self.value
        return min(self.curve, key=lambda epoch: (abs(epoch.value - value), epoch.val_loss))

    @property
    def microbatches(self) -> int:
        """Into how many parts a batch was split, as memory did not hold it; BatchNorm saw one at a time."""
        return max((epoch.microbatches for epoch in self.curve), default=1)

    @property
    def log_loss(self) -> float:
        """The log loss on val that goes with `value`, which breaks ties; infinite if unknown."""
        best = self.best_epoch
        return best.val_loss if best and math.isfinite(best.val_loss) else math.inf

    def to_json(self) -> str:
        """One line, without the newline."""
        return json.dumps(json_ready(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> TrialRecord:
        """Raises ValueError for a line that is no record."""
        try:
            values = json.loads(line)
            if wrong := other_kind(values, _KINDS):
                raise ValueError(f"no trial record: {wrong}")
            run = Run.from_dict({name: values.pop(name) for name in ("config", "origin")})
            cause = values.pop("cause")
            return cls(
                config=run.config,
                origin=run.origin,
                state=State(values.pop("state")),
                cause=None if cause is None else Cause(cause),
                curve=tuple(_epoch_metrics(epoch) for epoch in values.pop("curve")),
                ingredients=tuple(values.pop("ingredients")),
                **values,
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no trial record: {error}") from error


_VALUE = (*NUMBER, type(None))  # null: not finite
_EPOCH = dict.fromkeys(("train_loss", "val_loss", "val_accuracy", "value", "seconds"), _VALUE)
_KINDS: dict[str, Any] = {  # as in `other_kind`
    **dict.fromkeys(("trial_id", "reason", "stage", "repeats", "note"), str),
    **dict.fromkeys(("seconds", "at"), NUMBER),
    "epochs_run": int,
    "value": _VALUE,
    "ingredients": [str],
    "curve": [{"epoch": int, "microbatches": int, "ending": str, **_EPOCH}],
}


def _epoch_metrics(values: Mapping[str, Any]) -> EpochMetrics:
    """JSON has no NaN: null stands for a value that is not finite."""
    numbers: dict[str, Any] = {name: math.nan if value is None else value for name, value in values.items()}
    return EpochMetrics(**numbers)

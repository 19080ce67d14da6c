"""Schedules for training a trial's configuration again, and how many of them fit the time that is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from carmodels.catalog import UNFREEZE
from carmodels.records import TrialRecord
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.run import Run
from tune.budget.costs import RERUN_MARGIN, Costs, cost_ratio, rerun_seconds
from tune.runtime.job import Job

RETRAIN_EPOCHS_RATIO = 2.0  # of a trial's epochs, if time allows: +5.9 points in results/final/NOTES.md
MIN_EPOCHS_RATIO = 0.5  # of a schedule's epochs: no shorter one is started
HEAD_FIELDS = {"head", "head_depth"}  # changing these makes a trial's weights unusable

# Unfreezing: the head keeps its learning rate. The ratio is half the rate from group to group of MobileNetV2,
# which has eight groups and was measured (results/final/NOTES.md).
UNFROZEN: Mapping[str, Any] = {"unfreeze": "full", "lr_ratio": 0.004}


@dataclass(frozen=True)
class RetrainOptions:
    """How to train a configuration of the search again."""

    epochs: int | None = None  # of a new model; None: up to RETRAIN_EPOCHS_RATIO times the trial's, as fits
    changes: Mapping[str, Any] = field(default_factory=dict)  # fields of TrialConfig with their new values
    must_continue: bool = False  # always start from the trial's weights, with `epochs` too; else an error
    space_epochs: int = 0  # of the study's space; trials shortened for lack of time have fewer; 0: unknown

    def for_study(self, study: Study) -> RetrainOptions:
        """The same options with the epochs of the study's space."""
        return replace(self, space_epochs=epochs_of_space(study))

    def candidate_runs(self, run: Run, parents: Sequence[str]) -> list[Run]:
        """Possible runs, longest first; they continue from the first of `parents` (trial ids) if allowed."""
        if parents and (self.must_continue or not (self.epochs or self.changes.keys() & HEAD_FIELDS)):
            return self.continued_runs(run, parents[0])
        return self.new_model_runs(run)

    def continued_runs(self, run: Run, parent: str) -> list[Run]:
        """Runs that start from the weights of trial `parent` with nothing frozen, longest first.

        One for every length down to the trial's, because each additional epoch helps.
        """
        usual = max(run.config.epochs, self.space_epochs)
        lengths = [self.epochs] if self.epochs else range(round(RETRAIN_EPOCHS_RATIO * usual), usual - 1, -1)
        config = replace(self._unfrozen(run.config), **{"unfreeze": "full", **self.changes})
        template = replace(run, config=config).with_origin(continues=parent)
        return [template.with_config(epochs=epochs) for epochs in lengths]

    def new_model_runs(self, run: Run) -> list[Run]:
        """Runs of new models, longest first; ValueError for a change that does not fit the configuration."""
        usual = {max(run.config.epochs, self.space_epochs), run.config.epochs}  # equal for most trials
        longer = {round(RETRAIN_EPOCHS_RATIO * epochs) for epochs in usual}
        lengths = {self.epochs} if self.epochs else usual | longer
        template = replace(run, config=replace(self._unfrozen(run.config), **self.changes))
        return [template.with_config(epochs=epochs) for epochs in sorted(lengths, reverse=True)]

    def _unfrozen(self, config: TrialConfig) -> TrialConfig:
        return config if self.changes.get("unfreeze") == "frozen" else unfrozen(config)


DEFAULT_OPTIONS = RetrainOptions()


def epochs_of_space(study: Study) -> int:
    """Epochs of a trial of the study's space (the baseline may have fewer); 0 if the space is unknown."""
    space = study.space
    return int(space.fixed.get("epochs", 0)) if space else 0


def _frozen(config: TrialConfig) -> bool:
    return UNFREEZE[config.unfreeze].head_only_epochs is None


def unfrozen(config: TrialConfig) -> TrialConfig:
    """The configuration with a trainable backbone.

    Frozen backbones win when trials are short; unfreezing them gains ten points (results/final/NOTES.md).
    """
    return replace(config, **UNFROZEN) if _frozen(config) else config


def min_epochs(epochs: int) -> int:
    """The shortest schedule, in epochs, that may replace one of `epochs`."""
    return max(2, int(MIN_EPOCHS_RATIO * epochs))


@dataclass(frozen=True)
class TimeBudget:
    """Time left for training, and how to estimate the time of a run."""

    seconds_left: float
    workers: int
    costs: Costs | None = None
    packed: bool = False  # whether trials of the search shared GPUs

    @classmethod
    def until(cls, end: float, job: Job) -> TimeBudget:
        """The time from now until `end`, in steady_time()."""
        return cls(max(0.0, end - steady_time()), job.workers.count, job.costs, bool(job.workers.packed))

    def training_seconds(self, record: TrialRecord, config: TrialConfig, image_ratio: float = 1.0) -> float:
        """Estimated seconds of training `config`, on `image_ratio` times as many images as the trial.

        The trial's own speed is the measure, unless its backbone was frozen and no longer is, or it shared a
        GPU: then the measured costs are.
        """
        if self.costs and (self.packed or (_frozen(record.config) and not _frozen(config))):
            return image_ratio * RERUN_MARGIN * self.costs.schedule(config)
        return rerun_seconds(record) * cost_ratio(config, record.config, image_ratio)

    def fitting_runs(
        self, record: TrialRecord, config: TrialConfig, runs: int, image_ratio: float = 1.0
    ) -> tuple[int, int]:
        """(number of runs that fit, epochs of each): full schedules if one fits, else shorter ones."""
        per_epoch = self.training_seconds(record, config, image_ratio) / config.epochs
        if math.isinf(self.seconds_left) or per_epoch <= 0:
            return runs, config.epochs
        rounds = int(self.seconds_left / (per_epoch * config.epochs))
        if rounds:
            return min(runs, rounds * self.workers), config.epochs
        shorter = int(self.seconds_left / per_epoch)
        return (min(runs, self.workers), shorter) if shorter >= min_epochs(config.epochs) else (0, 0)

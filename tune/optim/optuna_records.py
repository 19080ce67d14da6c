"""Configurations and trial records as Optuna keeps them; the only place that converts between the two."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from carmodels.records import Status, TrialRecord
from carmodels.space import Choice, Dimension, Space


def useful(records: Iterable[TrialRecord], space: Space) -> list[optuna.trial.FrozenTrial]:
    """Those that the space could have drawn, whatever their epochs, with epochs counted as in this space."""
    epochs = int(space.fixed["epochs"])
    trials = []
    for record in records:
        config = replace(record.config, epochs=epochs)
        scaled = [replace(e, epoch=math.ceil(e.epoch * epochs / record.config.epochs)) for e in record.curve]
        if trial := learned(replace(record, config=config, curve=tuple(scaled)), space):
            trials.append(trial)
    return trials


def learned(record: TrialRecord, space: Space) -> optuna.trial.FrozenTrial | None:
    """A record as Optuna keeps trials; None where the space could not have drawn it or it is to run again."""
    params = space.params(record.config)
    if params is None or record.status not in _STATES:
        return None
    values = {e.epoch: e.value for e in record.curve}
    if record.status is Status.DIVERGED:
        values[max(values, default=1)] = math.nan
    return optuna.trial.create_trial(
        state=_STATES[record.status],
        value=_told(record),
        params=params,
        distributions={name: distribution(space.dimensions[name]) for name in params},
        intermediate_values=values,
    )


_STATES = {
    Status.FINISHED: TrialState.COMPLETE,
    Status.DIVERGED: TrialState.COMPLETE,
    Status.STOPPED: TrialState.PRUNED,
    Status.FAILED: TrialState.FAIL,
}


def _told(record: TrialRecord) -> float | None:
    """The value Optuna hears: for a diverged trial the worst there is, which its last epoch carries."""
    if _STATES[record.status] is not TrialState.COMPLETE:
        return None
    return record.curve[-1].value if record.value is None and record.curve else record.value


def distribution(dimension: Dimension) -> BaseDistribution:
    """A dimension in Optuna's terms, as `carmodels.space.suggest` draws it."""
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.options)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)

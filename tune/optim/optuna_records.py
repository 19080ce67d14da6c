"""Converts spaces and trial records to Optuna and back. No other module does."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from carmodels.records import State, TrialRecord
from carmodels.space import Choice, Dimension, Space
from carmodels.training.config import TrialConfig

CAUSE = "cause"  # user attribute of a trial of Optuna's that failed: a `Cause`


def transferable_trials(records: Iterable[TrialRecord], space: Space) -> list[optuna.trial.FrozenTrial]:
    """Trials of another study that this space can draw, their epochs rescaled to this space's schedule."""
    epochs = int(space.fixed["epochs"])
    trials = []
    for record in records:
        config = replace(record.config, epochs=epochs)
        curve = [replace(e, epoch=math.ceil(e.epoch * epochs / record.config.epochs)) for e in record.curve]
        if trial := frozen_trial(replace(record, config=config, curve=tuple(curve)), space):
            trials.append(trial)
    return trials


def frozen_trial(record: TrialRecord, space: Space) -> optuna.trial.FrozenTrial | None:
    """The record as a trial for a study; None if the space cannot draw it or it will run again.

    A diverged trial is complete with the worst value, so that the sampler learns to avoid it. Any other
    failure has its `cause` as a user attribute: the sampler avoids those for want of memory.
    """
    params, state = params_of(record.config, space), _trial_state(record)
    if params is None or state is None:
        return None
    values = {e.epoch: e.value for e in record.curve}
    if record.diverged:
        values[max(values, default=1)] = math.nan
    return optuna.trial.create_trial(
        state=state,
        value=_final_value(record) if state is TrialState.COMPLETE else None,
        params=params,
        distributions={name: distribution(space.dimensions[name]) for name in params},
        intermediate_values=values,
        user_attrs={CAUSE: str(record.cause)} if state is TrialState.FAIL else None,
    )


def _trial_state(record: TrialRecord) -> TrialState | None:
    if record.resumable:
        return None
    if record.state is State.COMPLETE or record.diverged:
        return TrialState.COMPLETE
    return TrialState.FAIL if record.state is State.FAILED else TrialState.PRUNED


def _final_value(record: TrialRecord) -> float | None:
    """The best value; of a diverged trial the last epoch's, which is the metric's worst."""
    return record.curve[-1].value if record.value is None and record.curve else record.value


def distribution(dimension: Dimension) -> BaseDistribution:
    """The Optuna distribution that `suggest` draws a dimension from."""
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.options)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


class ParamSuggester(Protocol):
    """The part of `optuna.Trial` that `suggest` needs."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


def suggest(trial: ParamSuggester, space: Space) -> dict[str, Any]:
    """Draws a configuration: the space's fixed fields and each dimension whose condition holds."""
    values: dict[str, Any] = dict(space.fixed)
    for name, dimension in space.dimensions.items():
        if dimension.when is not None and values.get(dimension.when[0]) not in dimension.when[1]:
            continue
        if isinstance(dimension, Choice):
            values[name] = trial.suggest_categorical(name, dimension.options)
        else:
            values[name] = trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
    return space.fitted(values)


def params_of(config: TrialConfig, space: Space) -> dict[str, Any] | None:
    """The dimensions' values in a configuration; None if the space cannot draw it."""
    params = space.params(config)
    within = all(_contains(space.dimensions[name], value) for name, value in params.items())
    return params if within and config == space.config({**space.fixed, **params}) else None


def _contains(dimension: Dimension, value: Any) -> bool:
    if isinstance(dimension, Choice):
        return value in dimension.options
    return dimension.low <= value <= dimension.high

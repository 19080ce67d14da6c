"""Configurations and trial records as Optuna keeps them; the only place that converts between the two."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from carmodels.records import Cause, State, TrialRecord
from carmodels.space import Choice, Dimension, Space
from carmodels.training.config import TrialConfig


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
    params, state = params_of(record.config, space), optuna_state(record)
    if params is None or state is None:
        return None
    values = {e.epoch: e.value for e in record.curve}
    if record.diverged:
        values[max(values, default=1)] = math.nan
    return optuna.trial.create_trial(
        state=state,
        value=_observed(record) if state is TrialState.COMPLETE else None,
        params=params,
        distributions={name: distribution(space.dimensions[name]) for name in params},
        intermediate_values=values,
    )


def optuna_state(record: TrialRecord) -> TrialState | None:
    """How Optuna is told that a trial ended; None for one that is to run again.

    A diverged trial is complete with the worst value, so that the sampler learns to avoid it.
    """
    if record.resumable:
        return None
    if record.state is State.COMPLETE or record.cause is Cause.DIVERGED:
        return TrialState.COMPLETE
    return TrialState.FAIL if record.state is State.FAILED else TrialState.PRUNED


def _observed(record: TrialRecord) -> float | None:
    """The value Optuna is told; of a diverged trial its last epoch's, the worst there is."""
    return record.curve[-1].value if record.value is None and record.curve else record.value


def distribution(dimension: Dimension) -> BaseDistribution:
    """A dimension in Optuna's terms, as `suggest` draws it."""
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.options)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


class ParamSuggester(Protocol):
    """The part of an Optuna trial that a draw needs."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


def suggest(trial: ParamSuggester, space: Space) -> dict[str, Any]:
    """Draw a configuration's fields; a dimension whose condition does not hold is not drawn.

    Returns the fixed values; with Ray's OptunaSearch the drawn ones are added by it.
    """
    values: dict[str, Any] = dict(space.fixed)
    for name, dimension in space.dimensions.items():
        if dimension.when is not None and values.get(dimension.when[0]) not in dimension.when[1]:
            continue
        if isinstance(dimension, Choice):
            values[name] = trial.suggest_categorical(name, dimension.options)
        else:
            values[name] = trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
    return values


def params_of(config: TrialConfig, space: Space) -> dict[str, Any] | None:
    """The parameters of the draw that gave a configuration; None where the space cannot have drawn it."""
    values = vars(config)
    params = {name: values[name] for name in space.active_dimensions(values)}
    within = all(_holds(space.dimensions[name], value) for name, value in params.items())
    return params if within and config == TrialConfig(**{**space.fixed, **params}) else None


def _holds(dimension: Dimension, value: Any) -> bool:
    if isinstance(dimension, Choice):
        return value in dimension.options
    return dimension.low <= value <= dimension.high

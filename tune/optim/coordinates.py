"""Configurations as coordinates, and a prior for which of them fine-tune well."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from statistics import median
from typing import Any

import numpy as np

from carmodels.catalog import UNFREEZE
from carmodels.models.facts import facts_of
from carmodels.models.parameter_groups import trainable_groups
from carmodels.presets import SPACES
from carmodels.space import Choice, Dimension, Range, Space
from carmodels.training.config import TrialConfig

# Dimensions that rarely matter: their kernel lengths have a larger prior mean.
_MINOR = ("head_depth", "dropout", "augment", "label_smoothing", "mixup", "cutmix", "ema", "weight_decay")
_LENGTH_SHIFT = 1.0
_GROUPS = 16  # about as many layer groups as a backbone has
_MIDDLE = 0.5  # the coordinate of a dimension that is not drawn
_BEND, _TILT = 2.0, 1.5  # scales of the trends along learning rates (results/search/NOTES.md)
_DEFAULTS = {field.name: field.default for field in fields(TrialConfig)}


class Coordinates:
    """Encodes the configurations of a space: a coordinate for each dimension and three derived ones.

    A coordinate lies in [0, 1], or is the option's index if the options have no order. The derived ones are
    the backbone's size (log of its parameters), the trainable share of the backbone (mean over the schedule)
    and the backbone's learning rate (log of lr times the mean ratio over the layers). Through them, trials
    of one backbone or strategy also inform similar ones.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        dimensions = space.dimensions
        self._sizes = _Span(*_extremes([math.log(facts_of(b).millions) for b in space.backbones]))
        rates, ratios = _bounds(space, "lr"), _bounds(space, "lr_ratio")
        self._rates = _Span(*(math.log(r * _mean_ratio(d)) for r, d in zip(rates, ratios, strict=True)))
        names = list(dimensions)
        extra = ["size", "trainable", "rate"]
        self.categorical = np.array([not is_ordered(d) for d in dimensions.values()] + [False] * len(extra))
        self.length_shift = np.array([_LENGTH_SHIFT * (name in _MINOR) for name in names + extra])
        self._rising = np.array([n in ("image_size", "size", "trainable") for n in names + extra])
        ranges = {n for n in ("lr", "lr_ratio") if isinstance(dimensions.get(n), Range)}
        inside = {"rate"} | (ranges if len(ranges) == 2 else set())  # a single range adds nothing to rate
        self._inside = np.array([n in inside for n in names + extra])
        low, high = _expected_rates(space, *rates)
        expected = [math.log(r * _mean_ratio(d)) for r, d in zip((low, high), ratios, strict=True)]
        lr = dimensions.get("lr")
        centres = {
            "rate": self._rates.to_unit(sum(expected) / 2),
            "lr": to_unit(lr, math.sqrt(low * high)) if isinstance(lr, Range) else _MIDDLE,
        }
        self._centres = np.array([centres.get(n, _MIDDLE) for n in names + extra if n in inside])
        counts = [self._rising.sum(), len(inside), len(inside)]
        self.coefficients = np.repeat([1.0, 1.0, 0.0], counts)  # (T,) prior means of the trends' coefficients

    def encode(self, config: TrialConfig) -> np.ndarray:
        """(D,) coordinates of a configuration; 0.5 for a dimension that is not drawn."""
        values = vars(config)
        drawn = self._space.active_dimensions(values)
        x = [to_unit(d, values[n]) if n in drawn else _MIDDLE for n, d in self._space.dimensions.items()]
        trainable = _trainable_share(config.unfreeze, config.epochs)
        rate = math.log(config.lr * _mean_ratio(config.lr_ratio))
        x.append(self._sizes.to_unit(math.log(facts_of(config.backbone).millions)))
        x.append(trainable)
        x.append(self._rates.to_unit(rate) if trainable else _MIDDLE)
        return np.array(x)

    def trends(self, x: np.ndarray) -> np.ndarray:
        """(N, D) coordinates -> (N, T) trends of the prior mean, in standard deviations of the metric.

        Larger backbones, larger images and a larger trainable share are better: a line each. The best
        learning rate and ratio lie inside their ranges, around the range of the preset for backbones
        of this size: for each a parabola, and a line whose coefficient has the prior mean 0. Every trend has
        the mean 0 over its coordinate.
        """
        inside = x[:, self._inside]
        bend = 1 / 12 + (self._centres - _MIDDLE) ** 2 - (inside - self._centres) ** 2
        return np.column_stack([x[:, self._rising] - _MIDDLE, _BEND * bend, _TILT * (inside - _MIDDLE)])


class _Span:
    """The range of a quantity."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high

    def to_unit(self, value: float) -> float:
        """0 at the low end, 1 at the high end; 0.5 if the two are equal."""
        return (value - self._low) / (self._high - self._low) if self._high > self._low else _MIDDLE


def to_unit(dimension: Dimension, value: Any) -> float:
    """The value's coordinate in [0, 1]; the option's index if the options have no order."""
    if isinstance(dimension, Choice) and not is_ordered(dimension):
        return float(dimension.options.index(value))
    if isinstance(dimension, Choice):
        low, high = _extremes(dimension.options)
        log = low > 0
    else:
        low, high, log = dimension.low, dimension.high, dimension.log
    if log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return _Span(low, high).to_unit(value)


def from_unit(dimension: Range, unit: float) -> float:
    """The value at a coordinate, on the range's own scale; beyond the range outside [0, 1]."""
    low, high = dimension.low, dimension.high
    return low * (high / low) ** unit if dimension.log else low + (high - low) * unit


def is_ordered(dimension: Dimension) -> bool:
    """Whether its values are numbers."""
    return isinstance(dimension, Range) or all(
        isinstance(o, int | float) and not isinstance(o, bool) for o in dimension.options
    )


def _expected_rates(space: Space, low: float, high: float) -> tuple[float, float]:
    """The overlap of [low, high] with the preset of the most similar backbone sizes; all of it if none."""

    def size(some: Space) -> float:
        return math.log(median(facts_of(name).millions for name in some.backbones))

    usual = _bounds(min(SPACES.values(), key=lambda preset: abs(size(preset) - size(space))), "lr")
    overlap = max(low, usual[0]), min(high, usual[1])
    return overlap if overlap[0] < overlap[1] else (low, high)


def _extremes(values: Any) -> tuple[float, float]:
    return min(values), max(values)


def _bounds(space: Space, name: str) -> tuple[float, float]:
    """The smallest and the largest value of a field in the space."""
    dimension = space.dimensions.get(name)
    if isinstance(dimension, Range):
        return dimension.low, dimension.high
    options = dimension.options if dimension else (space.fixed.get(name, _DEFAULTS[name]),)
    return _extremes(options)


def _mean_ratio(lr_ratio: float) -> float:
    """Mean learning rate over the backbone's layer groups, relative to the head's."""
    return float(np.mean(lr_ratio ** (np.arange(1, _GROUPS + 1) / _GROUPS)))


@cache
def _trainable_share(unfreeze: str, epochs: int) -> float:
    """The trainable share of the backbone, mean over the schedule."""
    numbers = range(1, epochs + 1)
    trainable = [
        trainable_groups(UNFREEZE[unfreeze], epoch=n, epochs=epochs, groups=_GROUPS) for n in numbers
    ]
    return sum(trainable) / (_GROUPS * epochs)

"""Configurations as points, and what is known of fine-tuning before any trial has run."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from statistics import median
from typing import Any

import numpy as np

from carmodels.catalog import BACKBONES, UNFREEZE
from carmodels.models.parameter_groups import trainable_groups
from carmodels.presets import SPACES
from carmodels.space import Choice, Dimension, Range, Space
from carmodels.training.config import TrialConfig

# Dimensions that seldom decide: their lengths are expected to be longer.
MINOR = ("head_depth", "dropout", "augment", "label_smoothing", "mixup", "cutmix", "ema", "weight_decay")
_LONGER = 1.0
_GROUPS = 16  # about as many layer groups as a backbone has
_MIDDLE = 0.5  # where a coordinate has no say
_BEND, _TILT = 2.0, 1.5  # of what is expected along a rate: results/search/NOTES.md
_DEFAULTS = {field.name: field.default for field in fields(TrialConfig)}


class Coordinates:
    """A space's dimensions, each from 0 to 1 or an option's number, and three that follow from them.

    Those are the backbone's size (logarithm of its parameters), the share of the backbone that learns over
    the schedule, and the rate at which it does: the learning rate, times its mean decay over the layers.
    They let what one backbone or strategy teaches count for its like.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        dimensions = space.dimensions
        self._sizes = _Span(*_extremes([math.log(BACKBONES[b].millions) for b in space.backbones]))
        rates, decays = _bounds(space, "lr"), _bounds(space, "layer_decay")
        self._rates = _Span(*(math.log(r * _reach(d)) for r, d in zip(rates, decays, strict=True)))
        names = list(dimensions)
        extra = ["size", "learning", "rate"]
        self.categorical = np.array([not _ordered(d) for d in dimensions.values()] + [False] * len(extra))
        self.longer = np.array([_LONGER * (name in MINOR) for name in names + extra])
        self._rising = np.array([n in ("image_size", "size", "learning") for n in names + extra])
        ranges = {n for n in ("lr", "layer_decay") if isinstance(dimensions.get(n), Range)}
        inside = {"rate"} | (ranges if len(ranges) == 2 else set())  # of one range, rate says it all
        self._inside = np.array([n in inside for n in names + extra])
        low, high = _expected_rates(space, *rates)
        of_rate = [math.log(r * _reach(d)) for r, d in zip((low, high), decays, strict=True)]
        own = dimensions.get("lr")
        centres = {
            "rate": self._rates.place(sum(of_rate) / 2),
            "lr": place(own, math.sqrt(low * high)) if isinstance(own, Range) else _MIDDLE,
        }
        self._centres = np.array([centres.get(n, _MIDDLE) for n in names + extra if n in inside])
        counts = [self._rising.sum(), len(inside), len(inside)]
        self.coefficients = np.repeat([1.0, 1.0, 0.0], counts)  # (T,) expected of trends

    def of(self, config: TrialConfig) -> np.ndarray:
        """(D,) the place of a configuration of the space; in the middle where a dimension is not drawn."""
        values = vars(config)
        drawn = self._space.active_dimensions(values)
        places = [place(d, values[n]) if n in drawn else _MIDDLE for n, d in self._space.dimensions.items()]
        learning = _learning(config.unfreeze, config.epochs)
        rate = math.log(config.lr * _reach(config.layer_decay))
        places.append(self._sizes.place(math.log(BACKBONES[config.backbone].millions)))
        places.append(learning)
        places.append(self._rates.place(rate) if learning else _MIDDLE)
        return np.array(places)

    def trends(self, x: np.ndarray) -> np.ndarray:
        """(N, D) places -> (N, T): what is expected of them beforehand, in standard deviations, by cause.

        Larger networks and images are better, as is letting the backbone learn. Of learning rates and their
        decay over the layers the best lies inside the range, or the part of it that a preset for networks of
        such size has, where exactly being open: a bend down to the ends, and a tilt, whose coefficient may as
        well be below 0. Each has the mean 0 over its coordinate.
        """
        inside = x[:, self._inside]
        bend = 1 / 12 + (self._centres - _MIDDLE) ** 2 - (inside - self._centres) ** 2
        return np.column_stack([x[:, self._rising] - _MIDDLE, _BEND * bend, _TILT * (inside - _MIDDLE)])


class _Span:
    """From where to where a quantity goes."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high

    def place(self, value: float) -> float:
        """From 0 at the lowest to 1 at the highest; in the middle where there is but one."""
        return (value - self._low) / (self._high - self._low) if self._high > self._low else _MIDDLE


def place(dimension: Dimension, value: Any) -> float:
    """Where from 0 to 1 a value lies in its dimension; an option's number where options have no order."""
    if isinstance(dimension, Choice) and not _ordered(dimension):
        return float(dimension.options.index(value))
    if isinstance(dimension, Choice):
        low, high = _extremes(dimension.options)
        log = low > 0
    else:
        low, high, log = dimension.low, dimension.high, dimension.log
    if log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return _Span(low, high).place(value)


def value_at(dimension: Range, share: float) -> float:
    """The number at a place from 0 to 1, to four digits."""
    if dimension.log:
        value = dimension.low * (dimension.high / dimension.low) ** share
    else:
        value = dimension.low + (dimension.high - dimension.low) * share
    return min(max(float(f"{value:.4g}"), dimension.low), dimension.high)


def _ordered(dimension: Dimension) -> bool:
    return isinstance(dimension, Range) or all(
        isinstance(o, int | float) and not isinstance(o, bool) for o in dimension.options
    )


def _expected_rates(space: Space, low: float, high: float) -> tuple[float, float]:
    """The part from `low` to `high` that the preset with networks of most alike size has, too; else all."""

    def size(of: Space) -> float:
        return math.log(median(BACKBONES[name].millions for name in of.backbones))

    usual = _bounds(min(SPACES.values(), key=lambda preset: abs(size(preset) - size(space))), "lr")
    part = max(low, usual[0]), min(high, usual[1])
    return part if part[0] < part[1] else (low, high)


def _extremes(values: Any) -> tuple[float, float]:
    return min(values), max(values)


def _bounds(space: Space, name: str) -> tuple[float, float]:
    """The least and the greatest value that a configuration of the space can have."""
    dimension = space.dimensions.get(name)
    if isinstance(dimension, Range):
        return dimension.low, dimension.high
    options = dimension.options if dimension else (space.fixed.get(name, _DEFAULTS[name]),)
    return _extremes(options)


def _reach(layer_decay: float) -> float:
    """The mean over the layers of what decay leaves of the head's learning rate."""
    return float(np.mean(layer_decay ** np.arange(1, _GROUPS + 1)))


@cache
def _learning(unfreeze: str, epochs: int) -> float:
    """The share of the backbone that learns, a mean over the schedule."""
    numbers = range(1, epochs + 1)
    opened = [trainable_groups(UNFREEZE[unfreeze], epoch=n, epochs=epochs, groups=_GROUPS) for n in numbers]
    return sum(opened) / (_GROUPS * epochs)

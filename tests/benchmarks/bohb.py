"""BOHB (Falkner et al., 2018) as Ray puts it together, over our `Space`; needs hpbandster and ConfigSpace."""

from __future__ import annotations

import logging
from typing import Any

from ray.tune.schedulers import HyperBandForBOHB, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.bohb import TuneBOHB, bohb_search

from carmodels.space import Choice, Space
from carmodels.training.config import TrialConfig

logging.getLogger("hpbandster").setLevel(logging.ERROR)  # it warns of every draw its densities are nan at
INSTALLED = bohb_search.BOHB is not None  # Ray imports both packages, or neither


class SpaceBOHB(TuneBOHB):
    """TuneBOHB over a `Space`; like `suggest`, it gives the fixed values and those of the drawn dimensions.

    Choices are drawn by their place: ConfigSpace would give NumPy's types, and sort some.
    """

    def __init__(self, space: Space, **options: Any) -> None:
        super().__init__(config_space(space), **options)
        self._dimensions = space

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if (drawn := super().suggest(trial_id)) is None:
            return None
        values = dict(self._dimensions.fixed)
        for name, value in drawn.items():
            dimension = self._dimensions.dimensions[name]
            values[name] = dimension.options[value] if isinstance(dimension, Choice) else float(value)
        return values


def config_space(space: Space) -> Any:
    """The ConfigSpace of the same dimensions, with their conditions; choices stand for their places."""
    import ConfigSpace

    found = ConfigSpace.ConfigurationSpace()
    for name, dimension in space.dimensions.items():
        if isinstance(dimension, Choice):
            places = list(range(len(dimension.options)))
            found.add(ConfigSpace.CategoricalHyperparameter(name, places))
        else:
            low, high = dimension.low, dimension.high
            found.add(ConfigSpace.UniformFloatHyperparameter(name, low, high, log=dimension.log))
        if dimension.when is not None:
            parent, wanted = dimension.when
            chosen = space.dimensions[parent]
            assert isinstance(chosen, Choice)
            places = [place for place, value in enumerate(chosen.options) if value in wanted]
            found.add(ConfigSpace.InCondition(found[name], found[parent], places))
    return found


def check_draws(space: Space) -> None:
    """Draw 50 configurations and report values. AssertionError if one is not of the space.

    The benchmark runs this first: the tests cannot, as hpbandster's last release is of 2018.
    """
    searcher = SpaceBOHB(space, metric="accuracy", mode="max", seed=0)
    for number in range(50):
        values = searcher.suggest(str(number))
        assert values is not None, number
        config = TrialConfig.from_dict(values)
        assert set(values) == {*space.fixed, *space.active_dimensions(values)}, values
        result = {"accuracy": config.lr, "hyperband_info": {"budget": 2}}
        searcher.on_trial_result(str(number), result)
    assert searcher.bohber.kde_models


def bohb(
    space: Space, *, metric: str, epochs: int, workers: int, seed: int
) -> tuple[Searcher, TrialScheduler]:
    """Searcher and scheduler; new trials only while fewer than `workers` run, paused ones not counted."""
    searcher = SpaceBOHB(space, metric=metric, mode="max", seed=seed, max_concurrent=workers)
    return searcher, HyperBandForBOHB(time_attr="epoch", metric=metric, mode="max", max_t=epochs)

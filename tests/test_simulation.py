"""The simulated search keeps time, workers and budget as a real one, and heeds the scheduler."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from carmodels.space import TrialConfig
from tune.searcher import Queue

CONFIG = TrialConfig("mobilenetv2_035", image_size=64, epochs=4)


class Fixed:
    """A surrogate: a second an epoch, twice that at 128 px, accuracy grows by the learning rate."""

    curves = SimpleNamespace(fills={("mobilenetv2_035", 64): 10.0})

    def of(self, config: TrialConfig) -> tuple[np.ndarray, np.ndarray]:
        seconds = np.full(config.epochs, config.image_size / 64)
        return config.lr * np.arange(1, config.epochs + 1), seconds

    def sample(self, mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return mean


@pytest.fixture
def simulation() -> Iterator[Any]:
    folder = str(Path(__file__).with_name("benchmarks"))
    sys.path.insert(0, folder)
    import simulation

    yield simulation
    sys.path.remove(folder)


def run(simulation: Any, configs: list[TrialConfig], scheduler: Any, budget: float = 100.0) -> list[Any]:
    return simulation.simulate(
        Queue(configs, metric="accuracy", mode="max"),
        scheduler,
        Fixed(),
        stamp={},
        metric="accuracy",
        budget=budget,
        workers=2,
        seed=0,
        clock=simulation.Clock(),
    )


def changed(**values: Any) -> TrialConfig:
    return TrialConfig.from_dict({**CONFIG.__dict__, **values})


def test_two_workers_take_turns_as_they_are_free(simulation: Any) -> None:
    seen = run(simulation, [changed(image_size=128), CONFIG, changed(lr=0.1)], FIFOScheduler())
    assert [(s.at, s.trial) for s in seen if s.finished] == [(4.0, 1), (8.0, 0), (8.0, 2)]
    assert [s.at for s in seen] == sorted(s.at for s in seen)
    assert len(seen) == 12
    assert all(s.value == s.mean for s in seen)


def test_nothing_is_seen_after_the_budget(simulation: Any) -> None:
    seen = run(simulation, [CONFIG, CONFIG], FIFOScheduler(), budget=2.5)
    assert [s.at for s in seen] == [1.0, 1.0, 2.0, 2.0]


def test_outputs_of_a_frozen_backbone_are_stored_once_for_each_view(simulation: Any) -> None:
    frozen = changed(unfreeze="frozen")
    seen = run(simulation, [frozen, changed(unfreeze="frozen", lr=0.1)], FIFOScheduler())
    ends = [s.at for s in seen if s.finished]
    assert sum(ends) == 8 * 1.0 + 4 * 10.0  # eight epochs and four views, whichever trial needs one first


def test_a_trial_that_the_scheduler_stops_makes_room_for_the_next(simulation: Any) -> None:
    def asha() -> AsyncHyperBandScheduler:
        return AsyncHyperBandScheduler(
            time_attr="epoch", metric="accuracy", mode="max", max_t=4, grace_period=1, reduction_factor=2
        )

    falling = [changed(lr=lr) for lr in (0.2, 0.1, 0.05, 0.02)]
    with_stops, without = run(simulation, falling, asha()), run(simulation, falling, FIFOScheduler())
    assert {s.trial for s in with_stops} == {s.trial for s in without} == {0, 1, 2, 3}
    assert len(with_stops) < len(without)
    assert with_stops[-1].at < without[-1].at
    assert max(s.value for s in with_stops if s.finished) == pytest.approx(0.8)

"""A plan knows what an epoch costs, shrinks what costs too much, and starts nothing that cannot end."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest

from carmodels.space import SPACES, TrialConfig, baseline
from tune.plan import FORWARD_SHARE, Costs, Plan, _alive

SPACE = SPACES["demo"]
COSTS = Costs({b: {32: 0.001, 96: 0.009} for b in SPACE.backbones}, train=700, val=100)
RECIPE = baseline(SPACE)  # 96 px, 8 epochs, the first two with the head alone


def plan(seconds: float, workers: int = 1) -> Plan:
    return Plan(COSTS, time.time() + seconds, workers)


def test_cost_between_two_measured_sizes_goes_with_the_area() -> None:
    assert COSTS.picture("test_resnet", 32) == pytest.approx(0.001)
    assert COSTS.picture("test_resnet", 64) == pytest.approx(
        0.001 + 0.008 * (64**2 - 32**2) / (96**2 - 32**2)
    )


@pytest.mark.parametrize(("strategy", "head_only"), [("frozen", 8), ("full", 0), ("once", 2), ("gradual", 1)])
def test_frozen_epochs_cost_a_forward_pass(strategy: str, head_only: int) -> None:
    config = replace(RECIPE, unfreeze=strategy)
    frozen, learning = 0.009 * FORWARD_SHARE * 800, 0.009 * (700 + FORWARD_SHARE * 100)
    assert COSTS.schedule(config) == pytest.approx(head_only * frozen + (8 - head_only) * learning)


def test_without_a_limit_on_time_everything_fits_unchanged() -> None:
    free = Plan(None, math.inf, 2)
    assert free.fits(RECIPE)
    assert free.affordable(RECIPE, SPACE.image_sizes, 0.2) == (RECIPE, "")


def test_a_trial_fits_where_its_whole_schedule_ends_in_time() -> None:
    cost = COSTS.schedule(RECIPE)
    assert plan(cost + 5).fits(RECIPE)
    assert not plan(cost - 5).fits(RECIPE)


def test_the_recipe_is_first_made_smaller_and_then_shorter_to_cost_its_share() -> None:
    whole, small = COSTS.schedule(RECIPE), COSTS.schedule(replace(RECIPE, image_size=32))
    assert plan(whole / 0.2 + 5).affordable(RECIPE, SPACE.image_sizes, 0.2) == (RECIPE, "")
    config, changed = plan(0.7 * whole / 0.2).affordable(RECIPE, SPACE.image_sizes, 0.2)
    assert (config.image_size, config.epochs) == (64, 8)
    assert changed == " at 64 instead of 96 px"
    config, changed = plan(0.5 * small / 0.2).affordable(RECIPE, SPACE.image_sizes, 0.2)
    assert config.image_size == 32
    assert 1 < config.epochs < 8
    assert changed == f" at 32 instead of 96 px for {config.epochs} instead of 8 epochs"
    assert COSTS.schedule(config) <= 0.5 * small
    assert plan(0).affordable(RECIPE, SPACE.image_sizes, 0.2)[0].epochs == 1


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
def test_however_many_workers_there_are_the_recipe_ends_in_time(workers: int) -> None:
    few = plan(0.9 * COSTS.schedule(RECIPE), workers)
    recipe, _ = few.affordable(RECIPE, SPACE.image_sizes, 0.2)
    assert few.fits(recipe)


def test_a_size_beyond_memory_does_not_fit_and_does_not_spoil_the_plan() -> None:
    tight = Costs({"test_resnet": {32: 0.001, 64: 0.004}, "test_efficientnet": {}}, train=700, val=100)
    assert math.isinf(tight.picture("test_resnet", 96))
    assert tight.picture("test_resnet", 48) < 0.004
    some = Plan(tight, time.time() + 1000, 1)
    assert not some.fits(RECIPE)
    assert some.affordable(RECIPE, SPACE.image_sizes, 0.9)[0].image_size == 64
    assert some.trials(SPACE, 3) > 0


def test_successive_halving_halves_after_the_grace_period() -> None:
    assert [_alive(epoch, 3) for epoch in range(1, 9)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_twice_the_workers_buy_twice_the_trials() -> None:
    one, two = plan(10_000).trials(SPACE, 3), plan(10_000, workers=2).trials(SPACE, 3)
    assert two == pytest.approx(2 * one, abs=1)
    mean = sum(COSTS.schedule(replace(RECIPE, image_size=s)) for s in SPACE.image_sizes) / 4
    assert one > 10_000 / mean  # stopping and frozen epochs save time


def test_a_space_of_one_size_needs_one_measurement() -> None:
    single = Costs({"test_resnet": {64: 0.002}}, train=10, val=10)
    assert single.picture("test_resnet", 64) == 0.002
    config = TrialConfig(backbone="test_resnet", image_size=64, epochs=1)
    assert single.schedule(config) == pytest.approx(0.002 * (10 + FORWARD_SHARE * 10))

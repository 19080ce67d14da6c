"""Places lie in [0, 1] for every configuration of every preset, and good practice is expected to be good."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import optuna
import pytest

from carmodels.presets import SPACES
from carmodels.space import Choice, Range, Space
from carmodels.training.config import TrialConfig
from tune.optim.coordinates import Coordinates, from_unit, to_unit
from tune.optim.optuna_records import suggest

CPU = SPACES["cpu"]
GOOD = TrialConfig("efficientnet_b0", image_size=192, epochs=8, unfreeze="full", lr=6e-3, lr_ratio=0.05)


def expected(config: TrialConfig, space: Space = CPU) -> float:
    coordinates = Coordinates(space)
    return float(coordinates.trends(coordinates.encode(config)[None])[0] @ coordinates.coefficients)


@pytest.mark.parametrize("preset", list(SPACES))
def test_every_draw_has_a_place(preset: str) -> None:
    space = SPACES[preset]
    coordinates = Coordinates(space)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    x = np.array([coordinates.encode(TrialConfig(**suggest(study.ask(), space))) for _ in range(300)])
    assert x.shape[1] == len(coordinates.categorical) == len(coordinates.length_shift)
    ordered = x[:, ~coordinates.categorical]
    assert ordered.min() >= 0
    assert ordered.max() <= 1
    assert (ordered.std(0) > 0.1).all()


@pytest.mark.parametrize(
    "worse",
    [
        {"backbone": "mobilenetv2_035"},
        {"image_size": 64},
        {"unfreeze": "frozen"},
        {"unfreeze": "gradual"},
        {"lr": 2e-2, "lr_ratio": 1.0},
        {"lr": 3e-4, "lr_ratio": 1e-3},
        {"lr": 2e-2, "lr_ratio": 1e-3},  # the rate of the backbone would be in the middle
    ],
)
def test_what_is_expected_to_be_worse(worse: dict[str, object]) -> None:
    assert expected(replace(GOOD, **worse)) < expected(GOOD) - 0.1  # type: ignore[arg-type]


def test_trends_have_no_level_and_leave_open_on_which_side_of_the_middle_rates_are_best() -> None:
    coordinates = Coordinates(CPU)
    x = np.random.default_rng(0).random((20_000, len(coordinates.categorical)))
    trends = coordinates.trends(x)
    assert abs(trends.mean(0)).max() < 0.02
    tilts = trends[:, coordinates.coefficients == 0]
    off = x[:, [*CPU.dimensions].index("lr")] - 0.5
    assert abs(np.corrcoef(tilts.T, off)[-1, :-1]).max() == pytest.approx(1)


@pytest.mark.parametrize("decay", ["lr_ratio=1.0", "lr_ratio=0.001:1.0"])
def test_of_a_wider_range_the_best_rate_is_expected_where_presets_have_theirs(decay: str) -> None:
    wide = CPU.with_override("lr=1e-6:2e-2").with_override(decay)
    rates = (1.4e-4, 2.4e-3)  # in the middle of it, and of the preset's
    middle, usual = (expected(replace(GOOD, lr=lr, lr_ratio=1.0), wide) for lr in rates)
    assert usual > middle + 0.1
    coordinates = Coordinates(wide)
    x = np.random.default_rng(0).random((20_000, len(coordinates.categorical)))
    assert abs(coordinates.trends(x).mean(0)).max() < 0.02
    large = SPACES["gpu"].with_override("lr=1e-6:2e-2").with_override("lr_ratio=1.0")
    config = replace(GOOD, image_size=224)
    at = [expected(replace(config, lr=lr, lr_ratio=1.0), large) for lr in (3e-5, 3e-4, 3e-3)]
    assert at[1] == max(at)
    apart = CPU.with_override("lr=1e-6:1e-4").with_override("lr_ratio=1.0")  # none of the preset's
    at = [expected(replace(GOOD, lr=lr, lr_ratio=1.0), apart) for lr in (1e-6, 1e-5, 1e-4)]
    assert at[1] == max(at)


@pytest.mark.parametrize("preset", SPACES)
def test_of_a_preset_the_best_rate_is_expected_in_its_middle(preset: str) -> None:
    assert pytest.approx(0.5) == Coordinates(SPACES[preset])._centres


@pytest.mark.parametrize("override", ["lr_ratio=1.0", "lr_ratio=0.05,0.2", "lr=1e-3", "lr=1e-3,1e-2"])
def test_of_a_single_range_of_rates_the_effect_is_expected_once(override: str) -> None:
    space = CPU.with_override(override)
    coordinates = Coordinates(space)
    assert (coordinates.coefficients == 0).sum() == 1
    assert coordinates.trends(np.full((1, len(coordinates.categorical)), 0.5)).shape == (1, 5)
    two = [replace(GOOD, lr_ratio=ratio, lr=1e-3) for ratio in (0.05, 0.2)]
    if override == "lr_ratio=0.05,0.2":
        assert abs(expected(two[0], space) - expected(two[1], space)) < 0.5


def test_what_seldom_matters_is_expected_to_matter_little() -> None:
    coordinates = Coordinates(CPU)
    names = [*CPU.dimensions, "size", "trainable", "rate"]
    longer = {n for n, shift in zip(names, coordinates.length_shift, strict=True) if shift}
    assert longer == {"head_depth", "dropout", "augment", "label_smoothing"}


def test_a_space_without_a_choice_of_backbone_or_rate_has_them_in_the_middle() -> None:
    space = Space({"dropout": Range(0.0, 0.5)}, {"backbone": "lcnet_050", "image_size": 64, "epochs": 2})
    x = Coordinates(space).encode(
        TrialConfig("lcnet_050", image_size=64, epochs=2, head_depth=1, dropout=0.5)
    )
    assert x.tolist() == [1.0, 0.5, 1.0, 0.5]


@pytest.mark.parametrize("log", [True, False])
def test_a_place_and_its_value_are_each_others_inverse(log: bool) -> None:
    dimension = Range(1e-3, 1.0, log=log)
    for share in (0.0, 0.3, 1.0):
        assert to_unit(dimension, from_unit(dimension, share)) == pytest.approx(share, abs=1e-3)


def test_options_have_an_order_where_they_are_numbers() -> None:
    assert [to_unit(Choice((64, 128, 256)), v) for v in (64, 128, 256)] == pytest.approx([0, 0.5, 1])
    assert [to_unit(Choice((0.0, 0.1)), v) for v in (0.0, 0.1)] == [0, 1]
    assert [to_unit(Choice(("a", "b", "c")), v) for v in "abc"] == [0, 1, 2]
    assert [to_unit(Choice((False, True)), v) for v in (False, True)] == [0, 1]

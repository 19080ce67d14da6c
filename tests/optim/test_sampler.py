"""The sampler finds good configurations, avoids bad ones, and needs nothing but the study's trials."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
import scipy.integrate
import scipy.stats
from optuna.trial import TrialState

from carmodels.presets import SPACES
from carmodels.records import Cause
from carmodels.space import Choice, Range, Space
from carmodels.training.config import TrialConfig
from tune.optim.coordinates import Coordinates
from tune.optim.gaussian_process import CurvePoints
from tune.optim.optuna_records import CAUSE, suggest
from tune.optim.sampler import CurveSampler, _Run, log_expected_improvement

SPACE = SPACES["demo"]
Judge = Callable[[TrialConfig], float]


def searched(
    judge: Judge, trials: int, *, space: Space = SPACE, mode: str = "maximize", **options: Any
) -> list[TrialConfig]:
    """The configurations of a study, each told its value in the fourth epoch of eight and in the last."""
    study = optuna.create_study(direction=mode, sampler=CurveSampler(space, **{"seed": 0, **options}))
    configs = []
    for _ in range(trials):
        trial = study.ask()
        configs.append(TrialConfig(**suggest(trial, space)))
        value = judge(configs[-1])
        trial.report(value - 0.3 if mode == "maximize" else value + 0.3, 4)
        trial.report(value, 8)
        study.tell(trial, value)
    return configs


def unlikely(config: TrialConfig) -> float:
    """Best where the worst is expected: a small image, a learning rate at the end of its range."""
    return 1 - config.image_size / 100 - abs(math.log(config.lr / 2e-4)) / 5


def test_trials_overrule_what_was_expected() -> None:
    configs = searched(unlikely, 24)
    values = [unlikely(c) for c in configs]
    chance = [unlikely(TrialConfig(**suggest(study_trial, SPACE))) for study_trial in random_trials(24)]
    assert max(values) > max(chance)
    assert np.mean(values[12:]) > np.mean(chance) + 0.3
    assert Counter(c.image_size for c in configs[12:]).most_common(1)[0][0] == 32


def random_trials(count: int) -> list[optuna.Trial]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.ask() for _ in range(count)]


def test_a_metric_to_minimise_is_minimised() -> None:
    best = [max(unlikely(c) for c in searched(unlikely, 16))]
    best.append(max(unlikely(c) for c in searched(lambda c: 2 - unlikely(c), 16, mode="minimize")))
    assert best[1] == pytest.approx(best[0], abs=0.15)


def test_values_that_are_not_finite_or_far_off_do_no_harm() -> None:
    def judge(config: TrialConfig) -> float:
        if config.augment == "color":
            return math.inf if config.head_depth else 1e6
        return 2 - unlikely(config)

    configs = searched(judge, 20, mode="minimize")
    assert sum(c.augment == "color" for c in configs[8:]) <= 3
    assert max(unlikely(c) for c in configs) > 0.3


def test_where_most_have_the_best_value_there_can_be_the_others_stay_apart() -> None:
    sampler, coordinates = CurveSampler(SPACE, seed=0), Coordinates(SPACE)
    configs = [TrialConfig(**suggest(trial, SPACE)) for trial in random_trials(6)]
    values = (1.0, 1.0, 1.0, 1.0, 0.99, 0.5)
    runs = [
        _Run(c, coordinates.encode(c), {1.0: v}, True, False, 0) for c, v in zip(configs, values, strict=True)
    ]
    _, scaled = sampler._observations(runs)
    assert scaled[3] - scaled[4] < 0.2 * (scaled[3] - scaled[5])


def test_trials_of_this_study_take_part_in_a_fit_beside_many_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler, coordinates = CurveSampler(SPACE, seed=0), Coordinates(SPACE)
    configs = [TrialConfig(**suggest(trial, SPACE)) for trial in random_trials(310)]
    runs = [
        _Run(c, coordinates.encode(c), {1.0: n / 310}, True, False, int(n < 300))
        for n, c in enumerate(configs)
    ]
    fitted: list[tuple[int, int]] = []

    def fit(points: CurvePoints, values: np.ndarray) -> None:
        fitted.append((int((points.task == 1).sum()), int((points.task == 0).sum())))

    monkeypatch.setattr(sampler._process, "fit", fit)
    for count in (300, 302, 304, 304, 310):
        sampler._curve_posterior(runs[:count])
    assert [own for _, own in fitted] == [0, 4, 9]
    assert all(100 <= other <= 150 for other, _ in fitted)


def sizes_where_large_ones_fail(cause: Cause) -> list[int]:
    """The sizes of the second ten draws."""
    study = optuna.create_study(direction="maximize", sampler=CurveSampler(SPACE, seed=0))
    sizes = []
    for _ in range(20):
        trial = study.ask()
        config = TrialConfig(**suggest(trial, SPACE))
        sizes.append(config.image_size)
        if config.image_size > 48:
            trial.set_user_attr(CAUSE, str(cause))
            study.tell(trial, state=TrialState.FAIL)
        else:
            trial.report(0.5 + config.lr, 8)
            study.tell(trial, 0.5 + config.lr)
    return sizes[10:]


def test_a_region_where_memory_runs_out_is_left() -> None:
    assert sum(size > 48 for size in sizes_where_large_ones_fail(Cause.OUT_OF_MEMORY)) <= 1


@pytest.mark.parametrize("cause", [Cause.MACHINE, Cause.ERROR])
def test_a_region_is_not_left_for_what_is_not_its_fault(cause: Cause) -> None:
    assert sum(size > 48 for size in sizes_where_large_ones_fail(cause)) >= 5


def test_how_failures_spread_is_not_learnt_anew_at_each_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, coordinates = CurveSampler(SPACE, seed=0), Coordinates(SPACE)
    configs = [TrialConfig(**suggest(trial, SPACE)) for trial in random_trials(300)]
    runs = [_Run(c, coordinates.encode(c), {}, True, n % 10 == 0, 0) for n, c in enumerate(configs)]
    fitted: list[tuple[int, int]] = []

    def fit(points: CurvePoints, values: np.ndarray) -> None:
        fitted.append((len(values), int((values < 0).sum())))

    monkeypatch.setattr(sampler._failures, "fit", fit)
    x = np.array([run.x for run in runs[:5]])
    for ended in range(160, 300, 5):
        assert np.isfinite(sampler._log_feasibility(runs[:ended])(x)).all()
    assert 1 <= len(fitted) <= 6
    assert all(some <= 150 and failed >= 10 for some, failed in fitted)


def test_only_what_is_accepted_is_drawn_while_there_is_any() -> None:
    asked: list[TrialConfig] = []

    def small(config: TrialConfig) -> bool:
        asked.append(config)
        return config.image_size == 32

    assert {c.image_size for c in searched(lambda c: c.image_size / 100, 8, accepts=small)} == {32}
    assert len(asked) > 8


@pytest.mark.parametrize("told", [True, False])
def test_workers_that_draw_at_the_same_time_draw_different_configurations(told: bool) -> None:
    study = optuna.create_study(direction="maximize", sampler=CurveSampler(SPACE, seed=0))
    if told:
        study.optimize(lambda trial: unlikely(TrialConfig(**suggest(trial, SPACE))), 1)
    configs = [TrialConfig(**suggest(study.ask(), SPACE)) for _ in range(8)]
    assert len(set(configs)) == 8
    assert len({(c.backbone, c.unfreeze, c.image_size, c.augment) for c in configs}) >= 4
    assert max(c.lr for c in configs) > 2 * min(c.lr for c in configs)


def test_the_draw_depends_on_the_seed_and_the_trials_alone() -> None:
    def told(seed: int, reverse: bool) -> dict[str, Any]:
        source = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))
        source.optimize(lambda t: unlikely(TrialConfig(**suggest(t, SPACE))), 12)
        study = optuna.create_study(direction="maximize", sampler=CurveSampler(SPACE, seed=seed))
        for trial in reversed(source.trials) if reverse else source.trials:
            study.add_trial(trial)
        return suggested(study)

    def suggested(study: optuna.Study) -> dict[str, Any]:
        return suggest(study.ask(), SPACE)

    assert told(0, False) == told(0, True) != told(1, False)


def test_a_space_with_a_single_dimension_is_searched() -> None:
    space = Space(
        {"lr": Range(1e-4, 1e-2, log=True)}, {"backbone": "lcnet_050", "image_size": 32, "epochs": 8}
    )
    configs = searched(lambda c: -abs(math.log(c.lr / 2e-3)), 12, space=space)
    assert min(abs(math.log(c.lr / 2e-3)) for c in configs) < 0.1


def test_a_space_of_few_configurations_is_used_up_without_repeats() -> None:
    space = Space(
        {"backbone": Choice(("lcnet_035", "lcnet_050")), "image_size": Choice((32, 64))}, {"epochs": 2}
    )
    seen: set[TrialConfig] = set()

    def new(config: TrialConfig) -> bool:
        return config not in seen

    study = optuna.create_study(sampler=CurveSampler(space, seed=0, accepts=new))
    for _ in range(4):
        seen.add(TrialConfig(**suggest(study.ask(), space)))
    assert len(seen) == 4


@pytest.mark.parametrize("mean", [-30.0, -6.0, -4.9, 0.0, 3.0])
def test_the_expected_improvement_is_the_integral(mean: float) -> None:
    """At 0.5 standard deviations, over 1."""
    (found,) = log_expected_improvement(np.array([mean]), np.array([0.5]), 1.0)
    density = scipy.stats.norm(mean, 0.5)

    def improvement(y: float) -> float:
        return float((y - 1) * np.exp(density.logpdf(y) - density.logpdf(max(mean, 1.0))))

    integral, _ = scipy.integrate.quad(improvement, 1, max(mean, 1) + 6, points=[1.01, 1.1], limit=200)
    assert found == pytest.approx(np.log(integral) + density.logpdf(max(mean, 1.0)), abs=0.1)

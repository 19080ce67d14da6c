"""The Gaussian process has the gradient it claims, and knows how sure it is and what matters."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

from tune.optim.gaussian_process import CurvePoints, GaussianProcess

CATEGORICAL = np.array([False, False, True])


def made(length_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> GaussianProcess:
    return GaussianProcess(CATEGORICAL, np.array(length_shift))


def drawn(count: int, seed: int = 0) -> CurvePoints:
    """Two values for each of `count` runs."""
    rng = np.random.default_rng(seed)
    x = np.column_stack([rng.random((count, 2)), rng.integers(3, size=count)])
    return CurvePoints(
        np.repeat(x, 2, axis=0),
        np.tile([0.5, 1.0], count),
        np.repeat(np.arange(count), 2),
        np.zeros(2 * count),
    )


def truth(points: CurvePoints) -> np.ndarray:
    """Decided by the first coordinate and the option, rising with time; the second is idle."""
    value: np.ndarray = 2 * np.sin(3 * points.x[:, 0]) + (points.x[:, 2] == 1) + points.time
    return (value - 2.5) / 0.9


def test_the_gradient_is_that_of_the_loss() -> None:
    process, points = made((0.0, 1.0, 0.0)), drawn(6)
    arguments = (points, truth(points), process._squares(points.x, points.x))
    for seed in range(3):
        theta = process.theta + np.random.default_rng(seed).normal(0, 0.3, len(process.theta))
        slope = scipy.optimize.approx_fprime(theta, lambda t: process._loss(t, *arguments)[0], 1e-6)
        assert process._loss(theta, *arguments)[1] == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_covariances_are_the_same_with_and_without_their_derivatives() -> None:
    process, points = made(), drawn(6)
    squares = process._squares(points.x, points.x)
    with_them, _ = process._kernel(process.theta, points, points, squares)
    assert (process.covariance(points, points) == with_them).all()


def test_nothing_seen_leaves_the_prior() -> None:
    process, new = made(), drawn(3)
    empty = CurvePoints.at_end(np.zeros((0, 3)))
    mean, deviation = process.condition(empty, np.zeros(0)).predict(new)
    assert not mean.any()
    assert deviation == pytest.approx(np.sqrt(process.prior_variance(new)))


def test_fitted_to_forty_runs_it_predicts_new_ones_and_how_far_off_it_is() -> None:
    process, points = made(), drawn(40)
    values = truth(points) + np.random.default_rng(1).normal(0, 0.1, len(points))
    process.fit(points, values)
    new = CurvePoints.at_end(drawn(200, seed=2).x[::2])
    mean, deviation = process.condition(points, values).predict(new)
    off = mean - truth(new)
    assert off.std() < 0.2 * truth(new).std()
    assert 0.3 < (off / deviation).std() < 1.5
    first, second, _ = process.theta[-3:]
    assert second > first  # the length of the coordinate that is idle


def test_a_trend_is_expected_and_corrected_by_what_is_seen() -> None:
    """It rises by 1 over the first coordinate; the values fall by 1."""
    process = GaussianProcess(CATEGORICAL, np.zeros(3), trends=lambda x: x[:, :1] - 0.5)
    ends = CurvePoints.at_end(np.array([[0.0, 0.5, 0.0], [1.0, 0.5, 0.0]]))
    seen = CurvePoints.at_end(np.array([[0.3, 0.1, 0.0], [0.6, 0.9, 0.0], [0.5, 0.4, 1.0]]))
    none = CurvePoints.at_end(np.zeros((0, 3)))
    before, unsure = process.condition(none, np.zeros(0)).predict(ends)
    assert before == pytest.approx([-0.5, 0.5])
    after, sure = process.condition(seen, 0.5 - seen.x[:, 0]).predict(ends)
    assert after[1] - after[0] < 0.8
    assert (sure < unsure).all()


def test_a_run_that_was_cut_off_says_something_of_its_end() -> None:
    process, points = made(), drawn(40)
    process.fit(points, truth(points))
    started = CurvePoints(np.array([[0.5, 0.5, 0.0]]), np.array([0.25]), np.array([-1]), np.zeros(1))
    posterior = process.condition(started, np.array([1.5]))
    (mean,), (sure,) = posterior.predict(CurvePoints.at_end(started.x))
    (far,), (unsure,) = posterior.predict(CurvePoints.at_end(np.array([[0.0, 0.5, 2.0]])))
    assert mean > far > 0
    assert sure < unsure


def test_another_task_tells_of_this_one_but_less_than_it_does_itself() -> None:
    process, here = made(), drawn(30)
    there = CurvePoints(here.x, here.time, here.run, np.ones(len(here)))
    ends = CurvePoints.at_end(here.x[::2])
    off = {}
    for name, points in (("here", here), ("there", there)):
        mean, deviation = process.condition(points, truth(points)).predict(ends)
        off[name] = np.abs(mean - truth(ends)).mean(), deviation.mean()
    assert off["here"] < off["there"]
    assert off["there"][0] < 0.5 * truth(ends).std()


def test_points_are_joined_in_order() -> None:
    one, other = drawn(2), drawn(3, seed=1)
    both = one + other
    assert len(both) == 10
    assert (both.x[4:] == other.x).all()
    assert (both.run[4:] == other.run).all()

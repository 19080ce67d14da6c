"""A Gaussian process over configurations and the epochs of their runs: exact, with priors on every length."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize

# Priors of the logarithms of standard deviations and lengths, (mean, standard deviation) of a normal
# distribution, for values of about unit variance. A length in time is a share of the schedule.
_PRIORS = {
    "curve": (0.0, 1.0),  # what all curves have in common
    "effect": (0.0, 0.7),  # what the configuration does
    "own": (math.log(0.2), 0.6),  # what is one run's alone, all along its curve
    "noise": (math.log(0.15), 0.5),  # what is one epoch's alone
    "time": (0.0, 0.5),  # length over which a configuration's effect changes
}

_NOISE, _TIME, _LENGTHS = 3, 4, 5  # places in theta; what follows is a length for each coordinate
_LENGTH = (math.log(0.8), 0.8)  # of a coordinate, which lies in [0, 1]
_CURVE_LENGTH, _OWN_LENGTH = 0.5, 1.0  # in time, of what is not the configuration's
_ALIKE = 0.8  # correlation between a configuration's effects in two tasks
_TREND = 1.0  # standard deviation of a trend's coefficient around what is expected
_STEPS = 40  # of the optimiser at most
_JITTER = 1e-8


@dataclass(frozen=True)
class Points:
    """Where values were seen: a configuration, at a share of its schedule, in a run of a task."""

    x: np.ndarray  # (N, D) in [0, 1]; in a categorical coordinate the option's number
    time: np.ndarray  # (N,) share of the schedule, above 0, to 1
    run: np.ndarray  # (N,) the run's number; -1 for none, whose value is the configuration's alone
    task: np.ndarray  # (N,) the task's number; 0 is the one in hand

    def __len__(self) -> int:
        return len(self.time)

    def __add__(self, other: Points) -> Points:
        return Points(
            np.concatenate([self.x, other.x]),
            np.concatenate([self.time, other.time]),
            np.concatenate([self.run, other.run]),
            np.concatenate([self.task, other.task]),
        )

    @classmethod
    def at_the_end(cls, x: np.ndarray) -> Points:
        """The ends of schedules of configurations (N, D), of no run, in the task in hand."""
        return cls(x, np.ones(len(x)), np.full(len(x), -1), np.zeros(len(x)))


class Process:
    """trends + c(time) + f(configuration, time) + g(run, time) + noise: Gaussian processes around trends.

    The kernel of f is a Matern 5/2 over configurations with a length for each coordinate (Rasmussen and
    Williams, Gaussian Processes for Machine Learning, 2006) times one over time, as in multi-fidelity
    optimisation (Klein et al., 2017; Wistuba et al., 2022); other tasks tell of it by a fixed correlation
    (Bonilla et al., 2008; Swersky et al., 2013). Trends are what is expected beforehand, each with a normal
    coefficient, which values correct (section 2.7 of the book). Hyperparameters are the most probable ones
    under priors, so that few points do not overfit (Hvarfner et al., 2024).
    """

    def __init__(
        self,
        categorical: np.ndarray,
        longer: np.ndarray,
        trends: Callable[[np.ndarray], np.ndarray] = lambda x: np.zeros((len(x), 0)),
        coefficients: np.ndarray | float = 1.0,
    ) -> None:
        """`categorical` (D,) marks coordinates whose options are equally far from each other.

        `longer` (D,) is added to the prior mean of each length's logarithm: at 1, a coordinate is expected
        to matter less than the others. `trends` takes configurations (N, D) to (N, T), `coefficients` (T,)
        are what is expected of theirs.
        """
        self._categorical = categorical
        self._trends, self._coefficients = trends, coefficients
        means, spreads = zip(*_PRIORS.values(), *[_LENGTH] * len(categorical), strict=True)
        self._prior = np.array(means) + np.concatenate([np.zeros(_LENGTHS), longer])
        self._spread = np.array(spreads)
        self.theta = self._prior.copy()

    def fit(self, points: Points, values: np.ndarray) -> None:
        """Set the hyperparameters to the most probable ones, given values (N,) of about unit variance."""
        found = scipy.optimize.minimize(
            self._loss,
            self._prior,
            args=(points, values - self.expected(points), self._squares(points.x, points.x)),
            jac=True,
            method="L-BFGS-B",
            bounds=[(m - 3 * s, m + 3 * s) for m, s in zip(self._prior, self._spread, strict=True)],
            options={"maxiter": _STEPS},
        )
        self.theta = found.x

    def condition(self, points: Points, values: np.ndarray) -> Posterior:
        """What is known after values (N,) were seen at the points; N may be 0."""
        noise = np.exp(2 * self.theta[_NOISE])
        factor = _cholesky(self.between(points, points) + noise * np.eye(len(points)))
        off = values - self.expected(points)
        return Posterior(self, points, factor, scipy.linalg.cho_solve((factor, True), off))

    def expected(self, points: Points) -> np.ndarray:
        """(N,) what is expected before anything was seen."""
        level: np.ndarray = (self._trends(points.x) * self._coefficients).sum(1)
        return level

    def between(self, a: Points, b: Points) -> np.ndarray:
        """(N, M) covariances of what is not noise."""
        return self._kernel(self.theta, a, b)[0]

    def variances(self, points: Points) -> np.ndarray:
        """(N,) variances of what is not noise, before anything was seen."""
        curve, effect, own = np.exp(2 * self.theta[:_NOISE])
        trends = _TREND**2 * (self._trends(points.x) ** 2).sum(1)
        variances: np.ndarray = trends + curve + effect + own * (points.run >= 0)
        return variances

    def _squares(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(N, D) and (M, D) -> (D, N, M) squared distances in each coordinate."""
        apart = a.T[:, :, None] - b.T[:, None, :]
        return np.where(self._categorical[:, None, None], apart != 0, apart**2)

    def _distance(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(N, D) and (M, D) -> (N, M): the weighted sum of `_squares`, one coordinate in memory at a time."""
        total = np.zeros((len(a), len(b)))
        for column, weight in enumerate(weights):
            apart = a[:, None, column] - b[None, :, column]
            total += weight * ((apart != 0) if self._categorical[column] else apart**2)
        return total

    def _loss(
        self, theta: np.ndarray, points: Points, values: np.ndarray, squares: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Negative logarithm of the posterior density of theta (up to a constant), and its gradient.

        `values` (N,) are what is left of them without what was expected.
        """
        kernel, slopes = self._kernel(theta, points, points, squares)
        noise = np.exp(2 * theta[_NOISE]) * np.eye(len(values))
        factor = _cholesky(kernel + noise)
        inverse = scipy.linalg.cho_solve((factor, True), np.eye(len(values)))
        alpha = inverse @ values
        slopes[_NOISE] = 2 * noise
        off = (theta - self._prior) / self._spread
        loss = 0.5 * values @ alpha + np.log(np.diag(factor)).sum() + 0.5 * off @ off
        weight = inverse - np.outer(alpha, alpha)
        gradient = np.array([0.5 * np.sum(weight * slope) for slope in slopes]) + off / self._spread
        return float(loss), gradient

    def _kernel(
        self, theta: np.ndarray, a: Points, b: Points, squares: np.ndarray | None = None
    ) -> tuple[np.ndarray, list[Any]]:
        """(N, M) covariances without noise; with (D, N, M) `squares` their derivatives by theta, too."""
        curve, effect, own = np.exp(2 * theta[:_NOISE])
        weights = np.exp(-2 * theta[_LENGTHS:])
        if squares is None:
            distance, scaled = self._distance(a.x, b.x, weights), None
        else:
            scaled = squares * weights[:, None, None]
            distance = scaled.sum(0)
        apart = (a.time[:, None] - b.time[None, :]) ** 2
        in_time = apart * np.exp(-2 * theta[_TIME])
        alike = np.where(a.task[:, None] == b.task[None, :], 1.0, _ALIKE)
        over_x, slope_x = (alike * part for part in _matern(distance))
        over_time, slope_time = _matern(in_time)
        common = curve * _matern(apart / _CURVE_LENGTH**2)[0]
        shared = effect * over_x * over_time
        same = (a.run[:, None] == b.run[None, :]) & (a.run[:, None] >= 0)
        alone = own * same * np.exp(-np.sqrt(apart) / _OWN_LENGTH)
        trends = _TREND**2 * self._trends(a.x) @ self._trends(b.x).T
        kernel = trends + common + shared + alone
        if scaled is None:
            return kernel, []
        by_time = -2 * effect * over_x * slope_time * in_time
        by_x = -2 * effect * over_time * slope_x
        return kernel, [2 * common, 2 * shared, 2 * alone, 0.0, by_time, *(by_x * s for s in scaled)]


@dataclass(frozen=True)
class Posterior:
    """A process that has seen values."""

    process: Process
    points: Points
    factor: np.ndarray  # (N, N) lower Cholesky factor of the seen values' covariance
    alpha: np.ndarray  # (N,) its inverse times the values

    def predict(self, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """(M,) means and (M,) standard deviations, without an epoch's noise."""
        across = self.process.between(self.points, points)
        solved = scipy.linalg.solve_triangular(self.factor, across, lower=True)
        variance = self.process.variances(points) - (solved**2).sum(0)
        mean = self.process.expected(points) + across.T @ self.alpha
        return mean, np.sqrt(np.maximum(variance, 1e-12))


def _matern(squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matern 5/2 of squared distances, and its derivative by them."""
    distance = np.sqrt(5 * squared)
    decay = np.exp(-distance)
    return (1 + distance + distance**2 / 3) * decay, -5 / 6 * (1 + distance) * decay


def _cholesky(matrix: np.ndarray) -> np.ndarray:
    factor: np.ndarray = scipy.linalg.cholesky(matrix + _JITTER * np.eye(len(matrix)), lower=True)
    return factor

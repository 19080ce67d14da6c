"""An exact Gaussian process over learning curves, with priors on its hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize

# Normal priors (mean, standard deviation) of the logs of standard deviations and lengths, for values of about
# unit variance. Time is the share of the schedule.
_PRIORS = {
    "curve": (0.0, 1.0),  # common to all curves
    "effect": (0.0, 0.7),  # of the configuration
    "run": (math.log(0.2), 0.6),  # of a single run, along its whole curve
    "noise": (math.log(0.15), 0.5),  # of a single epoch
    "time": (0.0, 0.5),  # length in time of the configuration's effect
}

_NOISE, _TIME, _LENGTHS = 3, 4, 5  # indices in theta; from _LENGTHS on, a length for each coordinate
_LENGTH = (math.log(0.8), 0.8)  # of a coordinate
_CURVE_LENGTH, _RUN_LENGTH = 0.5, 1.0  # in time
_TASK_CORRELATION = 0.8  # of a configuration's effects in two tasks
_TREND = 1.0  # standard deviation of a trend's coefficient around its prior mean
_MAX_ITERATIONS = 40  # of the optimiser
_JITTER = 1e-8


@dataclass(frozen=True)
class CurvePoints:
    """Points on learning curves: a configuration, at a share of its schedule, in a run of a task."""

    x: np.ndarray  # (N, D) in [0, 1]; in a categorical coordinate the option's index
    time: np.ndarray  # (N,) share of the schedule, in (0, 1]
    run: np.ndarray  # (N,) index of the run; -1: no run, only the configuration's effect
    task: np.ndarray  # (N,) index of the task; 0 is the current one

    def __len__(self) -> int:
        return len(self.time)

    def __add__(self, other: CurvePoints) -> CurvePoints:
        return CurvePoints(
            np.concatenate([self.x, other.x]),
            np.concatenate([self.time, other.time]),
            np.concatenate([self.run, other.run]),
            np.concatenate([self.task, other.task]),
        )

    @classmethod
    def at_end(cls, x: np.ndarray) -> CurvePoints:
        """The schedule ends of configurations (N, D), of no run, in the current task."""
        return cls(x, np.ones(len(x)), np.full(len(x), -1), np.zeros(len(x)))


class GaussianProcess:
    """value = trends(x) + c(time) + f(x, time) + g(run, time) + noise, all of them Gaussian.

    The kernel of f is a Matern 5/2 over configurations with a length for each coordinate (Rasmussen and
    Williams, Gaussian Processes for Machine Learning, 2006) times a Matern 5/2 over time, as in
    multi-fidelity optimisation (Klein et al., 2017; Wistuba et al., 2022). Between tasks, f has a fixed
    correlation (Bonilla et al., 2008; Swersky et al., 2013). Observed values update the trends' normal
    coefficients (section 2.7 of the book). Hyperparameters are maximum a posteriori estimates: their
    priors prevent overfitting to few points (Hvarfner et al., 2024).
    """

    def __init__(
        self,
        categorical: np.ndarray,
        length_shift: np.ndarray,
        trends: Callable[[np.ndarray], np.ndarray] = lambda x: np.zeros((len(x), 0)),
        coefficients: np.ndarray | float = 1.0,
    ) -> None:
        """`categorical` (D,) marks coordinates whose options are equally far from each other.

        `length_shift` (D,) is added to the prior mean of each log length; a coordinate with 1 is expected to
        matter less than the others. `trends` maps configurations (N, D) to (N, T); `coefficients` (T,) are
        the prior means of the trends' coefficients.
        """
        self._categorical = categorical
        self._trends, self._coefficients = trends, coefficients
        means, spreads = zip(*_PRIORS.values(), *[_LENGTH] * len(categorical), strict=True)
        self._prior = np.array(means) + np.concatenate([np.zeros(_LENGTHS), length_shift])
        self._spread = np.array(spreads)
        self.theta = self._prior.copy()

    def fit(self, points: CurvePoints, values: np.ndarray) -> None:
        """Sets the hyperparameters to their most probable ones, given values (N,) of about unit variance."""
        result = scipy.optimize.minimize(
            self._loss,
            self._prior,
            args=(points, values - self.prior_mean(points), self._squares(points.x, points.x)),
            jac=True,
            method="L-BFGS-B",
            bounds=[(m - 3 * s, m + 3 * s) for m, s in zip(self._prior, self._spread, strict=True)],
            options={"maxiter": _MAX_ITERATIONS},
        )
        self.theta = result.x

    def condition(self, points: CurvePoints, values: np.ndarray) -> GPPosterior:
        """The posterior after observing values (N,) at the points; N may be 0."""
        noise = np.exp(2 * self.theta[_NOISE])
        factor = _cholesky(self.covariance(points, points) + noise * np.eye(len(points)))
        residuals = values - self.prior_mean(points)
        return GPPosterior(self, points, factor, scipy.linalg.cho_solve((factor, True), residuals))

    def prior_mean(self, points: CurvePoints) -> np.ndarray:
        """(N,) means before any observation."""
        mean: np.ndarray = (self._trends(points.x) * self._coefficients).sum(1)
        return mean

    def covariance(self, a: CurvePoints, b: CurvePoints) -> np.ndarray:
        """(N, M) prior covariances, without noise."""
        return self._kernel(self.theta, a, b)[0]

    def prior_variance(self, points: CurvePoints) -> np.ndarray:
        """(N,) variances before any observation, without noise."""
        curve, effect, run = np.exp(2 * self.theta[:_NOISE])
        trends = _TREND**2 * (self._trends(points.x) ** 2).sum(1)
        variance: np.ndarray = trends + curve + effect + run * (points.run >= 0)
        return variance

    def _squares(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(N, D) and (M, D) -> (D, N, M) squared distances in each coordinate."""
        difference = a.T[:, :, None] - b.T[:, None, :]
        return np.where(self._categorical[:, None, None], difference != 0, difference**2)

    def _distance(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(N, D) and (M, D) -> (N, M): the weighted sum of `_squares`, one coordinate in memory at a time."""
        total = np.zeros((len(a), len(b)))
        for column, weight in enumerate(weights):
            difference = a[:, None, column] - b[None, :, column]
            total += weight * ((difference != 0) if self._categorical[column] else difference**2)
        return total

    def _loss(
        self, theta: np.ndarray, points: CurvePoints, residuals: np.ndarray, squares: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Negative log posterior density of theta, up to a constant, and its gradient.

        `residuals` (N,) are the values less their prior mean.
        """
        kernel, derivatives = self._kernel(theta, points, points, squares)
        noise = np.exp(2 * theta[_NOISE]) * np.eye(len(residuals))
        factor = _cholesky(kernel + noise)
        inverse = scipy.linalg.cho_solve((factor, True), np.eye(len(residuals)))
        alpha = inverse @ residuals
        derivatives[_NOISE] = 2 * noise
        z = (theta - self._prior) / self._spread
        loss = 0.5 * residuals @ alpha + np.log(np.diag(factor)).sum() + 0.5 * z @ z
        weight = inverse - np.outer(alpha, alpha)
        gradient = np.array([0.5 * np.sum(weight * d) for d in derivatives]) + z / self._spread
        return float(loss), gradient

    def _kernel(
        self, theta: np.ndarray, a: CurvePoints, b: CurvePoints, squares: np.ndarray | None = None
    ) -> tuple[np.ndarray, list[Any]]:
        """(N, M) covariances without noise; with (D, N, M) `squares` also their derivatives by theta."""
        curve, effect, run = np.exp(2 * theta[:_NOISE])
        weights = np.exp(-2 * theta[_LENGTHS:])
        if squares is None:
            distance, scaled = self._distance(a.x, b.x, weights), None
        else:
            scaled = squares * weights[:, None, None]
            distance = scaled.sum(0)
        time_squares = (a.time[:, None] - b.time[None, :]) ** 2
        scaled_time = time_squares * np.exp(-2 * theta[_TIME])
        correlation = np.where(a.task[:, None] == b.task[None, :], 1.0, _TASK_CORRELATION)
        over_x, slope_x = (correlation * part for part in _matern(distance))
        over_time, slope_time = _matern(scaled_time)
        common_part = curve * _matern(time_squares / _CURVE_LENGTH**2)[0]
        effect_part = effect * over_x * over_time
        same_run = (a.run[:, None] == b.run[None, :]) & (a.run[:, None] >= 0)
        run_part = run * same_run * np.exp(-np.sqrt(time_squares) / _RUN_LENGTH)
        trend_part = _TREND**2 * self._trends(a.x) @ self._trends(b.x).T
        kernel = trend_part + common_part + effect_part + run_part
        if scaled is None:
            return kernel, []
        by_time = -2 * effect * over_x * slope_time * scaled_time
        by_x = -2 * effect * over_time * slope_x
        by_sd = [2 * common_part, 2 * effect_part, 2 * run_part]
        return kernel, [*by_sd, 0.0, by_time, *(by_x * s for s in scaled)]


@dataclass(frozen=True)
class GPPosterior:
    """A Gaussian process conditioned on observed values."""

    process: GaussianProcess
    points: CurvePoints
    factor: np.ndarray  # (N, N) lower Cholesky factor of the observations' covariance
    alpha: np.ndarray  # (N,) the inverse covariance times the residuals

    def predict(self, points: CurvePoints) -> tuple[np.ndarray, np.ndarray]:
        """(M,) means and (M,) standard deviations, without noise."""
        covariance = self.process.covariance(self.points, points)
        solved = scipy.linalg.solve_triangular(self.factor, covariance, lower=True)
        variance = self.process.prior_variance(points) - (solved**2).sum(0)
        mean = self.process.prior_mean(points) + covariance.T @ self.alpha
        return mean, np.sqrt(np.maximum(variance, 1e-12))


def _matern(squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matern 5/2 of squared distances, and its derivative with respect to them."""
    distance = np.sqrt(5 * squared)
    decay = np.exp(-distance)
    return (1 + distance + distance**2 / 3) * decay, -5 / 6 * (1 + distance) * decay


def _cholesky(matrix: np.ndarray) -> np.ndarray:
    factor: np.ndarray = scipy.linalg.cholesky(matrix + _JITTER * np.eye(len(matrix)), lower=True)
    return factor

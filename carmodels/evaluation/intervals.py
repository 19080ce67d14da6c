"""Scores with 95 % confidence intervals, and prediction intervals for the score on hidden images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from carmodels.evaluation.metrics import Metric, accuracy, get_metric

_MAX_PROBS_IN_MEMORY = 4_000_000  # of a bootstrap: 16 MB
_MAX_HIDDEN = 10_000  # images drawn in a resample; more add next to nothing


@dataclass(frozen=True)
class Interval:
    """A measured value and the bounds of its interval."""

    value: float
    low: float
    high: float


def accuracy_interval(probs: np.ndarray, labels: np.ndarray, confidence: float = 0.95) -> Interval:
    """Accuracy with Wilson's score interval (1927), which also holds for few images and near 0 and 1."""
    return proportion_interval(round(accuracy(probs, labels) * len(labels)), len(labels), confidence)


def proportion_interval(hits: int, total: int, confidence: float = 0.95) -> Interval:
    """hits / total with Wilson's score interval (1927)."""
    from scipy.stats import binomtest  # imported here: it would add 1 s to the start of a trial

    bounds = binomtest(hits, total).proportion_ci(confidence, method="wilson")
    return Interval(hits / total, float(bounds.low), float(bounds.high))


def score_interval(metric: str, probs: np.ndarray, labels: np.ndarray) -> Interval:
    """The metric with a 95 % interval: Wilson's for accuracy, a bootstrap for others."""
    if metric == "accuracy":
        return accuracy_interval(probs, labels)
    return bootstrap_interval(metric, probs, labels)


def bootstrap_interval(
    metric: str, probs: np.ndarray, labels: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """The metric with its 95 % percentile bootstrap interval over images (Efron, 1979)."""
    scorer = get_metric(metric)
    value = scorer.score(probs, labels)
    return _percentile_interval(value, _bootstrap(scorer, probs, labels, seed, resamples))


def proportion_prediction_interval(hits: int, total: int, hidden: int, confidence: float = 0.95) -> Interval:
    """hits / total with a prediction interval for the same proportion over `hidden` further images.

    The joint-sampling interval of Krishnamoorthy and Peng (2011): all y with

        (y - x)^2 <= z^2 q (1 - q) (1 / n + 1 / m),  q = (n x + m y) / (n + m)

    where x = hits / total, n = total, m = hidden, and z is the normal quantile. It covers both the
    uncertainty from n images and the variation of m others. For m to infinity it is Wilson's (1927).
    """
    if not (hidden >= 1 and total >= 1 and 0 <= hits <= total):
        raise ValueError(f"{hidden=} and {total=} must be at least 1, {hits=} from 0 to {total}")
    x, weight = hits / total, total / (total + hidden)
    spread = NormalDist().inv_cdf((1 + confidence) / 2) ** 2 * (1 / total + 1 / hidden)
    # a y^2 - 2 b y + c <= 0
    a = 1 + spread * (1 - weight) ** 2
    b = x + spread * (1 - weight) * (0.5 - weight * x)
    c = x**2 - spread * weight * x * (1 - weight * x)
    root = math.sqrt(max(0.0, b * b - a * c))
    return Interval(x, max(0.0, (b - root) / a), min(1.0, (b + root) / a))


def score_prediction_interval(
    metric: str,
    probs: np.ndarray,
    labels: np.ndarray,
    hidden: int,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """The metric, with a 95 % prediction interval for its value on `hidden` further images of the same kind.

    Accuracy: `proportion_prediction_interval`. Other metrics: a two-step bootstrap (Mojirsheibani and
    Tibshirani, 1996) that resamples the images and then draws hidden ones from each resample, so that both
    samples vary.
    """
    scorer = get_metric(metric)
    value = scorer.score(probs, labels)
    if metric == "accuracy":
        return proportion_prediction_interval(round(value * len(labels)), len(labels), hidden)
    if hidden < 1:
        raise ValueError(f"{hidden=} must be at least 1")
    resampled = _bootstrap(scorer, probs, labels, seed, resamples, min(hidden, _MAX_HIDDEN))
    return _percentile_interval(value, resampled)


def paired_gain(
    metric: str, a: np.ndarray, b: np.ndarray, labels: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """How much better probs `a` (N, C) are than `b`, with a 95 % paired bootstrap interval. > 0: better.

    Each resample has the same images for both, so images that are hard for both cancel out.
    """
    scorer = get_metric(metric)
    value = scorer.gain(scorer.score(a, labels), scorer.score(b, labels))
    scores_a, scores_b = (_bootstrap(scorer, probs, labels, seed, resamples) for probs in (a, b))
    return _percentile_interval(value, scorer.gain(scores_a, scores_b))


def _bootstrap(
    scorer: Metric, probs: np.ndarray, labels: np.ndarray, seed: int, resamples: int, hidden: int = 0
) -> np.ndarray:
    """Scores, (resamples,), of N images drawn with replacement. The same seed draws the same images.

    With `hidden`, each resample is replaced by that many images drawn from it with replacement.
    """
    rng = np.random.default_rng(seed)
    chunks = -(-resamples * max(len(probs), hidden) * probs.shape[1] // _MAX_PROBS_IN_MEMORY)
    draws = np.array_split(rng.integers(len(labels), size=(resamples, len(labels)), dtype=np.int32), chunks)
    if hidden:
        draws = [
            np.take_along_axis(rows, rng.integers(len(labels), size=(len(rows), hidden), dtype=np.int32), 1)
            for rows in draws
        ]
    return np.concatenate([scorer.scores(probs[rows], labels[rows]) for rows in draws])


def _percentile_interval(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(value, float(low), float(high))

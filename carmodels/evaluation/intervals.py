"""Scores with 95 % intervals, and prediction intervals for images not seen yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from carmodels.evaluation.metrics import Metric, accuracy, get_metric

_RESAMPLED_AT_ONCE = 4_000_000  # probabilities a bootstrap holds in memory: 16 MB
_MOST_HIDDEN = 10_000  # images drawn in a resample


@dataclass(frozen=True)
class Interval:
    """A measured value and the ends of its interval."""

    value: float
    low: float
    high: float


def accuracy_interval(probs: np.ndarray, labels: np.ndarray, confidence: float = 0.95) -> Interval:
    """Accuracy with the score interval of Wilson (1927), good for few images and near 0 and 1, too."""
    return share_interval(round(accuracy(probs, labels) * len(labels)), len(labels), confidence)


def share_interval(hits: int, among: int, confidence: float = 0.95) -> Interval:
    """The share of hits with the score interval of Wilson (1927)."""
    from scipy.stats import binomtest  # here, as every trial would pay 1 s at its start for it

    ends = binomtest(hits, among).proportion_ci(confidence, method="wilson")
    return Interval(hits / among, float(ends.low), float(ends.high))


def score_interval(metric: str, probs: np.ndarray, labels: np.ndarray) -> Interval:
    """The metric with a 95 % interval: Wilson's for accuracy, else by bootstrap."""
    return (
        accuracy_interval(probs, labels)
        if metric == "accuracy"
        else bootstrap_interval(metric, probs, labels)
    )


def bootstrap_interval(
    metric: str, probs: np.ndarray, labels: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """The metric with its 95 % percentile bootstrap interval over images (Efron, 1979)."""
    row = get_metric(metric)
    value = row.score(probs, labels)
    return _percentiles(value, _bootstrap(row, probs, labels, seed, resamples))


def share_prediction_interval(hits: int, among: int, hidden: int, confidence: float = 0.95) -> Interval:
    """The share of hits with a prediction interval for the share among `hidden` further images.

    That of Krishnamoorthy and Peng (2011), from joint sampling: the values y of the further share with

        (y - x)^2 <= z^2 q (1 - q) (1 / n + 1 / m),  q = (n x + m y) / (n + m)

    where x is the share seen among n, m = `hidden`, and z the normal quantile. What n images leave unknown
    and what m others vary by are both in it; with m without limit it is the interval of Wilson (1927).
    """
    if not (hidden >= 1 and among >= 1 and 0 <= hits <= among):
        raise ValueError(f"{hidden=} and {among=} must be at least 1, {hits=} from 0 to {among}")
    share, seen = hits / among, among / (among + hidden)
    spread = NormalDist().inv_cdf((1 + confidence) / 2) ** 2 * (1 / among + 1 / hidden)
    # a y^2 - 2 b y + c <= 0
    a = 1 + spread * (1 - seen) ** 2
    b = share + spread * (1 - seen) * (0.5 - seen * share)
    c = share**2 - spread * seen * share * (1 - seen * share)
    root = math.sqrt(max(0.0, b * b - a * c))
    return Interval(share, max(0.0, (b - root) / a), min(1.0, (b + root) / a))


def score_prediction_interval(
    metric: str,
    probs: np.ndarray,
    labels: np.ndarray,
    hidden: int,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """The metric, with a 95 % prediction interval for its value on `hidden` further images of the kind.

    Accuracy: as in `share_prediction_interval`. Other metrics: a two-step bootstrap (Mojirsheibani and
    Tibshirani, 1996) that resamples the images seen and draws the hidden ones from them, so that both samples
    vary. Hidden images past 10,000 add next to nothing and are left out.
    """
    row = get_metric(metric)
    value = row.score(probs, labels)
    if metric == "accuracy":
        return share_prediction_interval(round(value * len(labels)), len(labels), hidden)
    if hidden < 1:
        raise ValueError(f"{hidden=} must be at least 1")
    return _percentiles(value, _bootstrap(row, probs, labels, seed, resamples, min(hidden, _MOST_HIDDEN)))


def paired_gain(
    metric: str, a: np.ndarray, b: np.ndarray, labels: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """How much better `a` (N, C) is than `b`, with a 95 % bootstrap interval over images. > 0: better.

    Every resample holds the same images for both, so what both find hard cancels out.
    """
    row = get_metric(metric)
    value = row.gain(row.score(a, labels), row.score(b, labels))
    drawn_a, drawn_b = (_bootstrap(row, probs, labels, seed, resamples) for probs in (a, b))
    return _percentiles(value, row.gain(drawn_a, drawn_b))


def _bootstrap(
    row: Metric, probs: np.ndarray, labels: np.ndarray, seed: int, resamples: int, hidden: int = 0
) -> np.ndarray:
    """Scores, (resamples,), of N images drawn with replacement: the same ones for the same seed.

    With `hidden`, of so many drawn with replacement from each draw.
    """
    rng = np.random.default_rng(seed)
    parts = -(-resamples * max(len(probs), hidden) * probs.shape[1] // _RESAMPLED_AT_ONCE)
    draws = np.array_split(rng.integers(len(labels), size=(resamples, len(labels)), dtype=np.int32), parts)
    if hidden:
        draws = [
            np.take_along_axis(drawn, rng.integers(len(labels), size=(len(drawn), hidden), dtype=np.int32), 1)
            for drawn in draws
        ]
    return np.concatenate([row.scores(probs[drawn], labels[drawn]) for drawn in draws])


def _percentiles(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(value, float(low), float(high))

"""Scores with 95 % confidence intervals, and prediction intervals for the score on hidden images.

`groups` (N,) numbers the groups of images that are no independent evidence, as near-duplicates are: a model
answers them alike. Without it each image is its own group. Resamples draw whole groups. Wilson's interval
counts the images that as many equal groups would hold (Kish, 1965).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from carmodels.evaluation.metrics import accuracy, get_metric

_MAX_COUNTS_IN_MEMORY = 1_000_000  # of a bootstrap: 8 MB an array
_MAX_HIDDEN = 10_000  # groups drawn in a resample; more add next to nothing


@dataclass(frozen=True)
class Interval:
    """A measured value and the bounds of its interval."""

    value: float
    low: float
    high: float


def independent_images(groups: np.ndarray) -> float:
    """groups (N,) -> effective number of images (Kish, 1965), if the images of a group say the same.

    N without groups of several images; 0 without images.
    """
    sizes = np.unique(groups, return_counts=True)[1]
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if len(sizes) else 0.0


def accuracy_interval(
    probs: np.ndarray, labels: np.ndarray, confidence: float = 0.95, *, groups: np.ndarray | None = None
) -> Interval:
    """Accuracy with Wilson's score interval (1927), which also holds for few images and near 0 and 1."""
    images = independent_images(_numbered(groups, labels))
    return proportion_interval(accuracy(probs, labels) * images, images, confidence)


def proportion_interval(hits: float, total: float, confidence: float = 0.95) -> Interval:
    """hits / total with Wilson's score interval (1927)."""
    return proportion_prediction_interval(hits, total, math.inf, confidence)


def score_interval(
    metric: str, probs: np.ndarray, labels: np.ndarray, *, groups: np.ndarray | None = None
) -> Interval:
    """The metric with a 95 % interval: Wilson's for accuracy, a bootstrap for others."""
    if metric == "accuracy":
        return accuracy_interval(probs, labels, groups=groups)
    return bootstrap_interval(metric, probs, labels, groups=groups)


def bootstrap_interval(
    metric: str,
    probs: np.ndarray,
    labels: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """The metric with its 95 % percentile bootstrap interval over groups of images (Efron, 1979)."""
    value = get_metric(metric).score(probs, labels)
    [scores] = _bootstrap(metric, [probs], labels, groups, seed, resamples)
    return _percentile_interval(value, scores)


def proportion_prediction_interval(
    hits: float, total: float, hidden: float, confidence: float = 0.95
) -> Interval:
    """hits / total with a prediction interval for the same proportion over `hidden` further images.

    The joint-sampling interval of Krishnamoorthy and Peng (2011): all y with

        (y - x)^2 <= z^2 q (1 - q) (1 / n + 1 / m),  q = (n x + m y) / (n + m)

    where x = hits / total, n = total, m = hidden, and z is the normal quantile. It covers both the
    uncertainty from n images and the variation of m others. For m to infinity it is Wilson's (1927).
    """
    if not (hidden >= 1 and total >= 1 and 0 <= hits <= total):
        raise ValueError(f"{hidden=} and {total=} must be at least 1, {hits=} from 0 to {total}")
    x, weight = hits / total, total / (total + hidden)  # the weight is 0 for an infinite `hidden`
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
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """The metric, with a 95 % prediction interval for its value on `hidden` further images of the same kind.

    Accuracy: `proportion_prediction_interval`. Other metrics: a two-step bootstrap (Mojirsheibani and
    Tibshirani, 1996) that resamples the images and then draws hidden ones from each resample, so that both
    samples vary. The hidden images are taken to come in groups like these.
    """
    value = get_metric(metric).score(probs, labels)
    if hidden < 1:
        raise ValueError(f"{hidden=} must be at least 1")
    if metric == "accuracy":
        images = independent_images(_numbered(groups, labels))
        further = max(1.0, hidden * images / len(labels))
        return proportion_prediction_interval(value * images, images, further)
    [scores] = _bootstrap(metric, [probs], labels, groups, seed, resamples, hidden)
    return _percentile_interval(value, scores)


def paired_gain(
    metric: str,
    a: np.ndarray,
    b: np.ndarray,
    labels: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """How much better probs `a` (N, C) are than `b`, with a 95 % paired bootstrap interval. > 0: better.

    Each resample has the same images for both, so images that are hard for both cancel out.
    """
    scorer = get_metric(metric)
    value = scorer.gain(scorer.score(a, labels), scorer.score(b, labels))
    scores_a, scores_b = _bootstrap(metric, [a, b], labels, groups, seed, resamples)
    return _percentile_interval(value, scorer.gain(scores_a, scores_b))


def _bootstrap(
    metric: str,
    models: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray | None,
    seed: int,
    resamples: int,
    hidden: int = 0,
) -> list[np.ndarray]:
    """Scores of each model, (resamples,), on groups of images drawn with replacement, the same for all.

    With `hidden`, each resample is replaced by groups drawn from it, of about so many images together.
    """
    _, member = np.unique(_numbered(groups, labels), return_inverse=True)  # group of each image, 0 to G - 1
    count = int(member.max()) + 1
    further = min(_MAX_HIDDEN, max(1, round(hidden * count / len(labels)))) if hidden else 0
    weighted = [get_metric(metric).weighted(probs, labels) for probs in models]
    rng = np.random.default_rng(seed)
    scores: list[list[np.ndarray]] = [[] for _ in models]
    for part in _parts(resamples, max(len(labels), further)):
        draws = rng.integers(count, size=(part, count), dtype=np.int32)
        if further:
            again = rng.integers(count, size=(part, further), dtype=np.int32)
            draws = np.take_along_axis(draws, again, 1)
        cells = np.arange(part)[:, None] * count + draws
        of_groups = np.bincount(cells.ravel(), minlength=part * count).reshape(part, count)
        counts = of_groups[:, member].astype(np.float64)
        for found, of in zip(scores, weighted, strict=True):
            found.append(of(counts))
    return [np.concatenate(found) for found in scores]


def _parts(resamples: int, drawn: int) -> Iterator[int]:
    """Numbers of resamples to draw at a time, so that memory is bounded."""
    most = max(1, _MAX_COUNTS_IN_MEMORY // drawn)
    for start in range(0, resamples, most):
        yield min(most, resamples - start)


def _numbered(groups: np.ndarray | None, labels: np.ndarray) -> np.ndarray:
    """The groups, by default one an image. ValueError if they do not fit the labels (N,)."""
    if groups is None:
        return np.arange(len(labels))
    if groups.shape != labels.shape:
        raise ValueError(f"groups of shape {groups.shape} do not fit labels of shape {labels.shape}")
    return groups


def _percentile_interval(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(value, float(low), float(high))

"""Metrics: accuracy, log loss and macro F1 of probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from carmodels.formatting import names_text

FLOOR = float(np.finfo(np.float32).eps)  # log loss clips probabilities here, as scikit-learn for float32
_Score = TypeVar("_Score", float, np.ndarray)
Weighted = Callable[[np.ndarray], np.ndarray]  # how often each image counts, (R, N) -> scores (R,)


@dataclass(frozen=True)
class Metric:
    """How to score probabilities. A new metric is one row in `METRICS`."""

    mode: Literal["max", "min"]
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray]  # probs (K, N, C), labels (N,) -> (K,)
    weighted: Callable[[np.ndarray, np.ndarray], Weighted]  # probs (N, C), labels (N,) -> scores of resamples
    spread: Callable[[float], float]  # score -> approximate standard deviation of one image's score
    by_class: bool = False  # whether each class counts the same, however few images it has

    def score(self, probs: np.ndarray, labels: np.ndarray) -> float:
        """probs (N, C), labels (N,) -> score. ValueError if shapes or labels do not fit."""
        check_labels(probs, labels)
        return float(self.scores(probs[None], labels)[0])

    def gain(self, new: _Score, old: _Score) -> _Score:
        """How much better `new` is than `old`. Negative: worse."""
        difference: _Score = new - old if self.mode == "max" else old - new
        return difference

    def effective_images(self, class_counts: np.ndarray) -> float:
        """Number n of images so that a score's standard error is about `spread` / sqrt(n).

        `class_counts` (C,) are the images of each class. A mean over classes has the variance of each class,
        spread^2 / count, divided by C^2: rare classes dominate it. For equal classes n is all images.
        """
        counts = class_counts[class_counts > 0]
        if self.by_class and len(counts):
            return float(len(counts) ** 2 / (1 / counts).sum())
        return float(counts.sum())


def check_labels(probs: np.ndarray, labels: np.ndarray) -> None:
    """ValueError if labels (N,) do not fit probs (N, C).

    Otherwise NumPy would silently broadcast a wrong shape and wrap a negative label around.
    """
    if probs.ndim != 2 or labels.shape != probs.shape[:1]:
        raise ValueError(f"labels of shape {labels.shape} do not fit probs of shape {probs.shape}")
    if not len(labels):
        raise ValueError("there is no image to score")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= probs.shape[1]:
        raise ValueError(
            f"labels must be integers from 0 to {probs.shape[1] - 1}: {names_text(np.unique(labels))}"
        )


def _hits(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """probs (..., N, C), labels (N,) -> (..., N), 1.0 where the largest probability is at the label."""
    return (probs.argmax(axis=-1) == labels).astype(np.float64)


def _image_losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """probs (..., N, C), labels (N,) -> (..., N)."""
    columns = np.broadcast_to(labels, probs.shape[:-1])[..., None]
    true_probs = np.take_along_axis(probs, columns, axis=-1)[..., 0].astype(np.float64)
    losses: np.ndarray = -np.log(np.clip(true_probs, FLOOR, 1))
    return losses


def _accuracies(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    shares: np.ndarray = _hits(probs, labels).mean(axis=-1)
    return shares


def log_losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """probs (..., N, C), labels (N,) -> (...), mean log loss."""
    losses: np.ndarray = _image_losses(probs, labels).mean(axis=-1)
    return losses


def _weighted_mean(of_images: np.ndarray) -> Weighted:
    """of_images (N,) -> weighted means of them."""

    def means(counts: np.ndarray) -> np.ndarray:
        found: np.ndarray = counts @ of_images / counts.sum(axis=1)
        return found

    return means


def _macro_f1s(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    ones = np.ones((1, len(labels)))
    return np.array([_weighted_macro_f1(of_one, labels)(ones)[0] for of_one in probs])


def _weighted_macro_f1(probs: np.ndarray, labels: np.ndarray) -> Weighted:
    """Mean F1 of the classes that occur or are predicted, as in scikit-learn."""
    answers, classes = probs.argmax(axis=1), probs.shape[1]
    right = answers == labels

    def scores(counts: np.ndarray) -> np.ndarray:
        hits = _sums_by_class(counts[:, right], labels[right], classes)
        either = _sums_by_class(counts, answers, classes) + _sums_by_class(counts, labels, classes)
        found: np.ndarray = (2 * hits / np.maximum(either, 1)).sum(axis=1) / (either > 0).sum(axis=1)
        return found

    return scores


def _sums_by_class(counts: np.ndarray, of: np.ndarray, classes: int) -> np.ndarray:
    """counts (R, N), of (N,) class of each image -> (R, classes)."""
    cells = np.arange(len(counts))[:, None] * classes + of
    sums = np.bincount(cells.ravel(), counts.ravel(), minlength=len(counts) * classes)
    return sums.reshape(len(counts), classes)


def _binomial(share: float) -> float:
    """Standard deviation of one image that counts 0 or 1."""
    return math.sqrt(max(0.0, share * (1 - share)))


def _exponential(mean: float) -> float:
    """Many small losses and a few large ones: the standard deviation about equals the mean."""
    return mean


METRICS: dict[str, Metric] = {
    "accuracy": Metric("max", _accuracies, lambda p, labels: _weighted_mean(_hits(p, labels)), _binomial),
    "log_loss": Metric(
        "min", log_losses, lambda p, labels: _weighted_mean(_image_losses(p, labels)), _exponential
    ),
    "macro_f1": Metric("max", _macro_f1s, _weighted_macro_f1, _binomial, by_class=True),
}


def accuracy(probs: np.ndarray, labels: np.ndarray) -> float:
    """probs (N, C), labels (N,) -> share of rows whose largest probability is at the label."""
    return METRICS["accuracy"].score(probs, labels)


def log_loss(probs: np.ndarray, labels: np.ndarray) -> float:
    """probs (N, C), labels (N,) -> mean of -log(probability at the label), nats. 0 counts as 1.2e-7."""
    return METRICS["log_loss"].score(probs, labels)


def get_metric(name: str) -> Metric:
    if name not in METRICS:
        raise ValueError(f"metric={name!r} is not one of {', '.join(METRICS)}")
    return METRICS[name]


def count_fixed_and_broken(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """probs (N, C) twice -> how many images change from wrong to right, and how many from right to wrong."""
    check_labels(before, labels)
    check_labels(after, labels)
    was_right, is_right = before.argmax(axis=1) == labels, after.argmax(axis=1) == labels
    return int((is_right & ~was_right).sum()), int((was_right & ~is_right).sum())

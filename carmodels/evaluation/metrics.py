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


@dataclass(frozen=True)
class Metric:
    """How to score probabilities. A new metric is one row in `METRICS`."""

    mode: Literal["max", "min"]
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray]  # probs (K, N, C), labels (N,) or (K, N) -> (K,)
    spread: Callable[[float], float]  # score -> approximate standard deviation of one image's score

    def score(self, probs: np.ndarray, labels: np.ndarray) -> float:
        """probs (N, C), labels (N,) -> score. ValueError if shapes or labels do not fit."""
        check_labels(probs, labels)
        return float(self.scores(probs[None], labels)[0])

    def gain(self, new: _Score, old: _Score) -> _Score:
        """How much better `new` is than `old`. Negative: worse."""
        difference: _Score = new - old if self.mode == "max" else old - new
        return difference


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


def _accuracies(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    shares: np.ndarray = (probs.argmax(axis=-1) == labels).mean(axis=-1)
    return shares


def log_losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """probs (..., N, C), labels (N,) or (..., N) -> (...), mean log loss."""
    columns = np.broadcast_to(labels, probs.shape[:-1])[..., None]
    true_probs = np.take_along_axis(probs, columns, axis=-1)[..., 0].astype(np.float64)
    losses: np.ndarray = -np.log(np.clip(true_probs, FLOOR, 1)).mean(axis=-1)
    return losses


def _macro_f1s(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes that occur or are predicted, as in scikit-learn."""
    classes = np.arange(probs.shape[-1])
    predicted = probs.argmax(axis=-1)[..., None] == classes
    true = np.asarray(labels)[..., None] == classes
    hits, either = (predicted & true).sum(axis=-2), predicted.sum(axis=-2) + true.sum(axis=-2)
    scores: np.ndarray = (2 * hits / np.maximum(either, 1)).sum(axis=-1) / (either > 0).sum(axis=-1)
    return scores


def _binomial(share: float) -> float:
    """Standard deviation of one image that counts 0 or 1."""
    return math.sqrt(max(0.0, share * (1 - share)))


def _exponential(mean: float) -> float:
    """Many small losses and a few large ones: the standard deviation about equals the mean."""
    return mean


METRICS: dict[str, Metric] = {
    "accuracy": Metric("max", _accuracies, _binomial),
    "log_loss": Metric("min", log_losses, _exponential),
    "macro_f1": Metric("max", _macro_f1s, _binomial),
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

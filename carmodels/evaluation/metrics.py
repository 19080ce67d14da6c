"""Metrics: rows that turn probabilities and labels into a score."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from carmodels.evaluation.predictions import few_names

FLOOR = float(np.finfo(np.float32).eps)  # log loss of a probability of 0, as in scikit-learn for float32
_Score = TypeVar("_Score", float, np.ndarray)


@dataclass(frozen=True)
class Metric:
    """A way to score probabilities. A new metric is one row in `METRICS`."""

    mode: Literal["max", "min"]
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray]  # probs (K, N, C), labels (N,) or (K, N) -> (K,)
    spread: Callable[[float], float]  # a score -> about how far single images lie apart, standard deviation

    def score(self, probs: np.ndarray, labels: np.ndarray) -> float:
        """probs (N, C), labels (N,) -> score; ValueError where the two do not fit."""
        check_labels(probs, labels)
        return float(self.scores(probs[None], labels)[0])

    def gain(self, new: _Score, old: _Score) -> _Score:
        """How much better `new` is than `old`; negative: worse."""
        gained: _Score = new - old if self.mode == "max" else old - new
        return gained


def check_labels(probs: np.ndarray, labels: np.ndarray) -> None:
    """A wrong shape would broadcast and a negative label would wrap around, both silently."""
    if probs.ndim != 2 or labels.shape != probs.shape[:1]:
        raise ValueError(f"labels of shape {labels.shape} do not fit probs of shape {probs.shape}")
    if not len(labels):
        raise ValueError("there is no image to score")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= probs.shape[1]:
        raise ValueError(
            f"labels must be integers from 0 to {probs.shape[1] - 1}: {few_names(np.unique(labels))}"
        )


def _accuracies(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    shares: np.ndarray = (probs.argmax(axis=-1) == labels).mean(axis=-1)
    return shares


def log_losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    columns = np.broadcast_to(labels, probs.shape[:-1])[..., None]
    right = np.take_along_axis(probs, columns, axis=-1)[..., 0].astype(np.float64)
    losses: np.ndarray = -np.log(np.clip(right, FLOOR, 1)).mean(axis=-1)
    return losses


def _macro_f1s(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    classes = np.arange(probs.shape[-1])
    guessed = probs.argmax(axis=-1)[..., None] == classes
    true = np.asarray(labels)[..., None] == classes
    hits, either = (guessed & true).sum(axis=-2), guessed.sum(axis=-2) + true.sum(axis=-2)
    scores: np.ndarray = (2 * hits / np.maximum(either, 1)).sum(axis=-1) / (either > 0).sum(axis=-1)
    return scores


def _binomial(share: float) -> float:
    """Right or wrong, as a coin."""
    return math.sqrt(max(0.0, share * (1 - share)))


def _exponential(mean: float) -> float:
    """Many small losses and a few large ones: about as far apart as they are large."""
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
    """probs (N, C), labels (N,) -> mean of -log(probability at the label), nats; 0 counts as 1.2e-7."""
    return METRICS["log_loss"].score(probs, labels)


def macro_f1(probs: np.ndarray, labels: np.ndarray) -> float:
    """probs (N, C), labels (N,) -> mean F1 of the classes that occur or were guessed, as in scikit-learn."""
    return METRICS["macro_f1"].score(probs, labels)


def get_metric(name: str) -> Metric:
    if name not in METRICS:
        raise ValueError(f"metric={name!r} is not one of {', '.join(METRICS)}")
    return METRICS[name]


def right_and_wrong(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """How many images went from wrong to right, and how many from right to wrong; probs (N, C) each."""
    check_labels(before, labels)
    check_labels(after, labels)
    was, now = before.argmax(axis=1) == labels, after.argmax(axis=1) == labels
    return int((now & ~was).sum()), int((was & ~now).sum())

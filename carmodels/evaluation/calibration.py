"""Temperature scaling, and the confidence above which answers reach a wanted accuracy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from carmodels.evaluation.intervals import Interval, accuracy_interval
from carmodels.evaluation.metrics import FLOOR, check_labels, log_loss
from carmodels.evaluation.predictions import Predictions

_TEMPERATURE_RANGE = (0.05, 20.0)
_PRIOR_STD = 0.5  # of the log temperature, which varies this much between models
MIN_ANSWERED = 20  # images; accuracy on fewer is no evidence


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """The most probable temperature of probs (N, C), from 0.05 to 20 (Guo et al., 2017).

    It divides the log probabilities, which equal the logits up to a constant a row; > 1 makes them softer.
    A normal prior keeps its logarithm near 0. Without it, a few images that are all correct would lead to
    probabilities close to 0 and 1.
    """
    from scipy.optimize import minimize_scalar  # imported here: it would add 0.4 s to the start of a trial

    check_labels(probs, labels)
    fit = minimize_scalar(
        lambda log_t: (
            len(labels) * log_loss(apply_temperature(probs, np.exp(log_t)), labels)
            + (log_t / _PRIOR_STD) ** 2 / 2
        ),
        bounds=np.log(_TEMPERATURE_RANGE),
        method="bounded",
    )
    return float(np.exp(fit.x))


def with_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Softer (temperature > 1) or sharper (< 1) predictions. The order of classes in a row stays."""
    if not (np.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be a finite number > 0")
    return replace(predictions, probs=apply_temperature(predictions.probs, temperature))


def apply_temperature(probs: np.ndarray, temperature: float) -> np.ndarray:
    """probs (N, C) to the power of 1 / temperature, with rows scaled to sum 1."""
    logits = np.log(np.maximum(probs, FLOOR, dtype=np.float64)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    scaled: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return scaled


def confidence_threshold(probs: np.ndarray, labels: np.ndarray, accuracy: float) -> float:
    """The smallest confidence above which answers reach `accuracy`, from probs (N, C).

    0 if all answers together do. Infinity if not even the `MIN_ANSWERED` most confident ones do. Answering
    above a confidence only is selective classification (El-Yaniv and Wiener, 2010).
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"{accuracy=} must be from 0 to 1")
    check_labels(probs, labels)
    order = np.argsort(-probs.max(axis=1), kind="stable")
    confidence, correct = probs.max(axis=1)[order], (probs.argmax(axis=1) == labels)[order]
    answered = np.arange(1, len(order) + 1)
    enough = (correct.cumsum() >= accuracy * answered) & (answered >= min(MIN_ANSWERED, len(order)))
    enough &= np.append(confidence[:-1] > confidence[1:], True)  # no threshold between equal confidences
    if not enough.any():
        return math.inf
    return 0.0 if enough[-1] else float(confidence[enough][-1])


def selective_accuracy(
    probs: np.ndarray, labels: np.ndarray, confidence: float, *, groups: np.ndarray
) -> Interval | None:
    """Accuracy and its 95 % interval over answers of at least this confidence. None if there are none.

    `groups` (N,) are as in `intervals`.
    """
    check_labels(probs, labels)
    given = probs.max(axis=1) >= confidence
    return accuracy_interval(probs[given], labels[given], groups=groups[given]) if given.any() else None

"""Temperatures, and the confidence from which answers are right often enough."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from carmodels.evaluation.intervals import Interval, accuracy_interval
from carmodels.evaluation.metrics import FLOOR, check_labels, log_loss
from carmodels.evaluation.predictions import Predictions

_TEMPERATURES = (0.05, 20.0)
_LOG_T = 0.5  # what the logarithm of a temperature varies by between models
FEWEST_ANSWERED = 20  # images, to say how often answers of so much confidence are right


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """The likeliest temperature of probs (N, C), from 0.05 to 20 (Guo et al., 2017).

    It divides the log of the probabilities, the logits up to a constant a row; > 1 makes them softer. Its
    logarithm is taken to be about 0 beforehand, give or take `_LOG_T`: a few images that are all right
    would else ask for certainty.
    """
    from scipy.optimize import minimize_scalar  # here, as every trial would pay 0.4 s at its start for it

    check_labels(probs, labels)
    found = minimize_scalar(
        lambda log_t: (
            len(labels) * log_loss(tempered(probs, np.exp(log_t)), labels) + (log_t / _LOG_T) ** 2 / 2
        ),
        bounds=np.log(_TEMPERATURES),
        method="bounded",
    )
    return float(np.exp(found.x))


def with_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """The same order of classes in every row, softer (temperature > 1) or sharper (between 0 and 1)."""
    if not (np.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be a finite number > 0")
    return replace(predictions, probs=tempered(predictions.probs, temperature))


def tempered(probs: np.ndarray, temperature: float) -> np.ndarray:
    """probs (N, C) to the power of 1 / temperature, rows scaled to sum 1."""
    scaled = np.log(np.maximum(probs, FLOOR, dtype=np.float64)) / temperature
    raised = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    softened: np.ndarray = raised / raised.sum(axis=1, keepdims=True)
    return softened


def confidence_threshold(probs: np.ndarray, labels: np.ndarray, accuracy: float) -> float:
    """The smallest confidence from which on the answers are right so often, over rows of probs (N, C).

    0 where that is so of all answers; infinity where it is not so even of the `FEWEST_ANSWERED` most
    confident ones: fewer prove nothing. The answers from a confidence on are selective classification's
    (El-Yaniv and Wiener, 2010).
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"{accuracy=} must be from 0 to 1")
    check_labels(probs, labels)
    order = np.argsort(-probs.max(axis=1), kind="stable")
    confidence, right = probs.max(axis=1)[order], (probs.argmax(axis=1) == labels)[order]
    answered = np.arange(1, len(order) + 1)
    enough = (right.cumsum() >= accuracy * answered) & (answered >= min(FEWEST_ANSWERED, len(order)))
    enough &= np.append(confidence[:-1] > confidence[1:], True)  # equal confidence, equal treatment
    if not enough.any():
        return math.inf
    return 0.0 if enough[-1] else float(confidence[enough][-1])


def selective_accuracy(probs: np.ndarray, labels: np.ndarray, confidence: float) -> Interval | None:
    """Accuracy, with its 95 % interval, of the answers of so much confidence; None where there are none."""
    check_labels(probs, labels)
    chosen = probs.max(axis=1) >= confidence
    return accuracy_interval(probs[chosen], labels[chosen]) if chosen.any() else None

"""A linear probe: ridge regression to one-hot labels on a frozen backbone's features, in closed form.

It ranks backbones for a hundredth of what fine-tuning costs, and its solution can start the classifier of a
fine-tuned network (LP-FT; Kumar et al., 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from carmodels.evaluation.calibration import apply_temperature, fit_temperature

PENALTIES = tuple(np.geomspace(1e-3, 1e2, 11).tolist())  # of the weights, per image
_SHARPNESS = 10.0  # of the softmax over ridge scores, which lie near 0 and 1, at temperature 1
_SMALLEST = 1e-10  # share of the largest eigenvalue below which a direction counts as empty


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of features (N, F), with calibrated probabilities."""

    weight: np.ndarray  # (F, C), of the logits
    bias: np.ndarray  # (C,)
    penalty: float  # chosen by cross-validation, per image

    def logits(self, features: np.ndarray) -> np.ndarray:
        """features (N, F) -> (N, C)."""
        logits: np.ndarray = features @ self.weight + self.bias
        return logits


def fit_linear_probe(
    features: np.ndarray, labels: np.ndarray, folds: np.ndarray, *, classes: int
) -> tuple[LinearProbe, np.ndarray]:
    """The probe of features (N, F) with labels (N,), and its out-of-fold probabilities (N, C).

    `folds` (N,) says in which fold an image is held out; images of one group share a fold. The penalty has
    the least out-of-fold squared error, the temperature the least out-of-fold log loss.
    """
    _check(features, labels, folds)
    ridge = _Ridge.of(features, np.eye(classes)[labels])
    held_out = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
    tried = [ridge.held_out_scores(penalty, held_out) for penalty in PENALTIES]
    errors = [float(((scores - ridge.targets) ** 2).sum()) for scores in tried]
    best = int(np.argmin(errors))
    temperature = fit_temperature(_softmax(tried[best]), labels)
    weight, bias = ridge.solution(PENALTIES[best])
    scale = _SHARPNESS / temperature
    probe = LinearProbe(scale * weight, scale * bias, PENALTIES[best])
    return probe, apply_temperature(_softmax(tried[best]), temperature)


def _check(features: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> None:
    if not len(features) == len(labels) == len(folds):
        raise ValueError(
            f"{len(features)} features, {len(labels)} labels, {len(folds)} folds: give as many of each"
        )
    if not np.isfinite(features).all():
        raise ValueError("the features are not finite: the backbone's weights do not fit")
    if len(np.unique(folds)) < 2:
        raise ValueError("all images are in one fold: give two folds or more")


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Ridge scores (N, C) -> probabilities (N, C) at temperature 1."""
    powers = np.exp(_SHARPNESS * (scores - scores.max(axis=1, keepdims=True)))
    probs: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return probs


@dataclass(frozen=True, eq=False)
class _Ridge:
    """Ridge regression on standardised features with a free intercept, for any penalty."""

    mean: np.ndarray  # (F,) of the features
    std: np.ndarray  # (F,)
    features: np.ndarray  # (N, F), standardised
    targets: np.ndarray  # (N, C)
    vectors: np.ndarray  # (N, R), the left singular vectors of `features`
    values: np.ndarray  # (R,), the squared singular values

    @classmethod
    def of(cls, features: np.ndarray, targets: np.ndarray) -> _Ridge:
        mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
        std = np.where(std > 0, std, 1.0)  # a constant feature becomes 0
        standard = (features - mean) / std
        if standard.shape[0] < standard.shape[1]:
            values, vectors = np.linalg.eigh(standard @ standard.T)
        else:
            values, right = np.linalg.eigh(standard.T @ standard)
        filled = values > _SMALLEST * values[-1]
        values = values[filled]
        if standard.shape[0] < standard.shape[1]:
            vectors = vectors[:, filled]
        else:
            vectors = standard @ right[:, filled] / np.sqrt(values)
        return cls(mean, std, standard, targets, vectors, values)

    def held_out_scores(self, penalty: float, held_out: list[np.ndarray]) -> np.ndarray:
        """Scores (N, C) of each image by the ridge fitted without its fold, exact, from one fit to all.

        With the hat matrix H, residuals of a fold left out are (I - H_ff)^-1 times those of the fit to all
        (Allen, 1974, for single rows).
        """
        count = len(self.targets)
        shrunk = self.vectors * (self.values / (self.values + penalty * count))  # (N, R)
        centred = self.targets - self.targets.mean(axis=0)
        residuals = centred - shrunk @ (self.vectors.T @ centred)
        scores = np.empty_like(self.targets)
        for rows in held_out:
            hat = shrunk[rows] @ self.vectors[rows].T + 1 / count
            scores[rows] = self.targets[rows] - np.linalg.solve(np.eye(len(rows)) - hat, residuals[rows])
        return scores

    def solution(self, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights (F, C) and intercept (C,) for features as given."""
        share = self.targets.mean(axis=0)
        dual = self.vectors.T @ (self.targets - share) / (self.values + penalty * len(self.targets))[:, None]
        weight = (self.features.T @ (self.vectors @ dual)) / self.std[:, None]
        return weight, share - self.mean @ weight

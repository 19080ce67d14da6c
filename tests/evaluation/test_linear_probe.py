"""The linear probe's closed form is the one of scikit-learn, fitted fold by fold."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from carmodels.evaluation import linear_probe
from carmodels.evaluation.linear_probe import fit_linear_probe
from carmodels.evaluation.metrics import log_loss

CLASSES, IMAGES = 4, 120


def example(features: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (N, F) of which two tell the classes apart, labels (N,), folds (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, IMAGES)
    values = rng.normal(3.0, 2.0, (IMAGES, features)).astype(np.float32)
    values[:, 0] += 8 * (labels % 2)
    values[:, 1] += 8 * (labels // 2)
    return values, labels, rng.integers(0, 5, IMAGES)


@pytest.mark.parametrize("features", [6, 300], ids=["fewer features than images", "more"])
def test_held_out_scores_are_those_of_a_ridge_fitted_without_the_fold(features: int) -> None:
    values, labels, folds = example(features)
    targets = np.eye(CLASSES)[labels]
    ridge = linear_probe._Ridge.of(values, targets)
    found = ridge.held_out_scores(0.1, [np.flatnonzero(folds == fold) for fold in range(5)])
    standard = (values - values.mean(0, dtype=float)) / values.std(0, dtype=float)
    for fold in range(5):
        out = folds == fold
        reference = Ridge(alpha=0.1 * IMAGES).fit(standard[~out], targets[~out])
        np.testing.assert_allclose(found[out], reference.predict(standard[out]), atol=1e-6)


@pytest.mark.parametrize("features", [6, 300], ids=["fewer features than images", "more"])
def test_the_solution_is_the_ridge_fitted_to_all(features: int) -> None:
    values, labels, _ = example(features)
    targets = np.eye(CLASSES)[labels]
    weight, bias = linear_probe._Ridge.of(values, targets).solution(0.1)
    standard = (values - values.mean(0, dtype=float)) / values.std(0, dtype=float)
    reference = Ridge(alpha=0.1 * IMAGES).fit(standard, targets)
    np.testing.assert_allclose(values @ weight + bias, reference.predict(standard), atol=1e-6)


def test_it_learns_the_classes_and_its_out_of_fold_probabilities_are_calibrated() -> None:
    values, labels, folds = example(6)
    probe, probs = fit_linear_probe(values, labels, folds, classes=CLASSES)
    np.testing.assert_allclose(probs.sum(1), 1)
    assert (probs.argmax(1) == labels).mean() > 0.7
    assert (probe.logits(values).argmax(1) == labels).mean() > 0.7
    sharper, softer = probs**1.3, probs**0.7
    for other in (sharper, softer):
        assert log_loss(probs, labels) < log_loss(other / other.sum(1, keepdims=True), labels)


def test_noise_gives_a_strong_penalty_and_chance() -> None:
    values, labels, folds = example(300)
    values[:, :2] = 0.0  # constant features are no harm
    probe, probs = fit_linear_probe(values, labels, folds, classes=CLASSES)
    assert probe.penalty >= 1
    assert (probs.argmax(1) == labels).mean() < 0.4


def test_a_class_that_one_fold_alone_holds_is_no_error() -> None:
    values, labels, folds = example(6)
    labels[labels == 3] = 2
    labels[0] = 3
    assert np.isfinite(fit_linear_probe(values, labels, folds, classes=CLASSES)[1]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v, la, f: (v[:-1], la, f), "119 features, 120 labels, 120 folds"),
        (lambda v, la, f: (np.where(v > 5, np.nan, v), la, f), "not finite"),
        (lambda v, la, f: (v, la, 0 * f), "one fold"),
    ],
    ids=["lengths", "nan", "one fold"],
)
def test_what_does_not_fit_is_named(change, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        fit_linear_probe(*change(*example(6)), classes=CLASSES)

"""A linear probe of a backbone on some of the images, and on more of them later."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from carmodels.data.dataset import Splits
from carmodels.models.classifier import Classifier, create_classifier
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig
from carmodels.training.probing import extract_features, probe, stratified_order


@pytest.fixture
def model(config: TrialConfig, splits: Splits, weights: Weights) -> Classifier:
    return create_classifier(config, classes=len(splits.classes), weights=weights)


def test_features_are_the_backbones_outputs_for_the_plain_images(model: Classifier, splits: Splits) -> None:
    found = extract_features(model, splits, splits.val, image_size=32)
    assert found.shape == (len(splits.val), model.head[0].in_features)
    from carmodels.data.loader import Loader

    (batch,) = Loader(splits.images, splits.val, image_size=32, batch_size=len(splits.val)).epoch(0)
    with torch.inference_mode():
        expected = model.eval().backbone(model.normalise(batch.images)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_probing_more_images_later_comes_to_the_same(model: Classifier, splits: Splits) -> None:
    half = splits.train.subset(np.arange(len(splits.train)) < 60)
    first = probe(model, splits, half, image_size=32)
    further = probe(model, splits, splits.train, image_size=32, known=first)
    at_once = probe(model, splits, splits.train, image_size=32)
    np.testing.assert_allclose(further.features, at_once.features, atol=1e-5)
    np.testing.assert_array_equal(further.right, at_once.right)
    assert first.right.shape == (60,)
    assert at_once.accuracy > 2 / len(splits.classes)


def test_near_duplicates_are_held_out_together(model: Classifier, splits: Splits) -> None:
    """Each image twice under random labels: only a copy in the training folds could tell an image's label."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 50)
    twice = np.concatenate([splits.train.rows[:50], splits.train.rows[:50]])
    split = replace(splits.train, ids=splits.train.ids[:100], labels=np.tile(labels, 2), rows=twice)
    found = probe(model, replace(splits, classes=("a", "b")), split, image_size=32)
    assert found.accuracy < 0.75


def test_each_beginning_of_the_order_holds_the_classes_in_their_shares() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    order = stratified_order(labels, seed=0)
    assert sorted(order) == list(range(1000))
    for count in (10, 50, 200):
        found = np.bincount(labels[order[:count]], minlength=3) / count
        np.testing.assert_allclose(found, [0.6, 0.3, 0.1], atol=1.5 / count)
    assert list(order) != list(stratified_order(labels, seed=1))

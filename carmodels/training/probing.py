"""Frozen features of some images, and how well a linear probe on them classifies."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from carmodels.data.dataset import Splits
from carmodels.data.loader import Loader
from carmodels.data.splits import Split, assign_folds
from carmodels.evaluation.linear_probe import fit_linear_probe
from carmodels.models.classifier import Classifier
from carmodels.training.forward import autocast
from carmodels.training.memory import PartwiseForward

PROBE_FOLDS = 5
_BATCH = 32  # images of a forward pass


@dataclass(frozen=True, eq=False)
class Probed:
    """Out-of-fold answers of a linear probe on a backbone's frozen features."""

    features: np.ndarray  # (N, F) float32, of the plain images
    right: np.ndarray  # (N,) bool, whether the image was classified correctly out of fold
    seconds: float  # per image, of loading and the forward pass

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


@torch.inference_mode()
def extract_features(
    model: Classifier,
    splits: Splits,
    split: Split,
    *,
    image_size: int,
    device: str = "cpu",
    processes: int = 0,
) -> np.ndarray:
    """(N, F) float32 pooled outputs of the model's backbone for the plain images of a split, in order."""
    on, model = torch.device(device), model.to(device).eval()
    loader = Loader(splits.images, split, image_size=image_size, batch_size=_BATCH, processes=processes)
    precision, forward, found = autocast(on), PartwiseForward(model.backbone), []
    for batch in loader.epoch(0):
        with precision():
            images = model.normalise(batch.images.to(on, non_blocking=True))
            found.append(forward(images).float())
    return torch.cat(found).cpu().numpy()


def probe(
    model: Classifier,
    splits: Splits,
    split: Split,
    *,
    image_size: int,
    seed: int = 0,
    device: str = "cpu",
    processes: int = 0,
    known: Probed | None = None,
) -> Probed:
    """Cross-validates a linear probe of the model's backbone on a labelled split.

    `known` is an earlier result on the first images of the split; only the others are computed.
    Near-duplicates share a fold. Raises ValueError for a split with too few images for the folds.
    """
    assert split.labels is not None, f"{split.name} has no labels"
    done = 0 if known is None else len(known.features)
    started = time.monotonic()
    rest = split.subset(np.arange(len(split)) >= done)
    new = extract_features(model, splits, rest, image_size=image_size, device=device, processes=processes)
    seconds = (time.monotonic() - started) / max(1, len(rest))
    features = new if known is None else np.concatenate([known.features, new])
    folds = assign_folds(split.labels, splits.images.groups[split.rows], PROBE_FOLDS, seed)
    _, probs = fit_linear_probe(features, split.labels, folds, classes=len(splits.classes))
    return Probed(features, probs.argmax(axis=1) == split.labels, seconds)


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """(N,) positions such that each beginning of them holds the classes in about their shares."""
    rng = np.random.default_rng(seed)
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        place[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    order: np.ndarray = np.argsort(place, kind="stable")
    return order

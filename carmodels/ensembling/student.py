"""Knowledge distillation: an ensemble's predictions of train as targets for one small model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from carmodels.catalog import AUGMENTS
from carmodels.data.dataset import Splits
from carmodels.data.loader import Loader
from carmodels.ensembling.network import Ensemble
from carmodels.evaluation.calibration import apply_temperature
from carmodels.models.classifier import Classifier
from carmodels.training.forward import autocast
from carmodels.training.memory import PartwiseForward
from carmodels.training.run import Run

TEACHER_WEIGHT = 0.7  # of the teacher's probabilities in a target; the rest is the label's
_MAX_TEMPERATURE = 20.0
_BATCH_SIZE = 64


@torch.inference_mode()
def predict_train(
    teacher: Ensemble,
    splits: Splits,
    run: Run,
    *,
    views: int,
    device: str = "cpu",
    processes: int = 0,
) -> np.ndarray:
    """The teacher's probabilities (V, N, C) of the train images as augmented in a student run's epochs.

    Teacher and student see the same crops and flips, each at its own image size, because a loader's
    augmentation depends on seed, epoch and position only. Long training pays with such consistent teaching
    (Beyer et al., 2022). It is limited to `views` epochs, since each costs a pass of every member.
    """
    models = cast(Sequence[Classifier], list(teacher.models))
    plain = Ensemble(replace(teacher.spec, views=("plain",)), models).to(device)
    loaders = [
        Loader(
            splits.images,
            splits.train,
            image_size=spec.size,
            batch_size=_BATCH_SIZE,
            augment=AUGMENTS[run.config.augment],
            seed=run.origin.seed,
            processes=processes,
        )
        for spec in plain.spec.inputs
    ]
    with autocast(torch.device(device))():
        forward = PartwiseForward(plain)
        return np.stack([_predict_epoch(forward, loaders, epoch, device) for epoch in range(views)])


def _predict_epoch(
    teacher: PartwiseForward, loaders: Sequence[Loader], epoch: int, device: str
) -> np.ndarray:
    """(N, C) in the order of train."""
    probs = [
        teacher(*(batch.images.to(device) for batch in batches)).float().cpu()
        for batches in zip(*(loader.epoch(epoch) for loader in loaders), strict=True)
    ]
    return torch.cat(probs).numpy()


def soft_targets(
    teacher_probs: np.ndarray, labels: np.ndarray, confidence: float, weight: float = TEACHER_WEIGHT
) -> tuple[np.ndarray, float]:
    """The teacher's probabilities (V, N, C) softened and mixed with the labels (N,); and their temperature.

    The members were trained on these images, so they are more confident than on others, and little is left of
    what a student learns beyond the labels: the ranks of the wrong classes. The temperature lowers the mean
    confidence to `confidence`, the ensemble's on unseen images.
    """
    if not 0 < confidence <= 1 or not 0 <= weight <= 1:
        raise ValueError(f"{confidence=} and {weight=} must be from 0 to 1")
    rows = teacher_probs.reshape(-1, teacher_probs.shape[-1])
    temperature = _temperature_for(rows, confidence)
    softened = apply_temperature(rows, temperature).reshape(teacher_probs.shape)
    one_hot = np.eye(teacher_probs.shape[-1])[labels]
    return (weight * softened + (1 - weight) * one_hot).astype(np.float32), temperature


def _temperature_for(probs: np.ndarray, confidence: float) -> float:
    """The temperature, 1 to 20, at which the mean largest probability of (N, C) is `confidence`."""
    from scipy.optimize import brentq  # imported here, since every trial would pay for it

    def excess(log_t: float) -> float:
        return float(apply_temperature(probs, np.exp(log_t)).max(axis=1).mean()) - confidence

    if excess(0.0) <= 0:
        return 1.0
    if excess(np.log(_MAX_TEMPERATURE)) >= 0:
        return _MAX_TEMPERATURE
    return float(np.exp(brentq(excess, 0.0, np.log(_MAX_TEMPERATURE), xtol=1e-3)))

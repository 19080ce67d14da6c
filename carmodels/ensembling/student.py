"""What an ensemble says of train, as targets for one small model (knowledge distillation)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from carmodels.catalog import AUGMENTS
from carmodels.data.dataset import Splits
from carmodels.data.loader import Loader
from carmodels.ensembling.network import Ensemble
from carmodels.evaluation.calibration import apply_temperature
from carmodels.models.classifier import Classifier
from carmodels.training.forward import autocast
from carmodels.training.run import Run

TAUGHT = 0.7  # of a target is the teacher's, the rest the label's
_SOFTEST = 20.0
_AT_ONCE = 64  # images


@torch.inference_mode()
def taught(
    teacher: Ensemble,
    splits: Splits,
    run: Run,
    *,
    views: int,
    device: str = "cpu",
    processes: int = 0,
) -> np.ndarray:
    """(V, N, C): what the teacher says of every train image in each of `views` epochs of the student.

    Both see the same crops and flips, each at its own size: a loader draws them by seed, epoch and position
    alone. That the teacher is shown what the student sees is what makes long training pay (Beyer et al.,
    2022: "consistent teaching"); it is asked about a few fixed epochs, as every question costs all members.
    """
    plain = Ensemble(replace(teacher.spec, views=("plain",)), list(_models(teacher))).to(device)
    loaders = [
        Loader(
            splits.images,
            splits.train,
            image_size=shape.size,
            batch_size=_AT_ONCE,
            augment=AUGMENTS[run.config.augment],
            seed=run.origin.seed,
            processes=processes,
        )
        for shape in plain.spec.inputs
    ]
    with autocast(torch.device(device))():
        return np.stack([_answers(plain, loaders, view, device) for view in range(views)])


def _models(teacher: Ensemble) -> Sequence[Classifier]:
    return [model for model in teacher.models if isinstance(model, Classifier)]


def _answers(teacher: Ensemble, loaders: Sequence[Loader], view: int, device: str) -> np.ndarray:
    """(N, C) in the order of train."""
    parts = [
        teacher(*(batch.images.to(device) for batch in batches)).float().cpu()
        for batches in zip(*(loader.epoch(view) for loader in loaders), strict=True)
    ]
    return torch.cat(parts).numpy()


def soft_targets(
    answers: np.ndarray, labels: np.ndarray, confidence: float, share: float = TAUGHT
) -> tuple[np.ndarray, float]:
    """The teacher's answers, (V, N, C), mixed with the labels, (N,), and the temperature put on them first.

    The members have learnt these images, so they are surer of them than of others, and the ranks of the
    wrong classes, which are what there is to learn beyond the labels, are almost nothing. The temperature
    brings the mean confidence down to `confidence`, the ensemble's on images that it has not learnt.
    """
    if not 0 < confidence <= 1 or not 0 <= share <= 1:
        raise ValueError(f"{confidence=} and {share=} must be from 0 to 1")
    flat = answers.reshape(-1, answers.shape[-1])
    temperature = _as_sure_as(flat, confidence)
    softer = apply_temperature(flat, temperature).reshape(answers.shape)
    right = np.eye(answers.shape[-1])[labels]
    return (share * softer + (1 - share) * right).astype(np.float32), temperature


def _as_sure_as(probs: np.ndarray, confidence: float) -> float:
    """The temperature, 1 to 20, at which the mean largest probability of (N, C) is `confidence`."""
    from scipy.optimize import brentq  # here, as every trial would pay for it at its start

    def surer(log_t: float) -> float:
        return float(apply_temperature(probs, np.exp(log_t)).max(axis=1).mean()) - confidence

    if surer(0.0) <= 0:
        return 1.0
    if surer(np.log(_SOFTEST)) >= 0:
        return _SOFTEST
    return float(np.exp(brentq(surer, 0.0, np.log(_SOFTEST), xtol=1e-3)))

"""Measures the cost of a training step."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from carmodels.data.dataset import Splits
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig
from carmodels.training.run import Run
from carmodels.training.trainer import Trainer


def training_seconds(
    config: TrialConfig,
    splits: Splits,
    *,
    weights: Weights,
    device: str = "cpu",
    processes: int = 0,
    compiled: bool = False,
) -> float:
    """Seconds per image of loading and training with the whole network unfrozen, over a few steps.

    The median, except with loader processes: they have batches ready for the first steps, so it is the mean
    of the second half.
    """
    steps = 4 + 6 * processes
    trainer = Trainer(
        Run(replace(config, unfreeze="full", start_image_size=0)),
        splits,
        weights=weights,
        device=torch.device(device),
        processes=processes,
        compiled=compiled,
    )
    trainer.model.unfreeze_top(len(trainer.model.groups))
    trainer.model.train()
    batches = trainer.train_batches(1)
    seconds: list[float] = []
    for _ in range(min(steps, len(trainer.train_loader))):
        started = time.monotonic()
        images, labels = next(batches)
        float(trainer.step(images, labels))
        seconds.append((time.monotonic() - started) / len(labels))
    return float(np.mean(seconds[len(seconds) // 2 :]) if processes else np.median(seconds[1:] or seconds))

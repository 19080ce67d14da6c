"""What a training step costs."""

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
    """What loading and training on one image cost with everything open, in a few steps.

    Their median; with loader processes, which work ahead at first, the mean of the later ones.
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
    shown = trainer.shown(1)
    taken: list[float] = []
    for _ in range(min(steps, len(trainer.train_loader))):
        started = time.monotonic()
        images, labels = next(shown)
        float(trainer.step(images, labels))
        taken.append((time.monotonic() - started) / len(labels))
    return float(np.mean(taken[len(taken) // 2 :]) if processes else np.median(taken[1:] or taken))

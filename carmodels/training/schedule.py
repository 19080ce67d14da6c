"""Learning rate schedules."""

from __future__ import annotations

import math

import torch

from carmodels.catalog import Schedule


class LearningRate:
    """Sets the optimizer's learning rate by a row of SCHEDULES: every step, or for plateau every epoch."""

    def __init__(self, row: Schedule, optimizer: torch.optim.Optimizer, steps: int) -> None:
        warmup = max(1, round(row.warmup * steps))

        def factor(step: int) -> float:
            rising = min(1.0, (step + 1) / warmup) if row.warmup else 1.0
            if row.kind != "cosine" or step < warmup:
                return rising
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        self._by_epoch = None
        self._by_step = None
        if row.kind == "plateau":
            self._by_epoch = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=row.factor, patience=row.patience
            )
        else:
            self._by_step = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def step_ended(self) -> None:
        if self._by_step is not None:
            self._by_step.step()

    def epoch_ended(self, loss: float) -> None:
        """`loss`: of val, or of train if the held-out images must not influence training."""
        if self._by_epoch is not None:
            self._by_epoch.step(loss)

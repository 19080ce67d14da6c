"""The learning rate over a run."""

from __future__ import annotations

import math

import torch

from carmodels.catalog import Schedule


class LearningRate:
    """A row of SCHEDULES at work: told of every step and epoch's val loss, it sets the learning rate.

    Where val has no say it is told the training loss instead.
    """

    def __init__(self, row: Schedule, optimizer: torch.optim.Optimizer, steps: int) -> None:
        warmup = max(1, round(row.warmup * steps))

        def factor(step: int) -> float:
            rising = min(1.0, (step + 1) / warmup) if row.warmup else 1.0
            if row.kind != "cosine" or step < warmup:
                return rising
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        self._plateau = None
        self._by_step = None
        if row.kind == "plateau":
            self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=row.factor, patience=row.patience
            )
        else:
            self._by_step = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def step_ended(self) -> None:
        if self._by_step is not None:
            self._by_step.step()

    def epoch_ended(self, loss: float) -> None:
        if self._plateau is not None:
            self._plateau.step(loss)

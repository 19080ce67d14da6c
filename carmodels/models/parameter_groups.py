"""Which layer groups learn in an epoch, and the optimizer's parameter groups."""

from __future__ import annotations

import math

from carmodels.catalog import UNFREEZE, Unfreeze
from carmodels.models.classifier import Classifier
from carmodels.training.config import TrialConfig


def trainable_groups(row: Unfreeze, *, epoch: int, epochs: int, groups: int) -> int:
    """How many of the backbone's `groups` learn, from the top, in this epoch (the first is 1) of `epochs`."""
    if row.head_only_epochs is None or epoch <= row.head_only_epochs:
        return 0
    steps = max(1, round(row.all_unfrozen_at * epochs) - row.head_only_epochs)
    return math.ceil(groups * min(1.0, (epoch - row.head_only_epochs) / steps))


def optimizer_groups(model: Classifier, config: TrialConfig) -> list[dict[str, object]]:
    """Parameters with their rate and decay: the head at lr, the g-th group below it at lr * layer_decay ** g.

    Biases and normalisation weights (one-dimensional) are not decayed. Layer-wise decay: Howard and Ruder,
    2018; Clark et al., 2020 (ELECTRA).
    """
    named = dict(model.backbone.named_parameters())
    levels = [(config.lr, list(model.head.parameters()))]
    if UNFREEZE[config.unfreeze].head_only_epochs is not None:
        for below, names in enumerate(reversed(model.groups), start=1):
            levels.append((config.lr * config.layer_decay**below, [named[n] for n in names]))
    return [
        {"params": chosen, "lr": lr, "weight_decay": decay}
        for lr, parameters in levels
        for decay, chosen in (
            (config.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        )
        if chosen
    ]

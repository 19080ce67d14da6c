"""Gradual unfreezing and layer-wise learning rates: trainable layer groups, optimizer groups."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from carmodels.catalog import UNFREEZE, Unfreeze
from carmodels.training.config import TrialConfig

if TYPE_CHECKING:  # what costs are planned by needs no torch
    from carmodels.models.backbones import TimmNetwork
    from carmodels.models.classifier import Classifier


def trainable_groups(row: Unfreeze, *, epoch: int, epochs: int, groups: int) -> int:
    """How many of the backbone's layer groups, from the top, train in an epoch; the first epoch is 1."""
    if row.head_only_epochs is None or epoch <= row.head_only_epochs:
        return 0
    steps = max(1, round(row.all_unfrozen_at * epochs) - row.head_only_epochs)
    return math.ceil(groups * min(1.0, (epoch - row.head_only_epochs) / steps))


def optimizer_groups(model: Classifier, config: TrialConfig) -> list[dict[str, object]]:
    """Parameter groups with layer-wise learning rates, spread geometrically between two ends.

    The head has lr and the backbone's bottom layer group lr * lr_ratio. Of G groups the g-th below the head
    has lr * lr_ratio ** (g / G). One-dimensional parameters (biases, normalisation) have no weight decay, nor
    do those that the backbone exempts (position embeddings, class tokens). Howard and Ruder, 2018; Clark et
    al., 2020 (ELECTRA), with a fixed factor from layer to layer.
    """
    named = dict(model.backbone.named_parameters())
    exempt = {id(named[name]) for name in _exempt_from_decay(model.backbone)}
    levels = [(config.lr, list(model.head.parameters()))]
    if UNFREEZE[config.unfreeze].head_only_epochs is not None:
        for depth, names in enumerate(reversed(model.groups), start=1):
            levels.append(
                (config.lr * config.lr_ratio ** (depth / len(model.groups)), [named[n] for n in names])
            )
    return [
        {"params": group, "lr": lr, "weight_decay": decay}
        for lr, parameters in levels
        for decay, group in (
            (config.weight_decay, [p for p in parameters if p.ndim > 1 and id(p) not in exempt]),
            (0.0, [p for p in parameters if p.ndim <= 1 or id(p) in exempt]),
        )
        if group
    ]


def _exempt_from_decay(backbone: TimmNetwork) -> list[str]:
    """Names of the parameters that `no_weight_decay()` of a timm network exempts: whole names or patterns."""
    patterns = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    return [name for name, _ in backbone.named_parameters() if any(fnmatch(name, p) for p in patterns)]

"""What a configuration learns from and what it is scored on."""

from __future__ import annotations

from carmodels.data.dataset import Splits
from carmodels.data.resplit import with_all_labelled, with_fold
from carmodels.training.config import TrialConfig


def splits_for(config: TrialConfig, splits: Splits) -> Splits:
    """The splits as a configuration sees them: those of its fold, or with everything in train."""
    if config.fold_in:
        return with_all_labelled(splits)
    if not config.folds:
        return splits
    if config.fold is None:
        raise ValueError(f"folds={config.folds}: these are {config.folds} models; name the fold of one")
    return with_fold(splits, folds=config.folds, fold=config.fold, seed=config.seed)

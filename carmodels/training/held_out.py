"""What a run learns from and what it is scored on."""

from __future__ import annotations

from carmodels.data.dataset import Splits
from carmodels.data.resplit import hold_out_fold, merge_into_train
from carmodels.training.run import Origin


def splits_for(origin: Origin, splits: Splits) -> Splits:
    """The splits as a run sees them: those of its fold, or with all labelled images in train."""
    if origin.fold_in:
        return merge_into_train(splits)
    if not origin.folds:
        return splits
    if origin.fold is None:
        raise ValueError(f"folds={origin.folds}: these are {origin.folds} models; name the fold of one")
    return hold_out_fold(splits, folds=origin.folds, fold=origin.fold, seed=origin.seed)

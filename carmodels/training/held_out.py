"""The images that a run trains on, and those held out to score it."""

from __future__ import annotations

from carmodels.data.dataset import Splits
from carmodels.data.resplit import hold_out_fold, merge_into_train
from carmodels.training.run import Origin


def splits_for(origin: Origin, splits: Splits) -> Splits:
    """The splits of a run: the study's, those of its fold, or with all labelled images in train.

    Raises ValueError for folds without a fold.
    """
    if origin.fold_in:
        return merge_into_train(splits)
    if not origin.folds:
        return splits
    if origin.fold is None:
        raise ValueError(f"folds={origin.folds}: these are {origin.folds} models; name the fold of one")
    return hold_out_fold(splits, folds=origin.folds, fold=origin.fold, seed=origin.seed)

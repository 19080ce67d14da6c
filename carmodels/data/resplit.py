"""Other splits of an open data set: K folds of train and val, or all labelled images in train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from carmodels.data.dataset import Splits
from carmodels.data.splits import Split, assign_folds, hash_split


def hold_out_fold(splits: Splits, *, folds: int, fold: int, seed: int) -> Splits:
    """Splits train and val together into folds: `val` is the given one, named "oof", `train` the others."""
    pool = _concatenate("pool", (splits.train, splits.val))
    assert pool.labels is not None
    held_out = assign_folds(pool.labels, splits.images.groups[pool.rows], folds, seed) == fold
    train, val = pool.subset(~held_out, "train"), pool.subset(held_out, "oof")
    return _replace_labelled(splits, train, val, splits.holdout)


def merge_into_train(splits: Splits) -> Splits:
    """Moves all labelled images to `train`. `val` and `holdout` are empty."""
    train = _concatenate("train", (splits.train, splits.val, splits.holdout))
    val, holdout = (train.subset(np.zeros(len(train), bool), name) for name in ("val", "holdout"))
    return _replace_labelled(splits, train, val, holdout)


def _concatenate(name: str, parts: Sequence[Split]) -> Split:
    labels = [part.labels for part in parts if part.labels is not None]
    ids = tuple(i for part in parts for i in part.ids)
    return Split(name, ids, np.concatenate(labels), np.concatenate([part.rows for part in parts]))


def _replace_labelled(splits: Splits, train: Split, val: Split, holdout: Split) -> Splits:
    digest = hash_split(train, val, holdout, splits.test)
    return replace(splits, train=train, val=val, holdout=holdout, split_hash=digest)

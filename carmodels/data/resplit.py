"""Other splits of an open data set: K folds of train and val, or all labelled images in train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from carmodels.data.dataset import Splits
from carmodels.data.splits import Split, assign_folds, hash_split


def with_fold(splits: Splits, *, folds: int, fold: int, seed: int) -> Splits:
    """One fold of train and val together becomes `val`, which is called "oof" then, the others `train`."""
    both = _together("both", (splits.train, splits.val))
    assert both.labels is not None
    held_out = assign_folds(both.labels, splits.images.groups[both.rows], folds, seed) == fold
    return _parted(splits, both.part(~held_out, "train"), both.part(held_out, "oof"), splits.holdout)


def with_all_labelled(splits: Splits) -> Splits:
    """All labelled images become `train`; `val` and `holdout` are empty."""
    everything = _together("train", (splits.train, splits.val, splits.holdout))
    val, holdout = (everything.part(np.zeros(len(everything), bool), name) for name in ("val", "holdout"))
    return _parted(splits, everything, val, holdout)


def _together(name: str, parts: Sequence[Split]) -> Split:
    """Labelled parts as one."""
    labels = [part.labels for part in parts if part.labels is not None]
    ids = tuple(i for part in parts for i in part.ids)
    return Split(name, ids, np.concatenate(labels), np.concatenate([part.rows for part in parts]))


def _parted(splits: Splits, train: Split, val: Split, holdout: Split) -> Splits:
    digest = hash_split(train, val, holdout, splits.test)
    return replace(splits, train=train, val=val, holdout=holdout, split_hash=digest)

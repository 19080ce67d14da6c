"""Stratified splits and folds that keep near-duplicates on one side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SPLIT_SHARES = (("train", 0.70), ("val", 0.15), ("holdout", 0.15))


@dataclass(frozen=True)
class Split:
    """A part of the data set. `ids`, `labels` and `rows` are in the same order."""

    name: str  # "train", "val", "holdout", "test", or "oof" for a held-out fold
    ids: tuple[str, ...]  # as in the CSV or sample file, else the path below the folder of classes or tests
    labels: np.ndarray | None  # (N,) int64, index into classes; None for test
    rows: np.ndarray  # (N,) int64, row of each image in the image cache

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, mask: np.ndarray, name: str = "") -> Split:
        """The images where `mask`, (N,) bool, is true, under the same or another name."""
        ids = tuple(self.ids[n] for n in np.flatnonzero(mask))
        labels = None if self.labels is None else self.labels[mask]
        return Split(name or self.name, ids, labels, self.rows[mask])


def short_hash(value: object) -> str:
    """12 hex digits of a JSON value's SHA-256."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def hash_split(*parts: Split) -> str:
    """12 hex digits of the names, ids and labels of the parts."""
    return short_hash(
        [[part.name, part.ids, None if part.labels is None else part.labels.tolist()] for part in parts]
    )


def assign_splits(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """labels (N,), groups (N,) -> (N,) index into `SPLIT_SHARES`: stratified by class, groups kept whole.

    A group counts for the class of its first image. Larger groups are placed first, each in the split where
    its class lacks most images, so no group overfills a small split. ValueError if a split stays empty.
    """
    splits = _assign_groups(labels, groups, seed, lambda label, count: _split_sizes(count))
    for number, (name, _) in enumerate(SPLIT_SHARES):
        if number not in splits:
            raise ValueError(
                f"no image is left for {name}: the {len(labels)} labelled images are near-duplicates of "
                f"{len(np.unique(groups))}, which stay together; add different ones"
            )
    return splits


def assign_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """labels (N,), groups (N,) -> (N,) fold of each image, as in `assign_splits`, with folds of equal size.

    ValueError if a fold stays empty.
    """

    def fold_sizes(label: int, count: int) -> np.ndarray:
        return (count + (np.arange(folds) + label) % folds) // folds  # classes put remainders in other folds

    assigned = _assign_groups(labels, groups, seed, fold_sizes)
    if missing := set(range(folds)) - set(assigned.tolist()):
        raise ValueError(
            f"folds={folds}: no image is left for {len(missing)} of them, {len(labels)} images that are "
            f"near-duplicates of {len(np.unique(groups))} stay together; take fewer folds"
        )
    return assigned


def _assign_groups(
    labels: np.ndarray, groups: np.ndarray, seed: int, sizes_for: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """(N,) part of each image. `sizes_for(class, images)` -> (K,) images of the class for each part."""
    _, first, member = np.unique(groups, return_index=True, return_inverse=True)
    group_sizes = np.bincount(member)
    assigned = np.zeros(len(first), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for label in range(labels.max() + 1):
        shuffled = rng.permutation(np.flatnonzero(labels[first] == label))
        lacking = sizes_for(label, int(group_sizes[shuffled].sum()))
        for group in shuffled[np.argsort(-group_sizes[shuffled], kind="stable")]:
            assigned[group] = np.argmax(lacking)
            lacking[assigned[group]] -= group_sizes[group]
    return assigned[member]


def _split_sizes(count: int) -> np.ndarray:
    """(3,) images of a class for each split, with at least one each if there are three."""
    held_out = [max(int(count >= 3), round(share * count)) for _, share in SPLIT_SHARES[1:]]
    return np.array([count - sum(held_out), *held_out])

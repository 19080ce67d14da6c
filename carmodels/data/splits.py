"""Stratified splits and folds that keep near-duplicates on one side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from carmodels.data.layout import ListedImage

SHARES = (("train", 0.70), ("val", 0.15), ("holdout", 0.15))


@dataclass(frozen=True)
class Split:
    """A part of the data set; ids, labels and rows are in the same order."""

    name: str  # "train", "val", "holdout" or "test"; "oof" is a fold that was held out
    ids: tuple[
        str, ...
    ]  # as in the CSV or sample file, else the path below the folder of the classes or tests
    labels: np.ndarray | None  # (N,) int64, index into classes; None: unknown (test)
    rows: np.ndarray  # (N,) int64, row of each image in images

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, mine: np.ndarray, name: str = "") -> Split:
        """The images, (N,), that are marked as mine, under the same or another name."""
        ids = tuple(self.ids[n] for n in np.flatnonzero(mine))
        return Split(
            name or self.name, ids, None if self.labels is None else self.labels[mine], self.rows[mine]
        )


def short_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def assign_splits(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """labels (N,), groups (N,) -> (N,) index into `SHARES`: stratified by class, groups kept whole.

    A group counts for the class of its first image. Larger groups are placed first, each where its class
    lacks most, so that no group overshoots a small split. Raises ValueError where a split stays empty.
    """
    sides = _assigned(labels, groups, seed, lambda label, count: _shares_of(count))
    for number, (name, _) in enumerate(SHARES):
        if number not in sides:
            raise ValueError(
                f"no image is left for {name}: the {len(labels)} labelled images are near-duplicates of "
                f"{len(np.unique(groups))}, which stay together; add different ones"
            )
    return sides


def assign_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """labels (N,), groups (N,) -> (N,) fold of each image, as in `assign_splits`, all folds alike in size.

    Raises ValueError where a fold stays empty.
    """

    def shares(label: int, count: int) -> np.ndarray:
        return (count + (np.arange(folds) + label) % folds) // folds  # what is over goes to another each time

    sides = _assigned(labels, groups, seed, shares)
    if missing := set(range(folds)) - set(sides.tolist()):
        raise ValueError(
            f"folds={folds}: no image is left for {len(missing)} of them, {len(labels)} images that are "
            f"near-duplicates of {len(np.unique(groups))} stay together; take fewer folds"
        )
    return sides


def _assigned(
    labels: np.ndarray, groups: np.ndarray, seed: int, shares: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """(N,) side of each image; `shares(class, images)` says how many of a class each side gets."""
    _, first, member = np.unique(groups, return_index=True, return_inverse=True)
    sizes = np.bincount(member)
    sides = np.zeros(len(first), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for label in range(labels.max() + 1):
        shuffled = rng.permutation(np.flatnonzero(labels[first] == label))
        lacking = shares(label, int(sizes[shuffled].sum()))
        for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
            sides[group] = np.argmax(lacking)
            lacking[sides[group]] -= sizes[group]
    return sides[member]


def _shares_of(count: int) -> np.ndarray:
    """(3,) images of a class for each split, at least one each where there are three."""
    held_out = [max(int(count >= 3), round(share * count)) for _, share in SHARES[1:]]
    return np.array([count - sum(held_out), *held_out])


def part_of(
    name: str, labelled: list[ListedImage], labels: np.ndarray, rows: np.ndarray, mine: np.ndarray
) -> Split:
    return Split(name, tuple(labelled[n].id for n in np.flatnonzero(mine)), labels[mine], rows[mine])


def hash_split(*parts: Split) -> str:
    return short_hash(
        [[part.name, part.ids, None if part.labels is None else part.labels.tolist()] for part in parts]
    )

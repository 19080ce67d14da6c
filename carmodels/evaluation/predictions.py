"""Predictions: class probabilities together with their ids, so rows are matched by id, never by position."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from carmodels.files import write_atomic
from carmodels.formatting import names_text

_SUM_TOLERANCE = 1e-3  # of a row's sum; half-precision softmax needs it

# What np.load raises for a changed byte, a truncated file, and a file that is not a zip.
_BAD_NPZ = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, eq=False)
class Predictions:
    """One model's probabilities for some images. Checked when created; the array is read-only.

    ValueError for duplicate ids or classes or ones that are not text, a shape other than (ids, classes), a
    value that is not a probability, and a row whose sum differs from 1 by more than 0.001.
    """

    ids: tuple[str, ...]
    classes: tuple[str, ...]
    probs: np.ndarray  # (N, C), float32

    def __post_init__(self) -> None:
        for field in ("ids", "classes"):
            names = tuple(getattr(self, field))
            if not_text := [name for name in names if not isinstance(name, str)]:
                raise ValueError(f"{field} must be text: {names_text(not_text)}")
            refuse_duplicates(names, field)
            object.__setattr__(self, field, names)
        probs = np.array(self.probs, dtype=np.float32)
        _check_probs(probs, self.ids, len(self.classes))
        probs.setflags(write=False)
        object.__setattr__(self, "probs", probs)

    def save(self, path: Path) -> None:
        """Write an npz of three arrays (ids, classes, probs), atomically."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            ids=np.array(self.ids, dtype=str),
            classes=np.array(self.classes, dtype=str),
            probs=self.probs,
        )
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """What `save` wrote, without unpickling anything. ValueError names a damaged file."""
        data = path.read_bytes()
        try:
            if not zipfile.is_zipfile(io.BytesIO(data)):
                raise ValueError("it is no npz")  # NumPy would tell of pickle
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                ids, classes, probs = (stored[name] for name in ("ids", "classes", "probs"))
            return cls(tuple(ids.tolist()), tuple(classes.tolist()), probs)
        except _BAD_NPZ as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to have it computed again") from error

    def aligned(
        self, ids: Sequence[str], *, ours: str = "the predictions", theirs: str = "the ids asked for"
    ) -> Predictions:
        """The same rows in the order of `ids`. ValueError for duplicate ids, or ids that one side lacks.

        `ours` names these predictions in errors, `theirs` names `ids`.
        """
        refuse_duplicates(ids, theirs)
        row_of = {name: row for row, name in enumerate(self.ids)}
        wanted = set(ids)
        missing = {
            ours: [name for name in ids if name not in row_of],
            theirs: [name for name in self.ids if name not in wanted],
        }
        if any(missing.values()):
            raise ValueError(
                "; ".join(f"missing from {side}: {names_text(x)}" for side, x in missing.items() if x)
            )
        return self.take(np.array([row_of[name] for name in ids], dtype=np.intp))

    def take(self, rows: np.ndarray) -> Predictions:
        """The given rows, in that order."""
        return Predictions(tuple(self.ids[row] for row in rows.tolist()), self.classes, self.probs[rows])


def _check_probs(probs: np.ndarray, ids: Sequence[str], classes: int) -> None:
    if probs.shape != (len(ids), classes):
        raise ValueError(
            f"probs have shape {probs.shape}, but there are {len(ids)} ids and {classes} classes"
        )
    wrong = ~(np.isfinite(probs) & (probs >= 0)).all(axis=1)
    if wrong.any():
        raise ValueError(f"probabilities that are negative or not finite: {names_text(np.array(ids)[wrong])}")
    sums = probs.sum(axis=1)
    wrong = np.abs(sums - 1) > _SUM_TOLERANCE
    if wrong.any():
        raise ValueError(f"rows must sum to 1, not {sums[wrong][0]:.4g}: {names_text(np.array(ids)[wrong])}")


def refuse_duplicates(names: Iterable[str], where: str) -> None:
    """ValueError if a name is in `where` more than once."""
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"more than once in {where}: {names_text(duplicates)}")


def blend(members: Sequence[Predictions], weights: Sequence[float] | None = None) -> Predictions:
    """The weighted mean of the members' probabilities, matched by id, in the order of the first member.

    Weights are equal by default and are scaled to sum 1. ValueError for bad weights, or members whose ids or
    classes differ.
    """
    members = align_all([(f"members[{index}]", member) for index, member in enumerate(members)])
    shares = np.ones(len(members)) if weights is None else np.asarray(weights, dtype=np.float64)
    fits = shares.shape == (len(members),)
    if not (fits and np.isfinite(shares).all() and (shares >= 0).all() and shares.any()):
        raise ValueError(f"weights={weights} must be {len(members)} numbers, none negative and not all 0")
    total = sum(share * member.probs for share, member in zip(shares / shares.sum(), members, strict=True))
    return replace(members[0], probs=np.asarray(total))


def align_all(named: Sequence[tuple[str, Predictions]]) -> list[Predictions]:
    """The members with their rows in the order of the first. ValueError if ids or classes differ."""
    if not named:
        raise ValueError("there are no predictions to combine")
    first_name, first = named[0]
    for name, member in named:
        if member.classes != first.classes:
            raise ValueError(
                f"classes differ: {names_text(first.classes)} in {first_name}, "
                f"{names_text(member.classes)} in {name}"
            )
    return [member.aligned(first.ids, ours=name, theirs=first_name) for name, member in named]

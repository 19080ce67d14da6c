"""Probabilities that carry their ids: metrics, intervals, blending, ensemble selection and temperature.

Labels are class indices, (N,) integers that follow the rows of `probs`.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from carmodels.files import write_whole

_SUM_TOLERANCE = 1e-3  # what half-precision softmax leaves

# what np.load raises for a file with a byte changed, a file cut off, and a file that is no zip
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, eq=False)
class Predictions:
    """One model's probabilities for some images; checked when made, and the array cannot be written to.

    ValueError for an id or class twice or not a text, a shape other than (ids, classes), a value that is not
    a probability, and a row whose sum is further than 0.001 from 1.
    """

    ids: tuple[str, ...]
    classes: tuple[str, ...]
    probs: np.ndarray  # (N, C), float32

    def __post_init__(self) -> None:
        for what in ("ids", "classes"):
            names = tuple(getattr(self, what))
            if not all(isinstance(name, str) for name in names):
                raise ValueError(
                    f"{what} must be text: {few_names(n for n in names if not isinstance(n, str))}"
                )
            refuse_doubles(names, what)
            object.__setattr__(self, what, names)
        probs = np.array(self.probs, dtype=np.float32)
        _check_probs(probs, self.ids, len(self.classes))
        probs.setflags(write=False)
        object.__setattr__(self, "probs", probs)

    def save(self, path: Path) -> None:
        """Writes an npz of three arrays (ids, classes, probs), whole or not at all."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            ids=np.array(self.ids, dtype=str),
            classes=np.array(self.classes, dtype=str),
            probs=self.probs,
        )
        write_whole(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """What `save` wrote; nothing in the file is ever run. ValueError naming a damaged file."""
        data = path.read_bytes()
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                ids, classes, probs = (stored[name] for name in ("ids", "classes", "probs"))
            return cls(tuple(ids.tolist()), tuple(classes.tolist()), probs)
        except _DAMAGE as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to have it made anew") from error

    def aligned(
        self, ids: Sequence[str], *, ours: str = "the predictions", theirs: str = "the ids asked for"
    ) -> Predictions:
        """The same rows in the order of `ids`; ValueError naming ids that are double, or that one side lacks.

        Errors call the side of these predictions `ours` and the side of `ids` `theirs`.
        """
        refuse_doubles(ids, theirs)
        row_of = {name: row for row, name in enumerate(self.ids)}
        asked = set(ids)
        lacking = {
            ours: [name for name in ids if name not in row_of],
            theirs: [name for name in self.ids if name not in asked],
        }
        if any(lacking.values()):
            raise ValueError(
                "; ".join(f"missing from {side}: {few_names(x)}" for side, x in lacking.items() if x)
            )
        rows = np.array([row_of[name] for name in ids], dtype=np.intp)
        return Predictions(tuple(ids), self.classes, self.probs[rows])

    def rows(self, chosen: np.ndarray) -> Predictions:
        """Some of the images, by the positions of their rows."""
        ids = tuple(self.ids[row] for row in chosen.tolist())
        return Predictions(ids, self.classes, self.probs[chosen])


def _check_probs(probs: np.ndarray, ids: Sequence[str], classes: int) -> None:
    if probs.shape != (len(ids), classes):
        raise ValueError(
            f"probs have shape {probs.shape}, but there are {len(ids)} ids and {classes} classes"
        )
    wrong = ~(np.isfinite(probs) & (probs >= 0)).all(axis=1)
    if wrong.any():
        raise ValueError(f"probabilities that are negative or not finite: {few_names(np.array(ids)[wrong])}")
    sums = probs.sum(axis=1)
    wrong = np.abs(sums - 1) > _SUM_TOLERANCE
    if wrong.any():
        raise ValueError(f"rows must sum to 1, not {sums[wrong][0]:.4g}: {few_names(np.array(ids)[wrong])}")


def refuse_doubles(names: Iterable[str], where: str) -> None:
    """ValueError naming what is in `where` more than once."""
    doubles = [name for name, count in Counter(names).items() if count > 1]
    if doubles:
        raise ValueError(f"more than once in {where}: {few_names(doubles)}")


def few_names(names: Iterable[object], shown: int = 5) -> str:
    """'a', 'b' and so on, and how many in all where that is more than are shown."""
    listed = [repr(str(name)) for name in names]
    more = f" ... ({len(listed)} in all)" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def blend(members: Sequence[Predictions], weights: Sequence[float] | None = None) -> Predictions:
    """The weighted mean of the members' probabilities, matched by id, with rows in the first one's order.

    Weights (default: equal) are scaled to sum 1. ValueError naming ids or classes that differ.
    """
    members = align_all([(f"members[{index}]", member) for index, member in enumerate(members)])
    shares = np.ones(len(members)) if weights is None else np.asarray(weights, dtype=np.float64)
    fits = shares.shape == (len(members),)
    if not (fits and np.isfinite(shares).all() and (shares >= 0).all() and shares.any()):
        raise ValueError(f"weights={weights} must be {len(members)} numbers, none negative and not all 0")
    total = sum(share * member.probs for share, member in zip(shares / shares.sum(), members, strict=True))
    return replace(members[0], probs=np.asarray(total))


def align_all(named: Sequence[tuple[str, Predictions]]) -> list[Predictions]:
    """The members with rows in the first one's order; ValueError where ids or classes differ."""
    if not named:
        raise ValueError("there are no predictions to combine")
    first_name, first = named[0]
    for name, member in named:
        if member.classes != first.classes:
            raise ValueError(
                f"classes differ: {few_names(first.classes)} in {first_name}, "
                f"{few_names(member.classes)} in {name}"
            )
    return [member.aligned(first.ids, ours=name, theirs=first_name) for name, member in named]

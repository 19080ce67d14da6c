"""Nested check: what a choice is worth on images that it was not made on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from carmodels.evaluation.metrics import get_metric, log_loss

_ROUNDING = 1e-9  # of a mean of scores


@dataclass(frozen=True)
class Nested:
    """What a choice is worth on images that it was not made on."""

    chosen: float  # mean score over the repeats
    before: float  # likewise, of what it would replace
    gains: tuple[float, ...]  # in each repeat, > 0: better
    helps: bool  # on average; where there is no difference, by log loss

    @property
    def gain(self) -> float:
        return float(np.mean(self.gains))


def nested_check(
    choose: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    labels: np.ndarray,
    *,
    metric: str,
    repeats: int = 5,
    seed: int = 0,
    until: float = math.inf,
) -> Nested:
    """Choose on one half of the images, score on the other, both ways, in stratified halves anew each time.

    `choose` is given the rows, (N / 2,), that it may look at, and returns probabilities (N, C) of what it
    would choose and of what that would replace. After the first repeat it ends at `until`, time.time().
    """
    row, rng = get_metric(metric), np.random.default_rng(seed)
    scores: list[list[float]] = []
    losses: list[list[float]] = []
    while not scores or (len(scores) < repeats and time.time() < until):
        held_out = _held_out(choose, _halves(labels, rng))
        scores.append([row.score(probs, labels) for probs in held_out])
        losses.append([log_loss(probs, labels) for probs in held_out])
    chosen, before = np.mean(scores, axis=0).tolist()
    loss_chosen, loss_before = np.mean(losses, axis=0).tolist()
    gain = row.gain(chosen, before)
    helps = gain > _ROUNDING or (abs(gain) <= _ROUNDING and loss_chosen < loss_before)
    return Nested(chosen, before, tuple(row.gain(new, old) for new, old in scores), helps)


def _halves(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """labels (N,) -> (N,) whether an image is in the first half: half of each class, give or take one."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    first = np.zeros(len(labels), bool)
    first[order[::2]] = True
    return first


def _held_out(
    choose: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) of what is chosen, and of what that replaces, for each half as it was chosen on the other."""
    if first.all():  # of one image there are no halves
        _, before = choose(np.flatnonzero(first))
        return before, before
    by_first, by_second = (choose(np.flatnonzero(half)) for half in (first, ~first))
    chosen, before = (
        np.where(first[:, None], second, one) for one, second in zip(by_first, by_second, strict=True)
    )
    return chosen, before

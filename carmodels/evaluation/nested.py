"""Nested check: the score of a choice on images that it was not made on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from carmodels.evaluation.metrics import get_metric, log_loss
from carmodels.steady_clock import steady_time

_TIE = 1e-9  # smaller differences of mean scores are rounding errors


@dataclass(frozen=True)
class NestedCheck:
    """Result of `nested_check`."""

    chosen: float  # mean score of the choice over the repeats
    before: float  # mean score of what the choice replaces
    gains: tuple[float, ...]  # of each repeat, > 0: better
    helps: bool  # better on average; ties are broken by log loss

    @property
    def gain(self) -> float:
        return float(np.mean(self.gains))


def nested_check(
    choose: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    labels: np.ndarray,
    *,
    metric: str,
    groups: np.ndarray | None = None,
    repeats: int = 5,
    seed: int = 0,
    until: float = math.inf,
) -> NestedCheck:
    """Two-fold check: chooses on each half of the images and scores on the other half.

    `choose(rows)` may look at the rows (N / 2,) only. It returns probabilities (N, C) of its choice and of
    what the choice replaces. Every repeat draws new stratified halves. `groups` (N,), of near-duplicates,
    stay in one half. No repeat but the first starts after `until`, in seconds of steady_time().
    """
    groups = np.arange(len(labels)) if groups is None else groups
    scorer, rng = get_metric(metric), np.random.default_rng(seed)
    scores: list[list[float]] = []
    losses: list[list[float]] = []
    while not scores or (len(scores) < repeats and steady_time() < until):
        both_probs = _out_of_half(choose, _halves(labels, groups, rng))
        scores.append([scorer.score(probs, labels) for probs in both_probs])
        losses.append([log_loss(probs, labels) for probs in both_probs])
    chosen, before = np.mean(scores, axis=0).tolist()
    loss_chosen, loss_before = np.mean(losses, axis=0).tolist()
    gain = scorer.gain(chosen, before)
    helps = gain > _TIE or (abs(gain) <= _TIE and loss_chosen < loss_before)
    return NestedCheck(chosen, before, tuple(scorer.gain(new, old) for new, old in scores), helps)


def _halves(labels: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """labels (N,), groups (N,) -> (N,) bool, whether an image is in the first half.

    Stratified by class; a group counts for the class of its first image.
    """
    _, first_image, member = np.unique(groups, return_index=True, return_inverse=True)
    order = rng.permutation(len(first_image))
    order = order[np.lexsort((np.bincount(member)[order], labels[first_image][order]))]
    first = np.zeros(len(order), bool)
    first[order[::2]] = True
    half: np.ndarray = first[member]
    return half


def _out_of_half(
    choose: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C) of the choice and of what it replaces, each half from a choice on the other."""
    if first.all():  # one image, or one group, has no halves
        _, before = choose(np.flatnonzero(first))
        return before, before
    on_first, on_second = (choose(np.flatnonzero(half)) for half in (first, ~first))
    chosen, before = (np.where(first[:, None], b, a) for a, b in zip(on_first, on_second, strict=True))
    return chosen, before

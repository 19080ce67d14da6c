"""Greedy ensemble selection (`select_ensemble`) and the choice of test-time views (`choose_views`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from carmodels.evaluation.metrics import Metric, check_labels, get_metric, log_losses
from carmodels.evaluation.predictions import Predictions, align_all, blend


@dataclass(frozen=True)
class Selection:
    """An ensemble and its scores on the labels it was selected on."""

    weights: dict[str, float]  # of the members, largest first: all > 0, sum 1
    score: float
    single: str  # the best candidate alone, a member or not
    single_score: float
    gains: dict[str, float]  # by member in order of weight; > 0: better; the sum is score over single_score


def select_ensemble(
    members: Mapping[str, Predictions],
    labels: np.ndarray,
    *,
    metric: str,
    rounds: int = 25,
    bags: int = 10,
    max_members: int = 8,
    seed: int = 0,
    costs: Mapping[str, float] | None = None,
    max_cost: float = math.inf,
) -> Selection:
    """Greedy ensemble selection with replacement, sorted start and bagging (Caruana et al., 2004).

    Each bag draws half of the members, but at least `max_members` (with one bag: all). It starts from their
    best prefix in order of score, adds one member per round, and keeps the best ensemble on this path. The
    weights are the mean over the bags, cut to the `max_members` largest. If the best candidate scores as
    well alone, it is the ensemble. Log loss breaks ties. The members cost at most `max_cost` together.

    `labels` follow the ids of the first member. Raises ValueError as `blend` does, and if every member costs
    more than `max_cost`.
    """
    if rounds < 0 or bags < 1 or max_members < 1:
        raise ValueError(f"{rounds=} must be >= 0, {bags=} and {max_members=} >= 1")
    scorer = get_metric(metric)
    aligned = align_all(list(members.items()))
    check_labels(aligned[0].probs, labels)
    order = _ranking(scorer, np.stack([member.probs for member in aligned]), labels)
    ranked = {list(members)[index]: aligned[index] for index in order}
    cost = {name: 0.0 if costs is None else costs[name] for name in ranked}
    if min(cost.values()) > max_cost:
        raise ValueError(f"{max_cost=:g} is less than the cheapest member costs, {min(cost.values()):.3g}")
    ranked = {name: member for name, member in ranked.items() if cost[name] <= max_cost}
    library = np.stack([member.probs for member in ranked.values()])
    limit = _CostLimit(np.array([cost[name] for name in ranked]), max_cost)
    drawn = _draw_bags(len(ranked), bags, max_members, seed)
    shares = _bagged_shares(scorer, library, labels, drawn, rounds=rounds, start=max_members, limit=limit)
    weights = _largest(dict(zip(ranked, shares.tolist(), strict=True)), max_members, cost, max_cost)
    ensemble = blend([ranked[name] for name in weights], list(weights.values()))
    single = next(iter(ranked))
    if _ranking(scorer, np.stack([ranked[single].probs, ensemble.probs]), labels)[0] == 0:
        weights = {single: 1.0}
    return _selection(scorer, ranked, weights, labels)


@dataclass(frozen=True)
class _CostLimit:
    """The members' costs, and their largest sum."""

    costs: np.ndarray  # (M,)
    max_cost: float

    def subset(self, bag: np.ndarray) -> _CostLimit:
        return replace(self, costs=self.costs[bag])

    def longest_prefix(self) -> int:
        """How many of the first members are affordable together."""
        return int((self.costs.cumsum() <= self.max_cost).sum())

    def candidates(self, counts: np.ndarray) -> np.ndarray:
        """Indices of the members of an ensemble with these counts (M,), and of those it can still afford."""
        members = counts > 0
        total = self.costs[members].sum()
        return np.flatnonzero(members | (total + self.costs <= self.max_cost))


def _ranking(scorer: Metric, stack: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """stack (K, N, C) -> indices (K,), best score first, ties by log loss, then by position."""
    worse = scorer.gain(np.zeros(len(stack)), scorer.scores(stack, labels))
    return np.lexsort((log_losses(stack, labels), worse))


def _draw_bags(members: int, bags: int, smallest: int, seed: int) -> list[np.ndarray]:
    """Sorted member indices of each bag. One bag of all members if every bag would hold them all."""
    size = max(smallest, -(-members // 2))
    if bags == 1 or size >= members:
        return [np.arange(members)]
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(members, size, replace=False)) for _ in range(bags)]


def _bagged_shares(
    scorer: Metric,
    library: np.ndarray,
    labels: np.ndarray,
    bags: Sequence[np.ndarray],
    *,
    rounds: int,
    start: int,
    limit: _CostLimit,
) -> np.ndarray:
    """library (M, N, C), best first -> the members' mean shares over the bags, (M,)."""
    shares = np.zeros(len(library))
    for bag in bags:
        bag_shares = _greedy_shares(scorer, library[bag], labels, rounds, start, limit.subset(bag))
        shares[bag] += bag_shares / len(bags)
    return shares


def _greedy_shares(
    scorer: Metric, bag: np.ndarray, labels: np.ndarray, rounds: int, start: int, limit: _CostLimit
) -> np.ndarray:
    """bag (B, N, C), best first -> the members' shares (B,) in the best ensemble on the greedy path."""
    first = bag[: min(start, limit.longest_prefix())]
    prefixes = first.cumsum(axis=0) / np.arange(1, len(first) + 1, dtype=bag.dtype)[:, None, None]
    size = 1 + int(_ranking(scorer, prefixes, labels)[0])
    counts = (np.arange(len(bag)) < size).astype(np.int64)
    path, means = [counts], [prefixes[size - 1]]
    total = bag[:size].sum(axis=0)
    for new_size in range(size + 1, size + 1 + rounds):
        candidates = limit.candidates(path[-1])
        pick = candidates[_ranking(scorer, (total + bag[candidates]) / new_size, labels)[0]]
        total = total + bag[pick]
        path.append(path[-1] + (np.arange(len(bag)) == pick))
        means.append(total / new_size)
    best = path[_ranking(scorer, np.stack(means), labels)[0]]
    shares: np.ndarray = best / best.sum()
    return shares


def _largest(
    shares: Mapping[str, float], max_members: int, cost: Mapping[str, float], max_cost: float
) -> dict[str, float]:
    """The largest positive shares, at most `max_members` of them for at most `max_cost`, scaled to sum 1."""
    kept: list[str] = []
    for name in sorted(shares, key=lambda name: -shares[name]):
        affordable = sum(cost[other] for other in kept) + cost[name] <= max_cost
        if shares[name] > 0 and affordable and len(kept) < max_members:
            kept.append(name)
    total = sum(shares[name] for name in kept)
    return {name: shares[name] / total for name in kept}


def _selection(
    scorer: Metric, ranked: Mapping[str, Predictions], weights: dict[str, float], labels: np.ndarray
) -> Selection:
    single = next(iter(ranked))
    members, shares = [ranked[name] for name in weights], list(weights.values())
    scores = [scorer.score(ranked[single].probs, labels)]
    scores += [scorer.score(blend(members[:n], shares[:n]).probs, labels) for n in range(1, len(members) + 1)]
    gains = [scorer.gain(new, old) for old, new in pairwise(scores)]
    return Selection(weights, scores[-1], single, scores[0], dict(zip(weights, gains, strict=True)))


def choose_views(
    view_probs: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    metric: str,
    max_views: int,
    costs: Mapping[str, float] | None = None,
    max_cost: float = math.inf,
) -> tuple[str, ...]:
    """Greedy choice of views, without replacement. The first view is always in.

    view_probs: (N, C) by view. Adds the view that improves the mean's score most, or at the same score its
    log loss, until none does or `max_views` or `max_cost` is reached.
    """
    scorer, cost = get_metric(metric), costs or dict.fromkeys(view_probs, 0.0)
    chosen = [next(iter(view_probs))]
    while len(chosen) < max_views:
        spent = sum(cost[name] for name in chosen)
        candidates = [n for n in view_probs if n not in chosen and spent + cost[n] <= max_cost]
        total = np.sum([view_probs[name] for name in chosen], axis=0)
        means = [total / len(chosen), *((total + view_probs[n]) / (len(chosen) + 1) for n in candidates)]
        best = int(_ranking(scorer, np.stack(means), labels)[0])
        if best == 0:
            break
        chosen.append(candidates[best - 1])
    return tuple(chosen)

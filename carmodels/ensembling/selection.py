"""Greedy ensemble selection, and the choice of test-time views."""

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
    """An ensemble, and what it is worth on the labels it was chosen on."""

    weights: dict[str, float]  # members' shares: all > 0, sum 1, largest first
    score: float
    single: str  # the best member alone
    single_score: float
    gains: dict[str, float]  # by each in order of entry, > 0: better; they sum to score over single_score


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

    Labels follow the ids of the first member; ties of the metric are broken by log loss. Each of the `bags`
    draws half of the library (`max_members` at least; one bag: all of it), starts from the best
    prefix of its members in order of score, adds one member a round and keeps the best ensemble on the way.
    The bags' shares are averaged and the `max_members` heaviest kept. Where that does not beat the best
    single member, that member is the ensemble. With `costs`, those of the members together are at most
    `max_cost`. ValueError as in `blend`, and where no member is that cheap.
    """
    if rounds < 0 or bags < 1 or max_members < 1:
        raise ValueError(f"{rounds=} must be >= 0, {bags=} and {max_members=} >= 1")
    row = get_metric(metric)
    alike = align_all(list(members.items()))
    check_labels(alike[0].probs, labels)
    order = _best_first(row, np.stack([member.probs for member in alike]), labels)
    ranked = {list(members)[index]: alike[index] for index in order}
    price = {name: 0.0 if costs is None else costs[name] for name in ranked}
    if min(price.values()) > max_cost:
        raise ValueError(f"{max_cost=:g} is less than the cheapest member costs, {min(price.values()):.3g}")
    ranked = {name: member for name, member in ranked.items() if price[name] <= max_cost}
    library = np.stack([member.probs for member in ranked.values()])
    limit = _Limit(np.array([price[name] for name in ranked]), max_cost)
    draws = _bags(len(ranked), bags, max_members, seed)
    shares = _bagged_shares(row, library, labels, draws, rounds=rounds, start=max_members, limit=limit)
    weights = _heaviest(dict(zip(ranked, shares.tolist(), strict=True)), max_members, price, max_cost)
    ensemble = blend([ranked[name] for name in weights], list(weights.values()))
    single = next(iter(ranked))
    if _best_first(row, np.stack([ranked[single].probs, ensemble.probs]), labels)[0] == 0:
        weights = {single: 1.0}
    return _selection(row, ranked, weights, labels)


@dataclass(frozen=True)
class _Limit:
    """What members cost, and may cost together."""

    costs: np.ndarray  # (M,)
    most: float

    def of(self, bag: np.ndarray) -> _Limit:
        return replace(self, costs=self.costs[bag])

    def prefixes(self) -> int:
        """How many of the first members may be in together."""
        return int((self.costs.cumsum() <= self.most).sum())

    def candidates(self, counts: np.ndarray) -> np.ndarray:
        """Members that are in, (M,) counts, and those that there is still room for: their indices."""
        inside = counts > 0
        spent = self.costs[inside].sum()
        return np.flatnonzero(inside | (spent + self.costs <= self.most))


def _best_first(row: Metric, stack: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """stack (K, N, C) -> indices, (K,), best score first, then lowest log loss, then as they stand."""
    worse = row.gain(np.zeros(len(stack)), row.scores(stack, labels))
    return np.lexsort((log_losses(stack, labels), worse))


def _bags(members: int, bags: int, smallest: int, seed: int) -> list[np.ndarray]:
    """Which members, best first, each bag holds; one bag of all where they would be alike."""
    size = max(smallest, -(-members // 2))
    if bags == 1 or size >= members:
        return [np.arange(members)]
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(members, size, replace=False)) for _ in range(bags)]


def _bagged_shares(
    row: Metric,
    library: np.ndarray,
    labels: np.ndarray,
    draws: Sequence[np.ndarray],
    *,
    rounds: int,
    start: int,
    limit: _Limit,
) -> np.ndarray:
    """library (M, N, C), best first -> mean of the members' shares over the bags, (M,)."""
    shares = np.zeros(len(library))
    for bag in draws:
        shares[bag] += _greedy_shares(row, library[bag], labels, rounds, start, limit.of(bag)) / len(draws)
    return shares


def _greedy_shares(
    row: Metric, bag: np.ndarray, labels: np.ndarray, rounds: int, start: int, limit: _Limit
) -> np.ndarray:
    """bag (B, N, C), best first -> shares, (B,), of the best ensemble on the greedy path."""
    first = bag[: min(start, limit.prefixes())]
    prefixes = first.cumsum(axis=0) / np.arange(1, len(first) + 1, dtype=bag.dtype)[:, None, None]
    size = 1 + int(_best_first(row, prefixes, labels)[0])
    counts = (np.arange(len(bag)) < size).astype(np.int64)
    path, means = [counts], [prefixes[size - 1]]
    total = bag[:size].sum(axis=0)
    for grown in range(size + 1, size + 1 + rounds):
        candidates = limit.candidates(path[-1])
        pick = candidates[_best_first(row, (total + bag[candidates]) / grown, labels)[0]]
        total = total + bag[pick]
        path.append(path[-1] + (np.arange(len(bag)) == pick))
        means.append(total / grown)
    best = path[_best_first(row, np.stack(means), labels)[0]]
    shares: np.ndarray = best / best.sum()
    return shares


def _heaviest(
    shares: Mapping[str, float], most: int, price: Mapping[str, float], max_cost: float
) -> dict[str, float]:
    """At most `most` of the shares for at most `max_cost`, none 0, largest first, scaled to sum 1."""
    kept: list[str] = []
    for name in sorted(shares, key=lambda name: -shares[name]):
        affordable = sum(price[other] for other in kept) + price[name] <= max_cost
        if shares[name] > 0 and affordable and len(kept) < most:
            kept.append(name)
    total = sum(shares[name] for name in kept)
    return {name: shares[name] / total for name in kept}


def _selection(
    row: Metric, ranked: Mapping[str, Predictions], weights: dict[str, float], labels: np.ndarray
) -> Selection:
    single = next(iter(ranked))
    entered, shares = [ranked[name] for name in weights], list(weights.values())
    scores = [row.score(ranked[single].probs, labels)]
    scores += [row.score(blend(entered[:n], shares[:n]).probs, labels) for n in range(1, len(entered) + 1)]
    gains = [row.gain(new, old) for old, new in pairwise(scores)]
    return Selection(weights, scores[-1], single, scores[0], dict(zip(weights, gains, strict=True)))


def choose_views(
    shown: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    metric: str,
    most: int,
    costs: Mapping[str, float] | None = None,
    max_cost: float = math.inf,
) -> tuple[str, ...]:
    """The first view, and after it at most `most` - 1 others, each the one whose entry helps the mean most.

    shown: (N, C) each. It ends where no view helps: a higher score, or the same with a lower log loss; and
    where what the views cost together would be more than `max_cost`.
    """
    row, price = get_metric(metric), costs or dict.fromkeys(shown, 0.0)
    chosen = [next(iter(shown))]
    while len(chosen) < most:
        spent = sum(price[name] for name in chosen)
        others = [name for name in shown if name not in chosen and spent + price[name] <= max_cost]
        total = np.sum([shown[name] for name in chosen], axis=0)
        means = [total / len(chosen), *((total + shown[name]) / (len(chosen) + 1) for name in others)]
        best = int(_best_first(row, np.stack(means), labels)[0])
        if best == 0:
            break
        chosen.append(others[best - 1])
    return tuple(chosen)

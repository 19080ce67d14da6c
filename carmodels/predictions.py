"""Probabilities that carry their ids: metrics, intervals, blending, ensemble selection and temperature.

Labels are class indices, (N,) integers that follow the rows of `probs`.
"""

from __future__ import annotations

import io
import math
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Literal, TypeVar

import numpy as np

from carmodels.files import write_whole

_SUM_TOLERANCE = 1e-3  # what half-precision softmax leaves
_FLOOR = float(np.finfo(np.float32).eps)  # log loss of a probability of 0, as in scikit-learn for float32
# what np.load raises for a file with a byte changed, a file cut off, and a file that is no zip
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError)
_Score = TypeVar("_Score", float, np.ndarray)
_RESAMPLED_AT_ONCE = 4_000_000  # probabilities a bootstrap holds in memory: 16 MB
_TEMPERATURES = (0.05, 20.0)
_LOG_T = 0.5  # what the logarithm of a temperature varies by between models
FEWEST_ANSWERED = 20  # pictures, to say how often answers of so much confidence are right
_ROUNDING = 1e-9  # of a mean of scores
_MOST_HIDDEN = 10_000  # pictures drawn in a resample


@dataclass(frozen=True, eq=False)
class Predictions:
    """One model's probabilities for some pictures; checked when made, and the array cannot be written to.

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
                raise ValueError(f"{what} must be text: {_few(n for n in names if not isinstance(n, str))}")
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
            raise ValueError("; ".join(f"missing from {side}: {_few(x)}" for side, x in lacking.items() if x))
        rows = np.array([row_of[name] for name in ids], dtype=np.intp)
        return Predictions(tuple(ids), self.classes, self.probs[rows])

    def rows(self, chosen: np.ndarray) -> Predictions:
        """Some of the pictures, by the positions of their rows."""
        ids = tuple(self.ids[row] for row in chosen.tolist())
        return Predictions(ids, self.classes, self.probs[chosen])


def _check_probs(probs: np.ndarray, ids: Sequence[str], classes: int) -> None:
    if probs.shape != (len(ids), classes):
        raise ValueError(
            f"probs have shape {probs.shape}, but there are {len(ids)} ids and {classes} classes"
        )
    wrong = ~(np.isfinite(probs) & (probs >= 0)).all(axis=1)
    if wrong.any():
        raise ValueError(f"probabilities that are negative or not finite: {_few(np.array(ids)[wrong])}")
    sums = probs.sum(axis=1)
    wrong = np.abs(sums - 1) > _SUM_TOLERANCE
    if wrong.any():
        raise ValueError(f"rows must sum to 1, not {sums[wrong][0]:.4g}: {_few(np.array(ids)[wrong])}")


def refuse_doubles(names: Iterable[str], where: str) -> None:
    """ValueError naming what is in `where` more than once."""
    doubles = [name for name, count in Counter(names).items() if count > 1]
    if doubles:
        raise ValueError(f"more than once in {where}: {_few(doubles)}")


def _few(names: Iterable[object], shown: int = 5) -> str:
    """'a', 'b' and so on, and how many in all where that is more than are shown."""
    listed = [repr(str(name)) for name in names]
    more = f" ... ({len(listed)} in all)" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


@dataclass(frozen=True)
class Metric:
    """A way to score probabilities. A new metric is one row in `METRICS`."""

    mode: Literal["max", "min"]
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray]  # probs (K, N, C), labels (N,) or (K, N) -> (K,)
    spread: Callable[[float], float]  # a score -> about how far single pictures lie apart, standard deviation

    def score(self, probs: np.ndarray, labels: np.ndarray) -> float:
        """probs (N, C), labels (N,) -> score; ValueError where the two do not fit."""
        _check_labels(probs, labels)
        return float(self.scores(probs[None], labels)[0])

    def gain(self, new: _Score, old: _Score) -> _Score:
        """How much better `new` is than `old`; negative: worse."""
        gained: _Score = new - old if self.mode == "max" else old - new
        return gained


def _check_labels(probs: np.ndarray, labels: np.ndarray) -> None:
    """A wrong shape would broadcast and a negative label would wrap around, both silently."""
    if probs.ndim != 2 or labels.shape != probs.shape[:1]:
        raise ValueError(f"labels of shape {labels.shape} do not fit probs of shape {probs.shape}")
    if not len(labels):
        raise ValueError("there is no picture to score")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= probs.shape[1]:
        raise ValueError(f"labels must be integers from 0 to {probs.shape[1] - 1}: {_few(np.unique(labels))}")


def _accuracies(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    shares: np.ndarray = (probs.argmax(axis=-1) == labels).mean(axis=-1)
    return shares


def _log_losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    columns = np.broadcast_to(labels, probs.shape[:-1])[..., None]
    right = np.take_along_axis(probs, columns, axis=-1)[..., 0].astype(np.float64)
    losses: np.ndarray = -np.log(np.clip(right, _FLOOR, 1)).mean(axis=-1)
    return losses


def _macro_f1s(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    classes = np.arange(probs.shape[-1])
    guessed = probs.argmax(axis=-1)[..., None] == classes
    true = np.asarray(labels)[..., None] == classes
    hits, either = (guessed & true).sum(axis=-2), guessed.sum(axis=-2) + true.sum(axis=-2)
    scores: np.ndarray = (2 * hits / np.maximum(either, 1)).sum(axis=-1) / (either > 0).sum(axis=-1)
    return scores


def _binomial(share: float) -> float:
    """Right or wrong, as a coin."""
    return math.sqrt(max(0.0, share * (1 - share)))


def _exponential(mean: float) -> float:
    """Many small losses and a few large ones: about as far apart as they are large."""
    return mean


METRICS: dict[str, Metric] = {
    "accuracy": Metric("max", _accuracies, _binomial),
    "log_loss": Metric("min", _log_losses, _exponential),
    "macro_f1": Metric("max", _macro_f1s, _binomial),
}


def accuracy(probs: np.ndarray, labels: np.ndarray) -> float:
    """probs (N, C), labels (N,) -> share of rows whose largest probability is at the label."""
    return METRICS["accuracy"].score(probs, labels)


def log_loss(probs: np.ndarray, labels: np.ndarray) -> float:
    """probs (N, C), labels (N,) -> mean of -log(probability at the label), nats; 0 counts as 1.2e-7."""
    return METRICS["log_loss"].score(probs, labels)


def macro_f1(probs: np.ndarray, labels: np.ndarray) -> float:
    """probs (N, C), labels (N,) -> mean F1 of the classes that occur or were guessed, as in scikit-learn."""
    return METRICS["macro_f1"].score(probs, labels)


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise ValueError(f"metric={name!r} is not one of {', '.join(METRICS)}")
    return METRICS[name]


def blend(members: Sequence[Predictions], weights: Sequence[float] | None = None) -> Predictions:
    """The weighted mean of the members' probabilities, matched by id, with rows in the first one's order.

    Weights (default: equal) are scaled to sum 1. ValueError naming ids or classes that differ.
    """
    members = _alike([(f"members[{index}]", member) for index, member in enumerate(members)])
    shares = np.ones(len(members)) if weights is None else np.asarray(weights, dtype=np.float64)
    fits = shares.shape == (len(members),)
    if not (fits and np.isfinite(shares).all() and (shares >= 0).all() and shares.any()):
        raise ValueError(f"weights={weights} must be {len(members)} numbers, none negative and not all 0")
    total = sum(share * member.probs for share, member in zip(shares / shares.sum(), members, strict=True))
    return replace(members[0], probs=np.asarray(total))


def _alike(named: Sequence[tuple[str, Predictions]]) -> list[Predictions]:
    """The members with rows in the first one's order; ValueError where ids or classes differ."""
    if not named:
        raise ValueError("there are no predictions to combine")
    first_name, first = named[0]
    for name, member in named:
        if member.classes != first.classes:
            raise ValueError(
                f"classes differ: {_few(first.classes)} in {first_name}, {_few(member.classes)} in {name}"
            )
    return [member.aligned(first.ids, ours=name, theirs=first_name) for name, member in named]


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
    row = _metric(metric)
    alike = _alike(list(members.items()))
    _check_labels(alike[0].probs, labels)
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
    return np.lexsort((_log_losses(stack, labels), worse))


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
    row, price = _metric(metric), costs or dict.fromkeys(shown, 0.0)
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


@dataclass(frozen=True)
class Nested:
    """What a choice is worth on pictures that it was not made on."""

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
    """Choose on one half of the pictures, score on the other, both ways, in stratified halves anew each time.

    `choose` is given the rows, (N / 2,), that it may look at, and returns probabilities (N, C) of what it
    would choose and of what that would replace. After the first repeat it ends at `until`, time.time().
    """
    row, rng = _metric(metric), np.random.default_rng(seed)
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
    """labels (N,) -> (N,) whether a picture is in the first half: half of each class, give or take one."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    first = np.zeros(len(labels), bool)
    first[order[::2]] = True
    return first


def _held_out(
    choose: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) of what is chosen, and of what that replaces, for each half as it was chosen on the other."""
    if first.all():  # of one picture there are no halves
        _, before = choose(np.flatnonzero(first))
        return before, before
    by_first, by_second = (choose(np.flatnonzero(half)) for half in (first, ~first))
    chosen, before = (
        np.where(first[:, None], second, one) for one, second in zip(by_first, by_second, strict=True)
    )
    return chosen, before


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """The likeliest temperature of probs (N, C), from 0.05 to 20 (Guo et al., 2017).

    It divides the log of the probabilities, the logits up to a constant a row; > 1 makes them softer. Its
    logarithm is taken to be about 0 beforehand, give or take `_LOG_T`: a few pictures that are all right
    would else ask for certainty.
    """
    from scipy.optimize import minimize_scalar  # here, as every trial would pay 0.4 s at its start for it

    _check_labels(probs, labels)
    found = minimize_scalar(
        lambda log_t: (
            len(labels) * log_loss(tempered(probs, np.exp(log_t)), labels) + (log_t / _LOG_T) ** 2 / 2
        ),
        bounds=np.log(_TEMPERATURES),
        method="bounded",
    )
    return float(np.exp(found.x))


def with_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """The same order of classes in every row, softer (temperature > 1) or sharper (between 0 and 1)."""
    if not (np.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be a finite number > 0")
    return replace(predictions, probs=tempered(predictions.probs, temperature))


def tempered(probs: np.ndarray, temperature: float) -> np.ndarray:
    """probs (N, C) to the power of 1 / temperature, rows scaled to sum 1."""
    scaled = np.log(np.maximum(probs, _FLOOR, dtype=np.float64)) / temperature
    raised = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    softened: np.ndarray = raised / raised.sum(axis=1, keepdims=True)
    return softened


@dataclass(frozen=True)
class Interval:
    """A measured value and the ends of its interval."""

    value: float
    low: float
    high: float


def accuracy_interval(probs: np.ndarray, labels: np.ndarray, confidence: float = 0.95) -> Interval:
    """Accuracy with the score interval of Wilson (1927), good for few pictures and near 0 and 1, too."""
    return share_interval(round(accuracy(probs, labels) * len(labels)), len(labels), confidence)


def share_interval(hits: int, among: int, confidence: float = 0.95) -> Interval:
    """The share of hits with the score interval of Wilson (1927)."""
    from scipy.stats import binomtest  # here, as every trial would pay 1 s at its start for it

    ends = binomtest(hits, among).proportion_ci(confidence, method="wilson")
    return Interval(hits / among, float(ends.low), float(ends.high))


def score_interval(metric: str, probs: np.ndarray, labels: np.ndarray) -> Interval:
    """The metric with a 95 % interval: Wilson's for accuracy, else by bootstrap."""
    return (
        accuracy_interval(probs, labels)
        if metric == "accuracy"
        else bootstrap_interval(metric, probs, labels)
    )


def bootstrap_interval(
    metric: str, probs: np.ndarray, labels: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """The metric with its 95 % percentile bootstrap interval over pictures (Efron, 1979)."""
    row = _metric(metric)
    value = row.score(probs, labels)
    return _percentiles(value, _bootstrap(row, probs, labels, seed, resamples))


def sure_from(probs: np.ndarray, labels: np.ndarray, accuracy: float) -> float:
    """The smallest confidence from which on the answers are right so often, over rows of probs (N, C).

    0 where that is so of all answers; infinity where it is not so even of the `FEWEST_ANSWERED` most
    confident ones: fewer prove nothing. The answers from a confidence on are selective classification's
    (El-Yaniv and Wiener, 2010).
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"{accuracy=} must be from 0 to 1")
    _check_labels(probs, labels)
    order = np.argsort(-probs.max(axis=1), kind="stable")
    confidence, right = probs.max(axis=1)[order], (probs.argmax(axis=1) == labels)[order]
    answered = np.arange(1, len(order) + 1)
    enough = (right.cumsum() >= accuracy * answered) & (answered >= min(FEWEST_ANSWERED, len(order)))
    enough &= np.append(confidence[:-1] > confidence[1:], True)  # equal confidence, equal treatment
    if not enough.any():
        return math.inf
    return 0.0 if enough[-1] else float(confidence[enough][-1])


def answered(probs: np.ndarray, labels: np.ndarray, confidence: float) -> Interval | None:
    """Accuracy, with its 95 % interval, of the answers of so much confidence; None where there are none."""
    _check_labels(probs, labels)
    chosen = probs.max(axis=1) >= confidence
    return accuracy_interval(probs[chosen], labels[chosen]) if chosen.any() else None


def hidden_share(hits: int, among: int, hidden: int, confidence: float = 0.95) -> Interval:
    """The share of hits with a prediction interval for the share among `hidden` further pictures.

    That of Krishnamoorthy and Peng (2011), from joint sampling: the values y of the further share with

        (y - x)^2 <= z^2 q (1 - q) (1 / n + 1 / m),  q = (n x + m y) / (n + m)

    where x is the share seen among n, m = `hidden`, and z the normal quantile. What n pictures leave unknown
    and what m others vary by are both in it; with m without limit it is the interval of Wilson (1927).
    """
    if not (hidden >= 1 and among >= 1 and 0 <= hits <= among):
        raise ValueError(f"{hidden=} and {among=} must be at least 1, {hits=} from 0 to {among}")
    share, seen = hits / among, among / (among + hidden)
    spread = NormalDist().inv_cdf((1 + confidence) / 2) ** 2 * (1 / among + 1 / hidden)
    # a y^2 - 2 b y + c <= 0
    a = 1 + spread * (1 - seen) ** 2
    b = share + spread * (1 - seen) * (0.5 - seen * share)
    c = share**2 - spread * seen * share * (1 - seen * share)
    root = math.sqrt(max(0.0, b * b - a * c))
    return Interval(share, max(0.0, (b - root) / a), min(1.0, (b + root) / a))


def hidden_score(
    metric: str,
    probs: np.ndarray,
    labels: np.ndarray,
    hidden: int,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """The metric, with a 95 % prediction interval for its value on `hidden` further pictures of the kind.

    Of accuracy as in `hidden_share`. Of others by a bootstrap in two steps (Mojirsheibani and Tibshirani,
    1996): the pictures seen are drawn anew, and from those the hidden ones, so that both samples vary. Hidden
    pictures past 10,000 add next to nothing and are left out.
    """
    row = _metric(metric)
    value = row.score(probs, labels)
    if metric == "accuracy":
        return hidden_share(round(value * len(labels)), len(labels), hidden)
    if hidden < 1:
        raise ValueError(f"{hidden=} must be at least 1")
    return _percentiles(value, _bootstrap(row, probs, labels, seed, resamples, min(hidden, _MOST_HIDDEN)))


def paired_gain(
    metric: str, a: np.ndarray, b: np.ndarray, labels: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """How much better `a` (N, C) is than `b`, with a 95 % bootstrap interval over pictures. > 0: better.

    Every resample holds the same pictures for both, so what both find hard cancels out.
    """
    row = _metric(metric)
    value = row.gain(row.score(a, labels), row.score(b, labels))
    drawn_a, drawn_b = (_bootstrap(row, probs, labels, seed, resamples) for probs in (a, b))
    return _percentiles(value, row.gain(drawn_a, drawn_b))


def _bootstrap(
    row: Metric, probs: np.ndarray, labels: np.ndarray, seed: int, resamples: int, hidden: int = 0
) -> np.ndarray:
    """Scores, (resamples,), of N pictures drawn with replacement: the same ones for the same seed.

    With `hidden`, of so many drawn with replacement from each draw.
    """
    rng = np.random.default_rng(seed)
    parts = -(-resamples * max(len(probs), hidden) * probs.shape[1] // _RESAMPLED_AT_ONCE)
    draws = np.array_split(rng.integers(len(labels), size=(resamples, len(labels)), dtype=np.int32), parts)
    if hidden:
        draws = [
            np.take_along_axis(drawn, rng.integers(len(labels), size=(len(drawn), hidden), dtype=np.int32), 1)
            for drawn in draws
        ]
    return np.concatenate([row.scores(probs[drawn], labels[drawn]) for drawn in draws])


def _percentiles(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(value, float(low), float(high))


def right_and_wrong(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """How many pictures went from wrong to right, and how many from right to wrong; probs (N, C) each."""
    _check_labels(before, labels)
    _check_labels(after, labels)
    was, now = before.argmax(axis=1) == labels, after.argmax(axis=1) == labels
    return int((now & ~was).sum()), int((was & ~now).sum())

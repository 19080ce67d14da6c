"""Which dimensions of a space mattered in a search, and at which of its ends the best trials lie."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import optuna
from scipy.stats import binom

from carmodels.catalog import BACKBONES
from carmodels.evaluation.metrics import METRICS
from carmodels.records import State, TrialRecord
from carmodels.space import Choice, Dimension, Range, Space
from carmodels.training.config import BOUNDS
from tune.optim.optuna_records import learned

FEWEST = 20  # trials: a best third of seven, two more than PED-ANOVA asks for, is the least to compare with
SHUFFLES = 100
SELDOM = 0.05  # how often chance may do the same
BEST = 5  # trials whose places are looked at
EDGE = 0.05  # share of a range next to an end that counts as its edge
WIDER = 0.25  # share of a range by which it is widened, on its own scale

CAVEAT = (
    "Rough: the sampler did not draw evenly, and what it settled early shows less; each dimension is seen "
    "alone; small differences are noise."
)

UNKNOWN = "What mattered: what was searched cannot be read from study.json by this version of the project."


@dataclass(frozen=True)
class Importance:
    """How far the best trials differ from all trials in one dimension."""

    name: str
    share: float  # of the sum over all dimensions
    chance: float  # in the same unit, what one in twenty shuffles of the trials' order comes to
    drawn: int  # trials that drew it
    condition: str  # "where head_depth is 1 or 2"; empty where every trial drew it

    @property
    def matters(self) -> bool:
        """Whether it is more than chance."""
        return self.share > self.chance

    @property
    def note(self) -> str:
        """By which trials it is judged, where those are not all."""
        return f"{self.condition}, {self.drawn} trials" if self.condition else ""


@dataclass(frozen=True)
class Importances:
    """All dimensions that were searched, the most important first; none where there are too few trials."""

    trials: int
    dimensions: tuple[Importance, ...]

    @property
    def sentence(self) -> str:
        """What mattered, most first, and what may not have."""
        if not self.dimensions:
            return f"What mattered: {self.trials} trials are too few to say; it takes {FEWEST}."
        yes = (
            f"{i.name} {100 * i.share:.0f} %{f' ({i.note})' if i.note else ''}"
            for i in self.dimensions
            if i.matters
        )
        no = ", ".join(i.name for i in self.dimensions if not i.matters)
        text = f"What mattered, by {self.trials} trials: {', '.join(yes) or 'nothing for certain'}."
        return f"{text} No more than chance: {no}." if no else text


@dataclass(frozen=True)
class Edge:
    """An end of a dimension at which the best trials lie, and the option that moves it."""

    name: str
    top: bool  # else the bottom
    values: tuple[float, ...]  # at the edge, that of the best trial first
    of: int  # the best trials that were looked at
    ends: tuple[float, float]
    option: str  # of tune/search.py

    def __str__(self) -> str:
        """Where the best trials lie, in words."""
        count = len(self.values)
        who = f"{count} of the best {self.of} trials lie" if count > 1 else "the best trial lies"
        end = f"{'top' if self.top else 'bottom'} of {self.ends[0]:g} to {self.ends[1]:g}"
        shown = ", ".join(f"{value:.4g}" for value in dict.fromkeys(self.values))
        return f"{self.name}: {who} at the {end} ({shown})"


def importances(records: Sequence[TrialRecord], space: Space, metric: str) -> Importances:
    """By PED-ANOVA (Watanabe et al., 2023), with its extension to conditional dimensions (2026).

    It compares where the best third of the trials lies with where all of them were drawn, a dimension at a
    time. That is the method for trials which a sampler drew and a scheduler cut: fANOVA (Hutter et al., 2014)
    fits a forest to values at full schedule over the whole space, leaves out what some trials did not draw
    and needs scikit-learn. Here only the order of the trials counts, so stopped ones take part: the finished
    ones alone have passed the rungs, and what the rungs judged by would look unimportant. They rank as in
    Optuna's TPE: by how far they got, then by value. A conditional dimension is judged by the trials that
    drew it, weighted by how many of the best are among them.

    Small samples always differ somehow; `chance` says by how much, from shuffles of the order (as Altmann et
    al., 2010, do for forests). Trials with a note (the baseline, which differs in more than the space) and
    those that failed are left out.
    """
    trials = [t for r in _ranked(records, metric) if (t := learned(r, space)) is not None]
    if len(trials) < FEWEST:
        return Importances(len(trials), ())
    study = optuna.create_study()
    study.add_trials(
        optuna.trial.create_trial(value=place, params=t.params, distributions=t.distributions)
        for place, t in enumerate(trials)
    )
    rng = np.random.default_rng(0)
    orders = [np.arange(len(trials)), *(rng.permutation(len(trials)) for _ in range(SHUFFLES))]
    measured, *shuffled = (_divergences(study, order) for order in orders)
    total = sum(measured.values()) or 1.0
    found = []
    for name, dimension in space.dimensions.items():
        drawn = sum(name in t.params for t in trials)
        if drawn and not (isinstance(dimension, Choice) and len(dimension.options) == 1):
            chance = float(np.quantile([s[name] for s in shuffled], 1 - SELDOM))
            condition = _condition(dimension, space) if drawn < len(trials) else ""
            found.append(Importance(name, measured[name] / total, chance / total, drawn, condition))
    return Importances(len(trials), tuple(sorted(found, key=lambda i: -i.share)))


def _ranked(records: Sequence[TrialRecord], metric: str) -> list[TrialRecord]:
    """The search's own trials that say how good a draw is, best first."""
    standing = (State.COMPLETE, State.PRUNED, State.FAILED)
    sign = -1 if METRICS[metric].mode == "max" else 1

    def key(record: TrialRecord) -> tuple[int, int, float]:
        stopped = record.state in (State.PRUNED, State.OUT_OF_TIME)
        epochs = record.epochs_run if stopped else 0
        value = math.inf if record.value is None else sign * record.value
        return standing.index(State.PRUNED if stopped else record.state), -epochs, value

    own = (r for r in records if r.stage == "search" and not r.baseline)
    ended = (r for r in own if r.state in standing or r.state is State.OUT_OF_TIME)
    return sorted((r for r in ended if r.state is not State.FAILED or r.diverged), key=key)


def _divergences(study: optuna.Study, order: np.ndarray) -> dict[str, float]:
    """By dimension, with the study's trials ranked by `order`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that low targets are good, that few drew a dimension, experimental
        return optuna.importance.get_param_importances(
            study,
            evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=1 / 3),
            target=lambda trial: float(order[trial.number]),
            normalize=False,
        )


def _condition(dimension: Dimension, space: Space) -> str:
    assert dimension.when is not None
    other, values = dimension.when
    parent = space.dimensions[other]
    found = [str(v) for v in values if not isinstance(parent, Choice) or v in parent.options]
    return f"where {other} is {' or '.join(filter(None, (', '.join(found[:-1]), found[-1])))}"


def edges(records: Sequence[TrialRecord], space: Space, metric: str) -> tuple[Edge, ...]:
    """Ends at which more of the best trials lie than chance would put there, and that can be moved.

    Of the best five finished trials, so many are at the edge as even draws would put there in less than one
    search of twenty (binomial), or it is the best trial of all at the edge of a range (the rule of the Deep
    Learning Tuning Playbook, Godbole et al., 2023). A choice is at its edge at its first or last number;
    choices of words have none.
    """
    best = [r for r in _ranked(records, metric) if r.state is State.COMPLETE][:BEST]
    found = []
    for name, dimension in space.dimensions.items():
        drawn = [asdict(r.config) for r in best]
        values = [v[name] if name in space.active_dimensions(v) else None for v in drawn]
        found += [e for top in (True, False) if (e := _edge(name, dimension, space, values, top)) is not None]
    return tuple(found)


def _edge(name: str, dimension: Dimension, space: Space, values: list[Any], top: bool) -> Edge | None:
    """The edge if the best trials' values, None for a trial that did not draw it, lie there."""
    if isinstance(dimension, Range):
        bar, chance = _along(dimension, 1 - EDGE if top else EDGE), EDGE
        ends = dimension.low, dimension.high
    elif all(isinstance(o, int | float) and not isinstance(o, bool) for o in dimension.options):
        ends = min(dimension.options), max(dimension.options)
        bar, chance = ends[top], 1 / len(dimension.options)
    else:
        return None
    there = [v is not None and (v >= bar if top else v <= bar) for v in values]
    drawn = sum(v is not None for v in values)
    first = isinstance(dimension, Range) and any(there[:1])
    if not first and binom.sf(sum(there) - 1, drawn, chance) >= SELDOM:
        return None
    option = _wider(name, dimension, space, top)
    at_edge = tuple(v for v, is_there in zip(values, there, strict=True) if is_there)
    return Edge(name, top, at_edge, len(values), ends, option) if option else None


def _along(dimension: Range, share: float) -> float:
    """The point so far from the low end (0) to the high one (1), or beyond, on the range's own scale."""
    low, high = dimension.low, dimension.high
    return low * (high / low) ** share if dimension.log else low + share * (high - low)


def _wider(name: str, dimension: Dimension, space: Space, top: bool) -> str:
    """The option that moves this end, as far as `TrialConfig` goes; empty where it is the natural limit.

    A range grows by a quarter on its own scale. A choice gets its next number, in equal ratios where it spans
    ten times or more, else in equal steps; half way to the limit where a whole step would pass that.
    """
    if isinstance(dimension, Range):
        options = [dimension.low, dimension.high]
        aim = _along(dimension, 1 + WIDER if top else -WIDER)
    else:
        options = sorted(set(dimension.options))
        inner, end = options[-2:] if top else options[1::-1]
        aim = end * end / inner if options[0] > 0 and options[-1] / options[0] >= 10 else 2 * end - inner
        if not BOUNDS[name][0] <= aim <= BOUNDS[name][1]:
            aim = (end + BOUNDS[name][top]) / 2
    new = _accepted(name, options[-1 if top else 0], aim, space)
    if new in options:
        return ""
    if isinstance(dimension, Range):
        wider = f"{name}={min(*options, new)}:{max(*options, new)}"
    else:
        wider = f"{name}={','.join(str(option) for option in sorted([*options, new]))}"
    try:
        space.with_override(wider)
    except ValueError:  # a size that does not go with the others
        return ""
    return f"--set {wider}"


def _accepted(name: str, end: float, aim: float, space: Space) -> float:
    """`aim` as `TrialConfig` accepts it, in few digits; `end` where nothing beyond that is accepted."""
    low, high = BOUNDS[name]
    if isinstance(end, int):
        multiple = math.lcm(*(BACKBONES[b].multiple for b in space.backbones)) if name == "image_size" else 1
        new = multiple * (math.ceil if aim > end else math.floor)(aim / multiple)
        return new if low <= new <= high else end
    aim = min(max(aim, low), high)
    short = (float(f"{aim:.{digits}g}") for digits in (2, 3, 6))
    return next((new for new in short if low <= new <= high and (new - end) * (aim - end) > 0), end)

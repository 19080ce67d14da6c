"""Which dimensions mattered in a search, and which ranges the best trials would widen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import optuna
from scipy.stats import binom

from carmodels.evaluation.metrics import METRICS
from carmodels.models.facts import facts_of
from carmodels.records import State, TrialRecord
from carmodels.space import Choice, Dimension, Range, Space
from carmodels.training.config import BOUNDS
from tune.optim.coordinates import from_unit, is_ordered
from tune.optim.optuna_records import frozen_trial

MIN_TRIALS = 20  # their best third is 7 trials; PED-ANOVA needs 5
_TOP_TRIALS = 5  # best trials that `edges` looks at
_SHUFFLES = 100
_ALPHA = 0.05  # significance level
_EDGE_SHARE = 0.05  # of a range at each end, on its own scale
_WIDENING = 0.25  # share of a range by which an option widens it, on its own scale

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
    chance: float  # the share that random ranks exceed in one case of twenty
    drawn: int  # trials that drew it
    condition: str  # "where head_depth is 1 or 2"; empty if every trial drew it

    @property
    def matters(self) -> bool:
        """Whether the share is significant."""
        return self.share > self.chance

    @property
    def note(self) -> str:
        """The trials it is computed from, if not all."""
        return f"{self.condition}, {self.drawn} trials" if self.condition else ""


@dataclass(frozen=True)
class Importances:
    """The searched dimensions, most important first; none if there are too few trials."""

    trials: int
    dimensions: tuple[Importance, ...]

    @property
    def sentence(self) -> str:
        """The result for people: significant dimensions with their shares, then the others."""
        if not self.dimensions:
            return f"What mattered: {self.trials} trials are too few to say; it takes {MIN_TRIALS}."
        significant = (
            f"{i.name} {100 * i.share:.0f} %{f' ({i.note})' if i.note else ''}"
            for i in self.dimensions
            if i.matters
        )
        others = ", ".join(i.name for i in self.dimensions if not i.matters)
        text = f"What mattered, by {self.trials} trials: {', '.join(significant) or 'nothing for certain'}."
        return f"{text} No more than chance: {others}." if others else text


@dataclass(frozen=True)
class Edge:
    """An end of a dimension at which the best trials lie, and the option that widens it."""

    name: str
    top: bool  # else the bottom
    values: tuple[float, ...]  # at the edge, the best trial's first
    best_count: int  # best trials that were looked at
    ends: tuple[float, float]
    option: str  # of tune/search.py

    def __str__(self) -> str:
        count = len(self.values)
        who = f"{count} of the best {self.best_count} trials lie" if count > 1 else "the best trial lies"
        end = f"{'top' if self.top else 'bottom'} of {self.ends[0]:g} to {self.ends[1]:g}"
        distinct = ", ".join(f"{value:.4g}" for value in dict.fromkeys(self.values))
        return f"{self.name}: {who} at the {end} ({distinct})"


def importances(records: Sequence[TrialRecord], space: Space, metric: str) -> Importances:
    """Importances by PED-ANOVA (Watanabe et al., 2023), extended to conditional dimensions (2026).

    It compares, one dimension at a time, where the best third of the trials lies with where all were drawn.
    It uses only the trials' ranks, so pruned trials count too: complete trials alone have all passed the
    rungs, which would hide what the rungs selected for. fANOVA (Hutter et al., 2014) would need values at
    the full schedule, leave out conditional dimensions and require scikit-learn. A conditional dimension is
    computed from the trials that drew it, weighted by how many of the best are among them.

    The best third of a small sample always differs by chance. `chance` says by how much, from shuffled ranks
    (as Altmann et al., 2010, for random forests).
    """
    ranked = (frozen_trial(record, space) for record in _ranked_trials(records, metric))
    trials = [trial for trial in ranked if trial is not None]
    if len(trials) < MIN_TRIALS:
        return Importances(len(trials), ())
    study = optuna.create_study()
    study.add_trials(
        optuna.trial.create_trial(value=rank, params=t.params, distributions=t.distributions)
        for rank, t in enumerate(trials)
    )
    rng = np.random.default_rng(0)
    ranks = [np.arange(len(trials)), *(rng.permutation(len(trials)) for _ in range(_SHUFFLES))]
    observed, *shuffled = (_ped_anova(study, order) for order in ranks)
    total = sum(observed.values()) or 1.0
    results = []
    for name, dimension in space.dimensions.items():
        drawn = sum(name in t.params for t in trials)
        if drawn and not (isinstance(dimension, Choice) and len(dimension.options) == 1):
            chance = float(np.quantile([s[name] for s in shuffled], 1 - _ALPHA))
            condition = _condition(dimension, space) if drawn < len(trials) else ""
            results.append(Importance(name, observed[name] / total, chance / total, drawn, condition))
    return Importances(len(trials), tuple(sorted(results, key=lambda i: -i.share)))


def _ranked_trials(records: Sequence[TrialRecord], metric: str) -> list[TrialRecord]:
    """The search's own trials, best first, in the order of Optuna's TPE.

    Complete trials come first, then stopped ones by epochs, then diverged ones; within each, by value. Leaves
    out the baseline, other failures and trials that will run again.
    """
    sign = -1 if METRICS[metric].mode == "max" else 1

    def key(record: TrialRecord) -> tuple[int, int, float]:
        value = math.inf if record.value is None else sign * record.value
        if record.state in (State.PRUNED, State.OUT_OF_TIME):
            return 1, -record.epochs_run, value
        return 0 if record.state is State.COMPLETE else 2, 0, value

    searched = (r for r in records if r.stage == "search" and not r.baseline)
    ended = (State.COMPLETE, State.PRUNED, State.OUT_OF_TIME)
    return sorted((r for r in searched if r.state in ended or r.diverged), key=key)


def _ped_anova(study: optuna.Study, ranks: np.ndarray) -> dict[str, float]:
    """The divergence in each dimension; `ranks` are the trials' ranks, by trial number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental; low targets are best; few trials drew a dimension
        return optuna.importance.get_param_importances(
            study,
            evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=1 / 3),
            target=lambda trial: float(ranks[trial.number]),
            normalize=False,
        )


def _condition(dimension: Dimension, space: Space) -> str:
    """The dimension's condition in words."""
    assert dimension.when is not None
    other, values = dimension.when
    parent = space.dimensions[other]
    possible = [str(v) for v in values if not isinstance(parent, Choice) or v in parent.options]
    return f"where {other} is {' or '.join(filter(None, (', '.join(possible[:-1]), possible[-1])))}"


def edges(records: Sequence[TrialRecord], space: Space, metric: str) -> tuple[Edge, ...]:
    """Ends at which more of the best complete trials lie than by chance, and that an option can widen.

    An end counts if uniform draws would put as many of the best five there in less than one search of twenty
    (binomial), or if the best trial lies at the end of a range (the rule of the Deep Learning Tuning
    Playbook, Godbole et al., 2023). A choice of numbers ends at its smallest and largest option; one of words
    has no ends.
    """
    best = [r for r in _ranked_trials(records, metric) if r.state is State.COMPLETE][:_TOP_TRIALS]
    found = []
    for name, dimension in space.dimensions.items():
        configs = [asdict(r.config) for r in best]
        values = [config[name] if name in space.active_dimensions(config) else None for config in configs]
        found += [_edge(name, dimension, space, values, top) for top in (True, False)]
    return tuple(edge for edge in found if edge is not None)


def _edge(name: str, dimension: Dimension, space: Space, values: list[Any], top: bool) -> Edge | None:
    """The edge, if the best trials lie at this end; `values` has None for a trial that did not draw it."""
    if isinstance(dimension, Range):
        threshold, chance = from_unit(dimension, 1 - _EDGE_SHARE if top else _EDGE_SHARE), _EDGE_SHARE
        ends = dimension.low, dimension.high
    elif is_ordered(dimension):
        ends = min(dimension.options), max(dimension.options)
        threshold, chance = ends[top], 1 / len(dimension.options)
    else:
        return None

    def at_edge(value: Any) -> bool:
        return value is not None and (value >= threshold if top else value <= threshold)

    edge_values = tuple(v for v in values if at_edge(v))
    drawn = sum(v is not None for v in values)
    best_at_edge = isinstance(dimension, Range) and any(map(at_edge, values[:1]))
    if not best_at_edge and binom.sf(len(edge_values) - 1, drawn, chance) >= _ALPHA:
        return None
    option = _widening_option(name, dimension, space, top)
    return Edge(name, top, edge_values, len(values), ends, option) if option else None


def _widening_option(name: str, dimension: Dimension, space: Space, top: bool) -> str:
    """The --set option that moves this end out, as far as `TrialConfig` allows; "" at the natural limit.

    A range grows by a quarter on its own scale. A choice gets one more number: in equal ratios if it spans a
    factor of ten, else in equal steps; halfway to the limit if a whole step would pass it.
    """
    if isinstance(dimension, Range):
        options = [dimension.low, dimension.high]
        target = from_unit(dimension, 1 + _WIDENING if top else -_WIDENING)
    else:
        options = sorted(set(dimension.options))
        inner, end = options[-2:] if top else options[1::-1]
        target = end * end / inner if options[0] > 0 and options[-1] / options[0] >= 10 else 2 * end - inner
        if not BOUNDS[name][0] <= target <= BOUNDS[name][1]:
            target = (end + BOUNDS[name][top]) / 2
    new = _valid_value(name, options[-1 if top else 0], target, space)
    if new in options:
        return ""
    if isinstance(dimension, Range):
        override = f"{name}={min(*options, new)}:{max(*options, new)}"
    else:
        override = f"{name}={','.join(str(option) for option in sorted([*options, new]))}"
    try:
        space.with_override(override)
    except ValueError:  # a size that does not go with the others
        return ""
    return f"--set {override}"


def _valid_value(name: str, end: float, target: float, space: Space) -> float:
    """`target` in few digits, as `TrialConfig` accepts it; `end` if it accepts nothing beyond `end`."""
    low, high = BOUNDS[name]
    if isinstance(end, int):
        multiple = math.lcm(*(facts_of(b).multiple for b in space.backbones)) if name == "image_size" else 1
        new = multiple * (math.ceil if target > end else math.floor)(target / multiple)
        return new if low <= new <= high else end
    target = min(max(target, low), high)
    rounded = (float(f"{target:.{digits}g}") for digits in (2, 3, 6))
    return next((new for new in rounded if low <= new <= high and (new - end) * (target - end) > 0), end)

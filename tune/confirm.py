"""Which configuration is the best, where the value of a single run is partly luck, and which to run again.

The best of many single runs is the one whose luck was best (the winner's curse). Here the worth of a
configuration is what its runs come to on average, over seeds: a normal model whose prior is the field of all
finished configurations pulls the lucky ones towards the others (James & Stein, 1961; Efron & Morris, 1975).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from statistics import NormalDist
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from carmodels.predictions import METRICS, Interval
from carmodels.space import TrialConfig
from carmodels.study import CUT_OFF, Status, Study, TrialRecord
from tune.costs import Costs

RERUNS = 6  # most runs with new seeds in a study
CONTENDERS = 4  # best configurations that are run again
SLOWER = 1.15  # times the seconds of its first run that a further one is given
_PRIOR_RUNS = 4  # repeats that what is known of the noise beforehand counts for
_TAIL = 0.025  # of a 95 % interval, on either side
_Z = NormalDist().inv_cdf(1 - _TAIL)
_TAUS = np.geomspace(1e-3, 1e3, 120)  # spreads of the field, in standard deviations of the noise
_TAU_SCALE = 2  # likewise: what is expected of the spread beforehand
_ENDED = (Status.FINISHED, Status.DIVERGED, Status.FAILED)  # a seed that is used up

Runs = dict[TrialConfig, list[TrialRecord]]  # by configuration with seed 0, the search's own run first


@dataclass(frozen=True)
class Standing:
    """What is known of a configuration."""

    record: TrialRecord  # the search's own run of it
    runs: int
    mean: float  # of the runs' values
    estimate: Interval  # of what its runs come to on average: posterior mean and 95 % interval
    chance: float  # that it is better than the best one; of the best one itself 0.5

    @property
    def apart(self) -> bool:
        """Whether it can be told apart from the best one: the 95 % interval of their gap leaves out 0."""
        return self.chance < _TAIL


@dataclass(frozen=True)
class Posterior:
    """What the runs of J configurations say of their worth; larger is better."""

    mean: np.ndarray  # (J,)
    sd: np.ndarray  # (J,)
    gap: np.ndarray  # (J,), of each to the best one, <= 0
    gap_sd: np.ndarray  # (J,), of the gap; 0 for the best one

    @property
    def best(self) -> int:
        return int(self.mean.argmax())

    @property
    def chances(self) -> np.ndarray:
        """(J,), that each is better than the best one."""
        ratios = np.divide(self.gap, self.gap_sd, out=np.zeros_like(self.gap), where=self.gap_sd > 0)
        return np.array([NormalDist().cdf(ratio) for ratio in ratios.tolist()])


def runs_of(records: Iterable[TrialRecord]) -> Runs:
    """Finished runs of search and reruns; what the clock cut short was not the same schedule and is no run.

    A rerun that diverged has the worst value, as its last epoch. Retraining is left out: it follows from who
    is best, and must not change the answer when it goes on.
    """
    found: Runs = {}
    for record in sorted(records, key=lambda r: r.stage != "search"):
        if record.stage == "confirm" and record.status is Status.DIVERGED and record.curve:
            record = replace(record, value=record.curve[-1].value)
        elif not (record.whole and record.status is Status.FINISHED):
            continue
        if record.stage in ("search", "confirm") and record.value is not None:
            found.setdefault(_seedless(record.config), []).append(record)
    return {config: runs for config, runs in found.items() if runs[0].stage == "search"}


def _seedless(config: TrialConfig) -> TrialConfig:
    return replace(config, seed=0)


def noise(values: Sequence[np.ndarray], metric: str, pictures: int) -> float:
    """Standard deviation of a run's value, from repeats, (runs,) each, and what is known beforehand.

    At least, and beforehand, that of a score on so many val pictures (for accuracy the binomial one), at the
    level of the best few. Seeds alone give less on the same pictures: half its variance where a model is
    calibrated (Jordan, 2023), 0.51 in the repeats of results/curves. The rest is for the pictures: the best
    one is wanted for others than these.
    """
    floor = _of_pictures(np.array([v.mean() for v in values]), metric, pictures) ** 2
    squares = sum(float(((v - v.mean()) ** 2).sum()) for v in values)
    repeats = sum(len(v) - 1 for v in values)
    return math.sqrt(max(floor, (_PRIOR_RUNS * floor + squares) / (_PRIOR_RUNS + repeats)))


def _of_pictures(means: np.ndarray, metric: str, pictures: int) -> float:
    """Standard deviation of a score on so many pictures, at the level of the best few of (J,)."""
    order = np.argsort(METRICS[metric].gain(np.zeros(len(means)), means))
    level = float(means[order[:CONTENDERS]].mean())
    return max(METRICS[metric].spread(level) / math.sqrt(pictures), 1 / pictures)


def posterior(means: np.ndarray, runs: np.ndarray, sd: float) -> Posterior:
    """Means (J,) of so many runs (J,) with noise `sd` each -> what the configurations are worth.

    worth ~ N(mu, tau^2), mean ~ N(worth, sd^2 / runs), with mu flat and tau half-Cauchy of scale 2 `sd`. Tau
    is integrated out on a grid (Rubin, 1981; Gelman et al., Bayesian Data Analysis, 3rd ed., section 5.4), so
    that the intervals hold for a handful of configurations, too, where a plug-in tau makes them too narrow:
    in simulated fields of 5 to 25 they hold 93 to 98 % of the worths.
    """
    taus = sd * _TAUS[:, None]  # (T, 1)
    own = sd**2 / runs
    total = own + taus**2  # (T, J)
    var_mu = 1 / (1 / total).sum(1, keepdims=True)
    mu = var_mu * (means / total).sum(1, keepdims=True)
    fit = np.log(var_mu[:, 0]) - np.log(total).sum(1) - ((means - mu) ** 2 / total).sum(1)
    log_weight = fit / 2 + np.log(_TAUS / (1 + (_TAUS / _TAU_SCALE) ** 2))  # the grid is even in log tau
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    pull = own / total  # (T, J), towards the field
    given_tau = pull * mu + (1 - pull) * means
    mean, sds = _mixed(weight, given_tau, (1 - pull) * own + var_mu * pull**2)
    best = int(mean.argmax())
    alone = (1 - pull) * own
    gaps = given_tau - given_tau[:, [best]]
    gap, gap_sds = _mixed(weight, gaps, alone + alone[:, [best]] + var_mu * (pull - pull[:, [best]]) ** 2)
    gap_sds[best] = 0.0
    return Posterior(mean, sds, gap, gap_sds)


def _mixed(weight: np.ndarray, means: np.ndarray, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, (J,), of a mixture, (T,), of normals, (T, J)."""
    mean = weight @ means
    return mean, np.sqrt(weight @ (variances + (means - mean) ** 2))


@dataclass(frozen=True)
class _Field:
    """The configurations that are compared; larger values are better."""

    first: list[TrialRecord]  # the search's own run of each
    means: np.ndarray  # (J,)
    runs: np.ndarray  # (J,)
    alike: np.ndarray  # (J,), whether it says something about the others
    noise: float

    @classmethod
    def of(cls, found: Runs, metric: str, pictures: int) -> _Field | None:
        """None where there is nothing to compare.

        What lies further below the median than the best one lies above it, and by more than the noise, or
        diverged with a seed, is of another kind (a schedule that never took off) and stands for itself.
        """
        if not found or not pictures:
            return None
        values = [np.array([float(r.value or 0) for r in runs]) for runs in found.values()]
        raw = np.array([v.mean() for v in values])
        means = raw if METRICS[metric].mode == "max" else -raw
        alike = means >= 2 * np.median(means) - means.max() - 2 * _of_pictures(raw, metric, pictures)
        steady = np.array([all(r.status is Status.FINISHED for r in runs) for runs in found.values()])
        alike = alike & steady if (alike & steady).any() else alike
        sd = noise([v for v, is_alike in zip(values, alike, strict=True) if is_alike], metric, pictures)
        first = [runs[0] for runs in found.values()]
        return cls(first, means, np.array([len(v) for v in values]), alike, sd)

    @property
    def posterior(self) -> Posterior:
        """Of those that are alike by the model; of the others what their own runs say."""
        found = posterior(self.means[self.alike], self.runs[self.alike], self.noise)
        mean, sd = self.means.astype(float), self.noise / np.sqrt(self.runs)
        mean[self.alike], sd[self.alike] = found.mean, found.sd
        best = int(mean.argmax())
        gap_sd = np.hypot(sd, sd[best])
        if self.alike[best]:  # by whom the model's gaps are counted
            gap_sd[self.alike] = found.gap_sd
        return Posterior(mean, sd, mean - mean[best], gap_sd)

    def expecting(self, pending: Iterable[TrialConfig]) -> _Field:
        """As if runs that are not over yet had come to what is expected of them."""
        asked = [_seedless(config) for config in pending]
        more = np.array([asked.count(_seedless(r.config)) for r in self.first])
        means = (self.runs * self.means + more * self.posterior.mean) / (self.runs + more)
        return replace(self, means=means, runs=self.runs + more)


def standings(records: Iterable[TrialRecord], *, metric: str, pictures: int) -> list[Standing]:
    """Every configuration by its posterior mean, best first; `pictures` are those of val."""
    field = _Field.of(runs_of(records), metric, pictures)
    if field is None:
        return []
    found = field.posterior
    chances = found.chances
    sign = 1 if METRICS[metric].mode == "max" else -1
    return [
        Standing(
            record=field.first[j],
            runs=int(field.runs[j]),
            mean=float(sign * field.means[j]),
            estimate=_estimate(float(found.mean[j]), float(found.sd[j]), metric),
            chance=float(chances[j]),
        )
        for j in np.argsort(-found.mean, kind="stable")
    ]


def _estimate(mean: float, sd: float, metric: str) -> Interval:
    """The 95 % interval, within what the metric can be."""
    if METRICS[metric].mode == "min":
        return Interval(-mean, max(0.0, -mean - _Z * sd), -mean + _Z * sd)
    return Interval(mean, max(0.0, mean - _Z * sd), min(1.0, mean + _Z * sd))


def judged(study: Study) -> list[Standing]:
    """The standings of a study."""
    return standings(study.records(), metric=study.metric, pictures=len(study.labels("val")))


def leading(found: Sequence[Standing]) -> list[Standing]:
    """Those worth a row: the best few, and whatever ran more than once."""
    return [s for place, s in enumerate(found) if place < CONTENDERS or s.runs > 1]


def described(found: Sequence[Standing]) -> list[dict[str, Any]]:
    """The leading ones in JSON's types."""
    return [
        {
            "trial_id": s.record.trial_id,
            "title": s.record.config.title,
            "runs": s.runs,
            "mean": s.mean,
            "estimate": asdict(s.estimate),
            "told_apart": s.apart,
            "chance_to_be_better": s.chance,
        }
        for s in leading(found)
    ]


def sentence(found: Sequence[Standing]) -> str:
    """Who is best, and who cannot be told apart from it."""
    best, others = found[0], found[1:]
    equal = [s for s in others if not s.apart]
    named = [s for s in leading(found) if s in equal]
    text = f"The best is {_named(best)}, by {_times(best.runs)}. "
    if not others:
        return text + "No other one has finished."
    if not equal:
        return text + "All others are worse, with 95 % confidence."
    more = len(equal) - len(named)
    words = ", ".join([_named(s) for s in named] + ([f"{more} more that ran once"] if more else []))
    return text + f"Cannot be told apart from it: {words}."


def _named(standing: Standing) -> str:
    return f"{standing.record.config.title} ({standing.record.trial_id})"


def _times(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"


def next_rerun(
    records: Sequence[TrialRecord], *, metric: str, pictures: int, pending: Sequence[TrialConfig] = ()
) -> TrialConfig | None:
    """The run from which most is to be gained; None where the best is told apart from its contenders.

    It follows from the records alone. Runs that are `pending` count as if they had come to what is expected
    of them.
    """
    field = _Field.of(runs_of(records), metric, pictures)
    if field is None:
        return None
    found = field.expecting(pending).posterior
    order = np.argsort(-found.mean, kind="stable")[:CONTENDERS]
    chances = found.chances
    if all(chances[j] < _TAIL for j in order if j != found.best):
        return None
    gains = knowledge_gradient(found.mean[order], found.sd[order], field.noise)
    pick = int(np.argmax(gains > gains.max() * (1 - 1e-9)))  # the first of equals, whatever the rounding
    return _reseeded(field.first[order[pick]].config, records, pending)


def knowledge_gradient(means: np.ndarray, sds: np.ndarray, noise: float) -> np.ndarray:
    """What a further run of each, (J,), adds to the worth of the one that is then chosen.

    The expected value of information of Gupta & Miescke (1996) and Frazier et al. (2008): large where a
    configuration is close to the best (of the best: to the second) and not well known. In simulated fields of
    eight as far apart as the noise, six runs halve what the choice falls short of the best (tests).
    """
    rivals = np.array([np.delete(means, j).max() for j in range(len(means))])
    moves = sds**2 / np.sqrt(sds**2 + noise**2)  # of the posterior mean, by a run, standard deviation
    normal = NormalDist()
    z = -np.abs(means - rivals) / moves
    return moves * np.array([x * normal.cdf(x) + normal.pdf(x) for x in z.tolist()])


def _reseeded(
    config: TrialConfig, records: Iterable[TrialRecord], pending: Iterable[TrialConfig]
) -> TrialConfig:
    """The configuration with its next seed: retraining counts on from the same one."""
    used = {r.trial_id for r in records if r.status in _ENDED} | {c.id for c in pending}
    seeds = (replace(config, seed=config.seed + more) for more in count(1))
    return next(candidate for candidate in seeds if candidate.id not in used)


def expected_seconds(record: TrialRecord, costs: Costs | None = None) -> float:
    """What the whole schedule of a recorded trial takes, by the pace of the epochs it ran, with a margin.

    By `costs` where that says little, since it had a share of a GPU that it now has to itself.
    """
    if costs is not None:
        return SLOWER * costs.schedule(record.config)
    return SLOWER * record.seconds / max(1, record.epochs_run) * record.config.epochs


def most_seconds(study: Study, workers: int, *, most: int, costs: Costs | None = None) -> float:
    """What running the best few again takes at most, if they stay those that they are now.

    Infinite where there are none.
    """
    best = [standing.record for standing in judged(study)[:CONTENDERS]]
    each = max((expected_seconds(record, costs) for record in best), default=math.inf)
    return (math.ceil(most / workers) + 0.5) * each if most else 0.0  # the search may end late


class Reruns(Searcher):
    """Hands out one rerun after the other, by what the study's records say when it is asked.

    Ends where the best is told apart, after `most` reruns in the study, and where the next would not end by
    `end` (time.time()).
    """

    def __init__(
        self, study: Study, *, most: int, end: float, notes: dict[str, str], costs: Costs | None = None
    ) -> None:
        super().__init__(metric=study.metric, mode=METRICS[study.metric].mode)
        self._costs = costs
        self._study, self._most, self._end, self._notes = study, most, end, notes
        self._pictures = len(study.labels("val"))
        self._handed: list[TrialConfig] = []

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED
        config = self.next()
        if config is None:  # what is running may yet change the picture
            return None if self._pending() else Searcher.FINISHED
        first = self._first()[_seedless(config)]
        if time.time() + expected_seconds(first, self._costs) > self._end:
            return Searcher.FINISHED
        self._handed.append(config)
        self._notes[config.id] = f"seed {config.seed} of {first.trial_id}"
        return asdict(config)

    def next(self) -> TrialConfig | None:
        """The next rerun; None where there is none to make for the time being."""
        records, pending = self._study.records(), self._pending()
        ended = [r for r in records if r.stage == "confirm" and r.status in _ENDED]
        made = sum(r.whole or r.status is not Status.FINISHED for r in ended)  # not what the clock cut short
        if made + len(pending) >= self._most:
            return None
        cut_off = (r for r in records if r.stage == "confirm" and r.status in CUT_OFF)
        if begun := [r.config for r in cut_off if r.config not in pending]:
            return begun[0]  # as what is cut off in the search: no row stays without an end
        return next_rerun(records, metric=self.metric, pictures=self._pictures, pending=pending)

    def _pending(self) -> list[TrialConfig]:
        ended = {r.trial_id for r in self._study.records() if r.status in _ENDED}
        return [config for config in self._handed if config.id not in ended]

    def _first(self) -> Mapping[TrialConfig, TrialRecord]:
        return {config: runs[0] for config, runs in runs_of(self._study.records()).items()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to learn: the records tell."""

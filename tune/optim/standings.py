"""Which configuration is the best, where the value of a single run is partly luck, and which to run again.

The best of many single runs is the one whose luck was best (the winner's curse). Here the worth of a
configuration is what its runs come to on average, over seeds: a normal model whose prior is the field of all
finished configurations pulls the lucky ones towards the others (James & Stein, 1961; Efron & Morris, 1975).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from carmodels.evaluation.intervals import Interval
from carmodels.evaluation.metrics import METRICS
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.run import Run

CONTENDERS = 4  # best configurations that are run again
_PRIOR_RUNS = 4  # repeats that what is known of the noise beforehand counts for
TAIL = 0.025  # of a 95 % interval, on either side
_Z = NormalDist().inv_cdf(1 - TAIL)
_TAUS = np.geomspace(1e-3, 1e3, 120)  # spreads of the field, in standard deviations of the noise
_TAU_SCALE = 2  # likewise: what is expected of the spread beforehand
Runs = dict[Run, list[TrialRecord]]  # by the run with seed 0, the search's own run first


@dataclass(frozen=True)
class Standing:
    """What is known of a configuration."""

    record: TrialRecord  # the search's own run of it
    runs: int
    mean: float  # of the runs' values
    estimate: Interval  # of what its runs come to on average: posterior mean and 95 % interval
    chance: float  # that it is better than the best one; of the best one itself 0.5

    @property
    def clearly_worse(self) -> bool:
        """Whether it can be told apart from the best one: the 95 % interval of their gap leaves out 0."""
        return self.chance < TAIL


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
        if record.stage == "confirm" and record.diverged and record.curve:
            record = replace(record, value=record.curve[-1].value)
        elif record.cut_short or record.state is not State.COMPLETE:
            continue
        if record.stage in ("search", "confirm") and record.value is not None:
            found.setdefault(without_seed(record.run), []).append(record)
    return {run: runs for run, runs in found.items() if runs[0].stage == "search"}


def without_seed(run: Run) -> Run:
    """The run with seed 0: equal for repeats of one configuration."""
    return run.with_origin(seed=0)


def noise(values: Sequence[np.ndarray], metric: str, images: int) -> float:
    """Standard deviation of a run's value, from repeats, (runs,) each, and what is known beforehand.

    At least, and beforehand, that of a score on so many val images (for accuracy the binomial one), at the
    level of the best few. Seeds alone give less on the same images: half its variance where a model is
    calibrated (Jordan, 2023), 0.51 in the repeats of results/curves. The rest is for the images: the best
    one is wanted for others than these.
    """
    floor = _of_images(np.array([v.mean() for v in values]), metric, images) ** 2
    squares = sum(float(((v - v.mean()) ** 2).sum()) for v in values)
    repeats = sum(len(v) - 1 for v in values)
    return math.sqrt(max(floor, (_PRIOR_RUNS * floor + squares) / (_PRIOR_RUNS + repeats)))


def _of_images(means: np.ndarray, metric: str, images: int) -> float:
    """Standard deviation of a score on so many images, at the level of the best few of (J,)."""
    order = np.argsort(METRICS[metric].gain(np.zeros(len(means)), means))
    level = float(means[order[:CONTENDERS]].mean())
    return max(METRICS[metric].spread(level) / math.sqrt(images), 1 / images)


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
class Field:
    """The configurations that are compared; larger values are better."""

    first: list[TrialRecord]  # the search's own run of each
    means: np.ndarray  # (J,)
    runs: np.ndarray  # (J,)
    alike: np.ndarray  # (J,), whether it says something about the others
    noise: float

    @classmethod
    def of(cls, found: Runs, metric: str, images: int) -> Field | None:
        """None where there is nothing to compare.

        What lies further below the median than the best one lies above it, and by more than the noise, or
        diverged with a seed, is of another kind (a schedule that never took off) and stands for itself.
        """
        if not found or not images:
            return None
        values = [np.array([float(r.value or 0) for r in runs]) for runs in found.values()]
        raw = np.array([v.mean() for v in values])
        means = raw if METRICS[metric].mode == "max" else -raw
        alike = means >= 2 * np.median(means) - means.max() - 2 * _of_images(raw, metric, images)
        steady = np.array([all(r.state is State.COMPLETE for r in runs) for runs in found.values()])
        alike = alike & steady if (alike & steady).any() else alike
        sd = noise([v for v, is_alike in zip(values, alike, strict=True) if is_alike], metric, images)
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

    def expecting(self, pending: Iterable[Run]) -> Field:
        """As if runs that are not over yet had come to what is expected of them."""
        asked = [without_seed(run) for run in pending]
        more = np.array([asked.count(without_seed(r.run)) for r in self.first])
        means = (self.runs * self.means + more * self.posterior.mean) / (self.runs + more)
        return replace(self, means=means, runs=self.runs + more)


def standings(records: Iterable[TrialRecord], *, metric: str, images: int) -> list[Standing]:
    """Every configuration by its posterior mean, best first; `images` are those of val."""
    field = Field.of(runs_of(records), metric, images)
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
    return standings(study.records(), metric=study.metric, images=len(study.labels("val")))


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
            "clearly_worse": s.clearly_worse,
            "chance_to_be_better": s.chance,
        }
        for s in leading(found)
    ]


def sentence(found: Sequence[Standing]) -> str:
    """Who is best, and who cannot be told apart from it."""
    best, others = found[0], found[1:]
    equal = [s for s in others if not s.clearly_worse]
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

"""Ranks configurations by all their runs, with intervals that allow for the luck of single runs.

The best of many single runs owes its place partly to luck (the winner's curse). So each configuration gets a
posterior of its expected value over seeds, in a normal model that shrinks the configurations' means towards
each other, the more so the fewer runs they have (James & Stein, 1961; Efron & Morris, 1975).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from carmodels.evaluation.intervals import Interval, independent_images
from carmodels.evaluation.metrics import METRICS
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.run import Run

CONTENDERS = 4  # best configurations that are run again
TAIL = 0.025  # probability outside a 95 % interval, on either side
_Z = NormalDist().inv_cdf(1 - TAIL)
_PRIOR_RUNS = 4  # repeats that the prior of the noise counts for
_TAUS = np.geomspace(1e-3, 1e3, 120)  # spreads of the configurations, in standard deviations of the noise
_TAU_SCALE = 2  # of the spread's half-Cauchy prior, in the same unit


@dataclass(frozen=True)
class Standing:
    """A configuration's place among all."""

    record: TrialRecord  # of the search's own run
    runs: int
    mean: float  # of the runs' values
    estimate: Interval  # expected value over seeds: posterior mean and 95 % interval
    chance_to_be_better: float  # than the best one; 0.5 for the best one itself

    @property
    def clearly_worse(self) -> bool:
        """Whether the 95 % interval of its gap to the best one excludes 0."""
        return self.chance_to_be_better < TAIL


@dataclass(frozen=True)
class Posterior:
    """Expected values of J configurations over seeds; larger is better."""

    mean: np.ndarray  # (J,)
    sd: np.ndarray  # (J,)
    gap: np.ndarray  # (J,) to the best one, <= 0
    gap_sd: np.ndarray  # (J,) 0 for the best one

    @property
    def best(self) -> int:
        """The index of the largest mean."""
        return int(self.mean.argmax())

    @property
    def chances(self) -> np.ndarray:
        """(J,) probabilities of being better than the best one."""
        ratios = np.divide(self.gap, self.gap_sd, out=np.zeros_like(self.gap), where=self.gap_sd > 0)
        return np.array([NormalDist().cdf(ratio) for ratio in ratios.tolist()])


def runs_by_config(records: Iterable[TrialRecord]) -> dict[Run, list[TrialRecord]]:
    """Complete runs of search and confirmation, by the run with seed 0; the search's own run comes first.

    Leaves out runs that were cut short, as their schedule was another. A rerun that diverged has the worst
    value, as its last epoch. Leaves out retraining, as it depends on which configuration is best and must not
    change that.
    """
    runs: dict[Run, list[TrialRecord]] = {}
    for record in sorted(records, key=lambda r: r.stage != "search"):
        if record.stage == "confirm" and record.diverged and record.curve:
            record = replace(record, value=record.curve[-1].value)
        elif record.cut_short or record.state is not State.COMPLETE:
            continue
        if record.stage in ("search", "confirm") and record.value is not None:
            runs.setdefault(without_seed(record.run), []).append(record)
    return {run: group for run, group in runs.items() if group[0].stage == "search"}


def without_seed(run: Run) -> Run:
    """The run with seed 0, equal for all repeats of a configuration."""
    return run.with_origin(seed=0)


def independent_val_images(study: Study) -> float:
    """Number of val images that the noise of the study's metric goes by; 0 without any.

    Near-duplicates count as one image, and macro F1 as its rare classes make it (`effective_images`).
    """
    labels = study.labels("val")
    truth, groups = np.array(list(labels.values()), int), study.groups(labels)
    counts = np.array([independent_images(groups[truth == k]) for k in range(truth.max(initial=-1) + 1)])
    return METRICS[study.metric].effective_images(counts)


def noise_sd(values: Sequence[np.ndarray], metric: str, images: float) -> float:
    """Standard deviation of a run's value, from repeats, (runs,) each, and a prior.

    The prior, which is also the lower bound, is the sampling error of a score on `images` independent val
    images (binomial for accuracy). Seeds alone give less variance on the same images: half of it for a
    calibrated model (Jordan, 2023), 0.51 of it in the repeats of results/curves. The rest stands for other
    images, on which the best configuration is to be the best, too.
    """
    floor = _sampling_error(np.array([v.mean() for v in values]), metric, images) ** 2
    squares = sum(float(((v - v.mean()) ** 2).sum()) for v in values)
    repeats = sum(len(v) - 1 for v in values)
    return math.sqrt(max(floor, (_PRIOR_RUNS * floor + squares) / (_PRIOR_RUNS + repeats)))


def _sampling_error(means: np.ndarray, metric: str, images: float) -> float:
    """Standard deviation of a score on so many images, at the level of the best few of (J,) means."""
    order = np.argsort(METRICS[metric].gain(np.zeros(len(means)), means))
    level = float(means[order[:CONTENDERS]].mean())
    return max(METRICS[metric].spread(level) / math.sqrt(images), 1 / images)


def posterior(means: np.ndarray, counts: np.ndarray, sd: float) -> Posterior:
    """Posterior of J configurations from the means (J,) of `counts` (J,) runs with noise `sd`.

    theta ~ N(mu, tau^2), mean ~ N(theta, sd^2 / count), with a flat mu and a half-Cauchy tau of scale 2 `sd`.
    Tau is integrated out on a grid (Rubin, 1981; Gelman et al., Bayesian Data Analysis, 3rd ed., section
    5.4): with a plug-in tau, intervals for a handful of configurations are too narrow. In simulations of 5 to
    25 configurations the intervals hold 93 to 98 % of the thetas.
    """
    taus = sd * _TAUS[:, None]  # (T, 1)
    own = sd**2 / counts
    total = own + taus**2  # (T, J)
    var_mu = 1 / (1 / total).sum(1, keepdims=True)
    mu = var_mu * (means / total).sum(1, keepdims=True)
    fit = np.log(var_mu[:, 0]) - np.log(total).sum(1) - ((means - mu) ** 2 / total).sum(1)
    log_weight = fit / 2 + np.log(_TAUS / (1 + (_TAUS / _TAU_SCALE) ** 2))  # the grid is even in log tau
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    shrinkage = own / total  # (T, J)
    given_tau = shrinkage * mu + (1 - shrinkage) * means
    var_given = (1 - shrinkage) * own  # given mu, too
    mean, sds = _mixture(weight, given_tau, var_given + var_mu * shrinkage**2)
    best = int(mean.argmax())
    gaps = given_tau - given_tau[:, [best]]
    var_gaps = var_given + var_given[:, [best]] + var_mu * (shrinkage - shrinkage[:, [best]]) ** 2
    gap, gap_sds = _mixture(weight, gaps, var_gaps)
    gap_sds[best] = 0.0
    return Posterior(mean, sds, gap, gap_sds)


def _mixture(weight: np.ndarray, means: np.ndarray, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, (J,), of a mixture, (T,), of normals, (T, J)."""
    share = weight[:, None]  # sums over rows: BLAS would round equal columns differently and break their ties
    mean = (share * means).sum(axis=0)
    return mean, np.sqrt((share * (variances + (means - mean) ** 2)).sum(axis=0))


@dataclass(frozen=True)
class RunStatistics:
    """Means and numbers of runs of J configurations; larger means are better.

    The configurations are in order of log loss, which thereby breaks ties of means.
    """

    records: list[TrialRecord]  # of the search's own run of each
    means: np.ndarray  # (J,)
    counts: np.ndarray  # (J,)
    pooled: np.ndarray  # (J,) whether it shares the prior with the others; else it stands alone
    noise: float  # standard deviation of a run's value

    @classmethod
    def of(cls, runs: dict[Run, list[TrialRecord]], metric: str, images: float) -> RunStatistics | None:
        """The statistics of `runs_by_config`; None if there is no run or no val image.

        A configuration stands alone if it diverged with a seed, or if it lies further below the median than
        the best one above it, by more than the noise (its training never took off).
        """
        if not runs or not images:
            return None
        runs = dict(sorted(runs.items(), key=lambda item: np.mean([r.log_loss for r in item[1]])))
        values = [np.array([float(r.value or 0) for r in found]) for found in runs.values()]
        raw = np.array([v.mean() for v in values])
        means = raw if METRICS[metric].mode == "max" else -raw
        pooled = means >= 2 * np.median(means) - means.max() - 2 * _sampling_error(raw, metric, images)
        steady = np.array([all(r.state is State.COMPLETE for r in found) for found in runs.values()])
        pooled = pooled & steady if (pooled & steady).any() else pooled
        sd = noise_sd([v for v, in_pool in zip(values, pooled, strict=True) if in_pool], metric, images)
        records = [found[0] for found in runs.values()]
        return cls(records, means, np.array([len(v) for v in values]), pooled, sd)

    @property
    def posterior(self) -> Posterior:
        """By the model for the pooled configurations, by their own runs for the others."""
        pool = posterior(self.means[self.pooled], self.counts[self.pooled], self.noise)
        mean, sd = self.means.astype(float), self.noise / np.sqrt(self.counts)
        mean[self.pooled], sd[self.pooled] = pool.mean, pool.sd
        best = int(mean.argmax())
        gap_sd = np.hypot(sd, sd[best])
        if self.pooled[best]:  # then the model's gaps are gaps to it
            gap_sd[self.pooled] = pool.gap_sd
        return Posterior(mean, sd, mean - mean[best], gap_sd)

    def with_pending(self, pending: Iterable[Run]) -> RunStatistics:
        """With runs that have not ended, as if their values were the posterior means."""
        repeats = [without_seed(run) for run in pending]
        added = np.array([repeats.count(without_seed(r.run)) for r in self.records])
        means = (self.counts * self.means + added * self.posterior.mean) / (self.counts + added)
        return replace(self, means=means, counts=self.counts + added)


def standings(records: Iterable[TrialRecord], *, metric: str, images: float) -> list[Standing]:
    """All configurations by posterior mean, best first; `images` as of `independent_val_images`."""
    stats = RunStatistics.of(runs_by_config(records), metric, images)
    if stats is None:
        return []
    result = stats.posterior
    chances = result.chances
    sign = 1 if METRICS[metric].mode == "max" else -1
    return [
        Standing(
            record=stats.records[j],
            runs=int(stats.counts[j]),
            mean=float(sign * stats.means[j]),
            estimate=_estimate(float(result.mean[j]), float(result.sd[j]), metric),
            chance_to_be_better=float(chances[j]),
        )
        for j in np.argsort(-result.mean, kind="stable")
    ]


def _estimate(mean: float, sd: float, metric: str) -> Interval:
    """The 95 % interval, within the metric's range."""
    if METRICS[metric].mode == "min":
        return Interval(-mean, max(0.0, -mean - _Z * sd), -mean + _Z * sd)
    return Interval(mean, max(0.0, mean - _Z * sd), min(1.0, mean + _Z * sd))


def standings_of(study: Study) -> list[Standing]:
    """The standings of a study."""
    return standings(study.records(), metric=study.metric, images=independent_val_images(study))


def top_standings(ranked: Sequence[Standing]) -> list[Standing]:
    """The rows of a table: the best few and all that ran more than once."""
    return [s for rank, s in enumerate(ranked) if rank < CONTENDERS or s.runs > 1]


def standings_json(ranked: Sequence[Standing]) -> list[dict[str, Any]]:
    """The top standings in JSON's types."""
    return [
        {
            "trial_id": s.record.trial_id,
            "title": s.record.config.title,
            "runs": s.runs,
            "mean": s.mean,
            "estimate": asdict(s.estimate),
            "clearly_worse": s.clearly_worse,
            "chance_to_be_better": s.chance_to_be_better,
        }
        for s in top_standings(ranked)
    ]


def standings_sentence(ranked: Sequence[Standing]) -> str:
    """Names the best configuration and those that are not clearly worse."""
    best, others = ranked[0], ranked[1:]
    rivals = [s for s in others if not s.clearly_worse]
    text = f"The best is {_title(best)}, by {best.runs} run{'' if best.runs == 1 else 's'}. "
    if not others:
        return text + "No other one has finished."
    if not rivals:
        return text + "All others are worse, with 95 % confidence."
    named = [_title(s) for s in top_standings(ranked) if s in rivals]
    unnamed = len(rivals) - len(named)
    names = ", ".join(named + ([f"{unnamed} more that ran once"] if unnamed else []))
    return text + f"Not clearly worse: {names}."


def _title(standing: Standing) -> str:
    return f"{standing.record.config.title} ({standing.record.trial_id})"

"""An Optuna sampler for fine-tuning: a Gaussian process over learning curves, with an informed prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import scipy.stats
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from carmodels.records import Cause
from carmodels.space import Choice, Range, Space
from carmodels.training.config import TrialConfig
from tune.optim.coordinates import Coordinates, from_unit, to_unit
from tune.optim.gaussian_process import CurvePoints, GaussianProcess, GPPosterior
from tune.optim.optuna_records import CAUSE, distribution

_RANDOM, _NEAR = 600, 400  # candidates: random ones, and neighbours of the best trials
_BEST, _ROUNDS, _NEIGHBOURS = 5, 2, 30  # then, in rounds, neighbours of each of the best candidates
_CHANGED, _STEP = 0.25, 0.12  # of a neighbour: share of changed values, standard deviation of a step
_FIRST_FIT, _FIT_AGAIN, _FIT_RUNS = 4, 1.15, 150  # ended runs at the first fit, growth to the next, maximum
_CUT = 3.0  # values are clipped at this multiple of (best - median) below the median


class CurveSampler(optuna.samplers.BaseSampler):
    """Draws the configuration with the largest expected improvement at the end of its schedule.

    A `GaussianProcess` models what trials reported, whatever their state, so that a pruned curve informs its
    own end (freeze-thaw, Swersky et al., 2014). `Coordinates` gives its prior mean. Running trials count as
    ended with their predicted value (Ginsbourger et al., 2010). A draw depends only on the seed and the
    trials, so a resumed search continues as it would have. `accepts` says whether a configuration may be
    drawn. `earlier` are the trials of other studies, with epochs and dimensions as here.
    """

    def __init__(
        self,
        space: Space,
        *,
        seed: int,
        accepts: Callable[[TrialConfig], bool] = lambda config: True,
        earlier: Sequence[Sequence[FrozenTrial]] = (),
    ) -> None:
        self._space = space
        self._earlier = earlier
        self._seed = seed
        self._accepts = accepts
        self._coordinates = Coordinates(space)
        self._process = GaussianProcess(
            self._coordinates.categorical,
            self._coordinates.length_shift,
            self._coordinates.trends,
            self._coordinates.coefficients,
        )
        self._fitted_to = -1  # ended runs of this study
        self._failures = GaussianProcess(self._coordinates.categorical, self._coordinates.length_shift)
        self._failures_fitted_to = 0  # ended runs
        self._fallback = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All dimensions; Optuna never asks for those whose condition does not hold."""
        return {name: distribution(d) for name, d in self._space.dimensions.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The values of the best accepted candidate; empty if none is accepted."""
        if "fixed_params" in trial.system_attrs:  # enqueued: nothing to choose
            return {}
        rng = np.random.default_rng([self._seed, trial.number])
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        sign = 1 if study.direction is optuna.study.StudyDirection.MAXIMIZE else -1
        earlier = enumerate(self._earlier, start=1)
        runs = [r for task, trials in earlier for r in self._runs(trials, task, sign)]
        runs += self._runs(others, 0, sign)
        chosen = self._best_candidate(runs, rng)
        if chosen is None:
            return {}
        return self._space.params(chosen)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A random value, for when no candidate was accepted."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    # ---- the model

    def _runs(self, trials: Iterable[FrozenTrial], task: int, sign: int) -> list[_Run]:
        """The trials with curves to maximise; ended ones first, in the order they ended."""
        runs = []
        for trial in sorted(trials, key=_order):
            if _is_not_known(trial):
                continue
            if set(trial.params) >= set(self._space.active_dimensions({**self._space.fixed, **trial.params})):
                config = self._space.config({**self._space.fixed, **trial.params})
                ended, failed = trial.state.is_finished(), _failed(trial)
                curve = {} if failed else _curve(trial.intermediate_values, config.epochs, sign)
                runs.append(_Run(config, self._coordinates.encode(config), curve, ended, failed, task))
        return runs

    def _curve_posterior(self, runs: Sequence[_Run]) -> GPPosterior:
        """The posterior over curves. Hyperparameters are fitted again when enough runs have ended."""
        observed = [run for run in runs if run.curve]
        earlier = [run for run in observed if run.task]
        ended = [run for run in observed if run.ended and not run.task]
        due = _fit_size(len(ended))
        if due != self._fitted_to and (due or len(earlier) >= _FIRST_FIT):
            own = _thinned(ended[:due], _FIT_RUNS)
            others = _thinned(earlier, max(1, _FIT_RUNS - len(own)))
            self._process.fit(*self._observations([*others, *own]))
            self._fitted_to = due
        points, values = self._observations(observed)
        posterior = self._process.condition(points, values)
        running = np.array([run.x for run in runs if not run.ended])
        if not len(running):
            return posterior
        ends = CurvePoints.at_end(running)
        predicted, _ = posterior.predict(ends)
        return self._process.condition(points + ends, np.concatenate([values, predicted]))

    def _observations(self, runs: Sequence[_Run]) -> tuple[CurvePoints, np.ndarray]:
        """(N,) points of the runs' curves and their (N,) values.

        In each task the values are clipped (`_CUT`) and scaled to variance 1 and to the prior mean's level.
        """
        rows = [
            (run.x, share, i, run.task, value)
            for i, run in enumerate(runs)
            for share, value in run.curve.items()
        ]
        x = np.array([row[0] for row in rows]).reshape(len(rows), len(self._coordinates.categorical))
        time, number, task, values = np.array([row[1:] for row in rows]).reshape(len(rows), 4).T
        points = CurvePoints(x, time, number, task)
        prior_mean = self._process.prior_mean(points)
        scaled = np.empty(len(values))
        for index in np.unique(task):
            in_task = task == index
            median = np.median(values[in_task])
            # the spread where most have the metric's best value
            above = values[in_task].max() - median or values[in_task].std()
            clipped = np.maximum(values[in_task], median - _CUT * above)
            level = prior_mean[in_task].mean()
            scaled[in_task] = (clipped - clipped.mean()) / max(clipped.std(), 1e-9) + level
        return points, scaled

    def _log_feasibility(self, runs: Sequence[_Run]) -> Callable[[np.ndarray], np.ndarray]:
        """(N, D) -> (N,) log probability that a configuration does not fail.

        A second process has the value 0 for a run that succeeded and -2 for one that failed (constrained
        optimisation, Gelbart et al., 2014). With failures as bad values of the first process instead, early
        failures would make every configuration look bad, and least so the prior's favourites.
        """
        ended = [run for run in runs if run.ended and not run.task]
        if not any(run.failed for run in ended):
            return lambda x: np.zeros(len(x))

        def observations(runs: Sequence[_Run]) -> tuple[CurvePoints, np.ndarray]:
            values = np.array([-2.0 * r.failed for r in runs])
            return CurvePoints.at_end(np.array([r.x for r in runs])), values

        due = len(ended) if len(ended) <= _FIT_RUNS else _fit_size(len(ended))
        if due != self._failures_fitted_to:
            groups = ([r for r in ended[:due] if r.failed is failed] for failed in (False, True))
            sample = [run for group in groups for run in _thinned(group, _FIT_RUNS // 2)]
            self._failures.fit(*observations(sample))
            self._failures_fitted_to = due
        posterior = self._failures.condition(*observations(ended))

        def log_feasibility(x: np.ndarray) -> np.ndarray:
            mean, deviation = posterior.predict(CurvePoints.at_end(x))
            return scipy.stats.norm.logcdf((mean + 1) / deviation)

        return log_feasibility

    # ---- candidates

    def _best_candidate(self, runs: Sequence[_Run], rng: np.random.Generator) -> TrialConfig | None:
        """The accepted candidate with the largest expected improvement."""
        posterior, log_feasibility = self._curve_posterior(runs), self._log_feasibility(runs)
        own = [run for run in runs if not run.task]
        rivals = [run for run in own if run.curve] or [run for run in own if not run.failed]
        candidates = [self._random(rng) for _ in range(_RANDOM)]
        if bases := rivals or [run for run in runs if run.curve]:
            means, _ = posterior.predict(CurvePoints.at_end(np.array([run.x for run in bases])))
            top = [bases[i].config for i in np.argsort(-means)[: _BEST + 1]]
            candidates += [self._neighbour(top[i % len(top)], rng, _CHANGED, _STEP) for i in range(_NEAR)]
            best = float(means.max())

        def score(configs: Sequence[TrialConfig]) -> np.ndarray:
            x = np.array([self._coordinates.encode(c) for c in configs])
            mean, deviation = posterior.predict(CurvePoints.at_end(x))
            gain = log_expected_improvement(mean, deviation, best) if rivals else mean
            return gain + log_feasibility(x)

        scores = score(candidates)
        for _ in range(_ROUNDS):
            top = [candidates[i] for i in np.argsort(-scores)[:_BEST]]
            new = [self._neighbour(c, rng, _CHANGED, _STEP / 2) for c in top for _ in range(_NEIGHBOURS)]
            candidates += new
            scores = np.concatenate([scores, score(new)])
        ranked = (candidates[i] for i in np.argsort(-scores))
        return next((config for config in ranked if self._accepts(config)), None)

    def _random(self, rng: np.random.Generator) -> TrialConfig:
        return self._mutate(None, rng, lambda name: True, _STEP)

    def _neighbour(
        self, base: TrialConfig, rng: np.random.Generator, changed: float, step: float
    ) -> TrialConfig:
        """A configuration with about a `changed` share of new values: another option, or a step away."""
        return self._mutate(base, rng, lambda name: rng.random() < changed, step)

    def _mutate(
        self,
        base: TrialConfig | None,
        rng: np.random.Generator,
        changes: Callable[[str], bool],
        step: float,
    ) -> TrialConfig:
        """`base` with new values for the dimensions that change and for those it has not drawn."""
        before = self._space.params(base) if base else {}
        values = dict(self._space.fixed)
        for name, dimension in self._space.dimensions.items():
            if dimension.when is not None and values.get(dimension.when[0]) not in dimension.when[1]:
                continue
            if name in before and not changes(name):
                values[name] = before[name]
            elif isinstance(dimension, Choice):
                values[name] = dimension.options[rng.integers(len(dimension.options))]
            elif name in before:
                unit = to_unit(dimension, before[name]) + rng.normal(0, step)
                values[name] = _rounded(dimension, float(np.clip(unit, 0, 1)))
            else:
                values[name] = _rounded(dimension, rng.random())
        return self._space.config(values)


def log_expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """(N,) log expected improvement over `best` of normal distributions (Ament et al., 2023).

    Exact down to five standard deviations below `best`; beyond, an asymptote at most 0.1 too high.
    """
    z = (mean - best) / deviation
    density = scipy.stats.norm.logpdf(z)
    plain = np.exp(density) + z * scipy.stats.norm.cdf(z)
    far = density - 2 * np.log(np.maximum(np.abs(z), 1.0))
    return np.log(deviation) + np.where(z > -5, np.log(np.maximum(plain, 1e-300)), far)


def _rounded(dimension: Range, unit: float) -> float:
    """The value at a coordinate, to four digits, within the range."""
    return min(max(float(f"{from_unit(dimension, unit):.4g}"), dimension.low), dimension.high)


def _thinned(runs: Sequence[_Run], most: int) -> Sequence[_Run]:
    """An evenly spaced choice of at most `most` runs."""
    return runs[:: max(1, math.ceil(len(runs) / most))]


@dataclass(frozen=True)
class _Run:
    """A trial and the values it has reported."""

    config: TrialConfig
    x: np.ndarray  # (D,)
    curve: dict[float, float]  # share of the schedule -> value, more is better
    ended: bool
    failed: bool
    task: int  # 0: this study


def _order(trial: FrozenTrial) -> tuple[bool, float, int]:
    ended = trial.datetime_complete
    return ended is None, ended.timestamp() if ended else 0.0, trial.number


def _is_not_known(trial: FrozenTrial) -> bool:
    """Whether a trial failed by no fault of its configuration."""
    return trial.state is TrialState.FAIL and trial.user_attrs.get(CAUSE) != Cause.OUT_OF_MEMORY


def _failed(trial: FrozenTrial) -> bool:
    """Whether a trial ran out of memory, or ended with a value that is not finite."""
    values = trial.intermediate_values
    return trial.state is TrialState.FAIL or (bool(values) and not math.isfinite(values[max(values)]))


def _curve(values: Mapping[int, float], epochs: int, sign: int) -> dict[float, float]:
    """The last finite value and the one halfway to it, by share of the schedule."""
    finite = {epoch: value for epoch, value in values.items() if math.isfinite(value)}
    if not finite:
        return {}
    last = max(finite)
    halfway = max((epoch for epoch in finite if epoch <= max(1, last // 2)), default=last)
    return {epoch / epochs: sign * finite[epoch] for epoch in sorted({halfway, last})}


def _fit_size(ended: int) -> int:
    """How many of the ended runs to fit to; grows in steps, so that most draws need no fit. 0: too few."""
    due = 0
    step = _FIRST_FIT
    while step <= ended:
        due, step = step, max(step + 1, math.ceil(step * _FIT_AGAIN))
    return due

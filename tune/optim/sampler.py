"""An Optuna sampler for fine-tuning: a Gaussian process over learning curves, its prior from experience."""

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

from carmodels.space import Choice, Space
from carmodels.training.config import TrialConfig
from tune.optim.coordinates import Coordinates, place, value_at
from tune.optim.gaussian_process import Points, Posterior, Process
from tune.optim.optuna_records import distribution

_RANDOM, _NEAR = 600, 400  # candidates from anywhere, and near the best that were seen
_BEST, _ROUNDS, _NEIGHBOURS = 5, 2, 30  # then neighbours of the best candidates, in rounds
_CHANGED, _STEP = 0.25, 0.12  # a neighbour's share of new values, and the standard deviation of a step
_FIRST_FIT, _FIT_AGAIN, _FIT_RUNS = 4, 1.15, 150  # ended runs at the first fit, growth to the next, at most
_CUT = 3.0  # values further below the median than so many times the best is above it count as that


class CurveSampler(optuna.samplers.BaseSampler):
    """Draws the configuration with the largest expected improvement at the end of its schedule.

    What trials have reported, in all states, is modelled by `Process`: a curve that was cut off says
    something of its end, and more of its epochs than its end (freeze-thaw, Swersky et al., 2014). The prior
    mean is that of `Coordinates`. Trials that run count as what is expected of them (Ginsbourger et al.,
    2010). The draw depends on the seed and on the trials alone, so a resumed search goes on as it would have.
    `earlier` are the trials of other studies, with epochs and dimensions as here.
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
        self._process = Process(
            self._coordinates.categorical,
            self._coordinates.longer,
            self._coordinates.trends,
            self._coordinates.coefficients,
        )
        self._fitted_to = -1  # ended runs of this study
        self._failures = Process(self._coordinates.categorical, self._coordinates.longer)
        self._failures_fitted_to = 0  # ended runs
        self._fallback = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All dimensions; those whose condition does not hold are never asked for."""
        return {name: distribution(d) for name, d in self._space.dimensions.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The values of the best configuration that is accepted; none where none of the candidates is."""
        if "fixed_params" in trial.system_attrs:  # enqueued: nothing to choose
            return {}
        rng = np.random.default_rng([self._seed, trial.number])
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        sign = 1 if study.direction is optuna.study.StudyDirection.MAXIMIZE else -1
        runs = [r for task, known in enumerate(self._earlier, start=1) for r in self._runs(known, task, sign)]
        runs += self._runs(others, 0, sign)
        chosen = self._improving(runs, rng)
        if chosen is None:
            return {}
        return {name: getattr(chosen, name) for name in self._space.active_dimensions(vars(chosen))}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A value at random, where no candidate was accepted."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    # ---- what was seen

    def _runs(self, trials: Iterable[FrozenTrial], task: int, sign: int) -> list[_Run]:
        """The trials with their curves upwards; ended ones first, in the order in which they ended."""
        runs = []
        for trial in sorted(trials, key=_order):
            if set(trial.params) >= set(self._space.active_dimensions({**self._space.fixed, **trial.params})):
                config = TrialConfig.from_dict({**self._space.fixed, **trial.params})
                ended, failed = trial.state.is_finished(), _failed(trial)
                curve = {} if failed else _curve(trial.intermediate_values, config.epochs, sign)
                runs.append(_Run(config, self._coordinates.of(config), curve, ended, failed, task))
        return runs

    def _model(self, runs: Sequence[_Run]) -> Posterior:
        """What the runs tell of all configurations. Hyperparameters are fitted anew from time to time."""
        told = [run for run in runs if run.curve]
        before = [run for run in told if run.task]
        ended = [run for run in told if run.ended and not run.task]
        due = _fit_at(len(ended))
        if due != self._fitted_to and (due or len(before) >= _FIRST_FIT):
            own = _thinned(ended[:due], _FIT_RUNS)
            others = _thinned(before, max(1, _FIT_RUNS - len(own)))
            self._process.fit(*self._points([*others, *own]))
            self._fitted_to = due
        points, values = self._points(told)
        model = self._process.condition(points, values)
        running = np.array([run.x for run in runs if not run.ended])
        if not len(running):
            return model
        expected = Points.at_the_end(running)
        guessed, _ = model.predict(expected)
        return self._process.condition(points + expected, np.concatenate([values, guessed]))

    def _points(self, runs: Sequence[_Run]) -> tuple[Points, np.ndarray]:
        """Every value of the runs: (N,) points and (N,) values.

        In each task they have variance 1 and the level expected of them; values further below the median than
        `_CUT` times the best is above it are cut to that.
        """
        rows = [
            (run.x, share, i, run.task, value)
            for i, run in enumerate(runs)
            for share, value in run.curve.items()
        ]
        x = np.array([row[0] for row in rows]).reshape(len(rows), len(self._coordinates.categorical))
        time, number, task, values = np.array([row[1:] for row in rows]).reshape(len(rows), 4).T
        points = Points(x, time, number, task)
        expected = self._process.expected(points)
        scaled = np.empty(len(values))
        for one in np.unique(task):
            found = values[task == one]
            middle = np.median(found)
            above = found.max() - middle or found.std()  # 0 where most have the best value there can be
            cut = np.maximum(found, middle - _CUT * above)
            level = expected[task == one].mean()
            scaled[task == one] = (cut - cut.mean()) / max(cut.std(), 1e-9) + level
        return points, scaled

    def _chance(self, runs: Sequence[_Run]) -> Callable[[np.ndarray], np.ndarray]:
        """(N, D) -> (N,) log of the probability that a configuration does not fail, by how the others ended.

        A process of its own, 0 where a run went well and -2 where it failed (constrained optimisation,
        Gelbart et al., 2014). Were a failure a bad value instead, all that fails at first would make
        everything look bad, and what was expected to be best least so.
        """
        ended = [run for run in runs if run.ended and not run.task]
        if not any(run.failed for run in ended):
            return lambda x: np.zeros(len(x))

        def points(some: Sequence[_Run]) -> tuple[Points, np.ndarray]:
            return Points.at_the_end(np.array([r.x for r in some])), np.array([-2.0 * r.failed for r in some])

        due = len(ended) if len(ended) <= _FIT_RUNS else _fit_at(len(ended))
        if due != self._failures_fitted_to:
            well, failed = ([r for r in ended[:due] if r.failed is which] for which in (False, True))
            self._failures.fit(*points([*_thinned(well, _FIT_RUNS // 2), *_thinned(failed, _FIT_RUNS // 2)]))
            self._failures_fitted_to = due
        posterior = self._failures.condition(*points(ended))

        def chance(x: np.ndarray) -> np.ndarray:
            mean, deviation = posterior.predict(Points.at_the_end(x))
            return scipy.stats.norm.logcdf((mean + 1) / deviation)

        return chance

    # ---- what comes next

    def _improving(self, runs: Sequence[_Run], rng: np.random.Generator) -> TrialConfig | None:
        """The accepted candidate with the largest expected improvement."""
        model, chance = self._model(runs), self._chance(runs)
        own = [run for run in runs if not run.task]
        told = [run for run in own if run.curve]
        known = told or [run for run in own if not run.failed]  # of which at first something is expected
        candidates = [self._random(rng) for _ in range(_RANDOM)]
        if bases := known or [run for run in runs if run.curve]:
            means, _ = model.predict(Points.at_the_end(np.array([run.x for run in bases])))
            top = [bases[i].config for i in np.argsort(-means)[: _BEST + 1]]
            candidates += [self._near(top[i % len(top)], rng, _CHANGED, _STEP) for i in range(_NEAR)]
            best = float(means.max())

        def improvement(configs: Sequence[TrialConfig]) -> np.ndarray:
            x = np.array([self._coordinates.of(c) for c in configs])
            mean, deviation = model.predict(Points.at_the_end(x))
            gain = log_expected_improvement(mean, deviation, best) if known else mean
            return gain + chance(x)

        values = improvement(candidates)
        for _ in range(_ROUNDS):
            top = [candidates[i] for i in np.argsort(-values)[:_BEST]]
            more = [self._near(c, rng, _CHANGED, _STEP / 2) for c in top for _ in range(_NEIGHBOURS)]
            candidates += more
            values = np.concatenate([values, improvement(more)])
        return self._first([candidates[i] for i in np.argsort(-values)])

    def _first(self, candidates: Iterable[TrialConfig]) -> TrialConfig | None:
        return next((config for config in candidates if self._accepts(config)), None)

    def _random(self, rng: np.random.Generator) -> TrialConfig:
        return self._filled({}, rng, lambda name: True, _STEP)

    def _near(self, base: TrialConfig, rng: np.random.Generator, changed: float, step: float) -> TrialConfig:
        """A configuration of which about so much is new: another option, or a step away."""
        return self._filled(vars(base), rng, lambda name: rng.random() < changed, step)

    def _filled(
        self,
        base: Mapping[str, Any],
        rng: np.random.Generator,
        changes: Callable[[str], bool],
        step: float,
    ) -> TrialConfig:
        """The values of `base` but for those that change, or that are drawn here and were not there."""
        before = set(self._space.active_dimensions(base)) if base else set()
        values = dict(self._space.fixed)
        for name, dimension in self._space.dimensions.items():
            if dimension.when is not None and values.get(dimension.when[0]) not in dimension.when[1]:
                continue
            if name in before and not changes(name):
                values[name] = base[name]
            elif isinstance(dimension, Choice):
                values[name] = dimension.options[rng.integers(len(dimension.options))]
            elif name in before:
                share = place(dimension, base[name]) + rng.normal(0, step)
                values[name] = value_at(dimension, float(np.clip(share, 0, 1)))
            else:
                values[name] = value_at(dimension, rng.random())
        return TrialConfig.from_dict(values)


def log_expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """(N,) logarithms of the expected improvement over `best` of normal distributions.

    Exact to five deviations below, by its asymptote, 0.1 too high there, beyond (Ament et al., 2023).
    """
    z = (mean - best) / deviation
    density = scipy.stats.norm.logpdf(z)
    plain = np.exp(density) + z * scipy.stats.norm.cdf(z)
    far = density - 2 * np.log(np.maximum(np.abs(z), 1.0))
    return np.log(deviation) + np.where(z > -5, np.log(np.maximum(plain, 1e-300)), far)


def _thinned(runs: Sequence[_Run], most: int) -> Sequence[_Run]:
    """An even choice of at most so many."""
    return runs[:: max(1, math.ceil(len(runs) / most))]


@dataclass(frozen=True)
class _Run:
    """A trial and what it has reported."""

    config: TrialConfig
    x: np.ndarray  # (D,)
    curve: dict[float, float]  # share of the schedule -> value, more is better
    ended: bool
    failed: bool
    task: int  # 0: this study


def _order(trial: FrozenTrial) -> tuple[bool, float, int]:
    ended = trial.datetime_complete
    return ended is None, ended.timestamp() if ended else 0.0, trial.number


def _failed(trial: FrozenTrial) -> bool:
    """Whether it ended in an error or without a finite value."""
    values = trial.intermediate_values
    return trial.state is TrialState.FAIL or (bool(values) and not math.isfinite(values[max(values)]))


def _curve(values: Mapping[int, float], epochs: int, sign: int) -> dict[float, float]:
    """Of finite values by epoch, the last and the one halfway to it, by share of the schedule."""
    found = {epoch: value for epoch, value in values.items() if math.isfinite(value)}
    if not found:
        return {}
    last = max(found)
    before = max((epoch for epoch in found if epoch <= max(1, last // 2)), default=last)
    return {epoch / epochs: sign * found[epoch] for epoch in sorted({before, last})}


def _fit_at(ended: int) -> int:
    """The number of ended runs to fit to, of so many: it grows by steps. 0: too few."""
    due = 0
    step = _FIRST_FIT
    while step <= ended:
        due, step = step, max(step + 1, math.ceil(step * _FIT_AGAIN))
    return due

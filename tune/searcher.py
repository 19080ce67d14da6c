"""Which configuration comes next: queued ones first, then draws from Optuna, which is told the truth."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from carmodels.space import Choice, Dimension, Space, TrialConfig, suggest
from carmodels.study import Status, TrialRecord

optuna.logging.set_verbosity(optuna.logging.WARNING)

STARTUP_TRIALS = 8  # drawn at random before the sampler models anything
_PATIENCE = 10  # such draws before the sampler gives way to random ones, for that trial
_REDRAWS = 50  # in a row that are not new or do not fit before the search ends


class Queue(Searcher):
    """Hands out a list of configurations, then ends; before that at one that no longer fits into the time."""

    def __init__(
        self,
        configs: Iterable[TrialConfig],
        *,
        metric: str,
        mode: str,
        fits: Callable[[TrialConfig], bool] = lambda config: True,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self._configs = list(configs)
        self._fits = fits

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # omits FINISHED
        if not self._configs or not self._fits(self._configs[0]):
            return Searcher.FINISHED
        return asdict(self._configs.pop(0))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to learn."""


class Draws(OptunaSearch):
    """OptunaSearch over a `Space`: a queue that goes first, a limit, an end of drawing, no trial twice.

    Optuna is told what happened: a stopped trial is pruned (with its intermediate values), a diverged one has
    the worst value, so that its region is avoided. `stamp` holds the fields every configuration shares: seed,
    metric, data and split.
    """

    _ot_study: Any  # an optuna.Study; Ray's code starts from None and has no annotation

    def __init__(
        self,
        space: Space,
        *,
        stamp: dict[str, Any],
        metric: str,
        mode: str,
        seed: int,
        limit: int | None,
        fits: Callable[[TrialConfig], bool],
        queue: Sequence[TrialConfig] = (),
        known: Sequence[TrialRecord] = (),
        storage: optuna.storages.BaseStorage | None = None,
    ) -> None:
        # A resumed search must not repeat the draws it has made: the seed moves on with what is known.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of group=True
            sampler = optuna.samplers.TPESampler(
                seed=seed + len(known), group=True, n_startup_trials=STARTUP_TRIALS
            )
        super().__init__(
            partial(suggest, space=space), metric=metric, mode=mode, sampler=sampler, storage=storage
        )
        self._dimensions = space
        self._stamp = stamp
        self._queue = list(queue)
        self._seen = {r.trial_id for r in known} | {c.id for c in queue}
        self._left = None if limit is None else max(0, limit - len(known))
        self._fits = fits
        for record in known:
            self._learn(record)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # omits FINISHED
        """The next TrialConfig's fields, or FINISHED at the limit, after the time, with nothing new left."""
        if self._left == 0:
            return Searcher.FINISHED
        config = self._queue.pop(0) if self._queue else self._draw(trial_id)
        if config is None:
            return Searcher.FINISHED
        if self._left is not None:
            self._left -= 1
        return asdict(config)

    def _draw(self, trial_id: str) -> TrialConfig | None:
        """A configuration that was not drawn before and ends in time; None where none is found."""
        sampler = self._ot_study.sampler
        try:
            for attempt in range(_REDRAWS):
                if attempt == _PATIENCE:  # the sampler keeps to a region that is used up or takes too long
                    self._ot_study.sampler = optuna.samplers.RandomSampler(seed=len(self._seen))
                drawn = super().suggest(trial_id)
                assert drawn is not None
                config = TrialConfig.from_dict({**drawn, **self._stamp})
                if config.id not in self._seen and self._fits(config):
                    self._seen.add(config.id)
                    return config
                self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
            return None
        finally:
            self._ot_study.sampler = sampler  # random draws for this trial alone

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._ot_trials:  # queued configurations are not Optuna's
            self._ot_trials[trial_id].report(result[self.metric], result["epoch"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna how a trial of its own ended."""
        if trial_id not in self._ot_trials:
            return
        trial = self._ot_trials.pop(trial_id)
        if error or not result or self.metric not in result:
            self._ot_study.tell(trial, state=TrialState.FAIL)
        elif result.get("status"):
            self._ot_study.tell(trial, result["best_value"])
        else:
            trial.report(result[self.metric], result["epoch"])
            self._ot_study.tell(trial, state=TrialState.PRUNED)

    def _learn(self, record: TrialRecord) -> None:
        """Tell Optuna of a trial from an earlier run, where the space could have drawn it."""
        if not record.note and (trial := learned(record, self._dimensions)) is not None:
            self._ot_study.add_trial(trial)


def learned(record: TrialRecord, space: Space) -> optuna.trial.FrozenTrial | None:
    """A record as Optuna keeps trials; None where the space could not have drawn it or it is to run again."""
    values = asdict(record.config)
    drawn = space.drawn(values)
    fixed_differs = any(values[name] != value for name, value in space.fixed.items())
    within = all(_holds(d, values[n]) for n, d in drawn.items())
    if fixed_differs or not within or record.status not in _STATES:
        return None
    return optuna.trial.create_trial(
        state=_STATES[record.status],
        value=_told(record),
        params={name: values[name] for name in drawn},
        distributions={name: _distribution(d) for name, d in drawn.items()},
        intermediate_values={e.epoch: e.value for e in record.curve},
    )


_STATES = {
    Status.FINISHED: TrialState.COMPLETE,
    Status.DIVERGED: TrialState.COMPLETE,
    Status.STOPPED: TrialState.PRUNED,
    Status.FAILED: TrialState.FAIL,
}


def _told(record: TrialRecord) -> float | None:
    """The value Optuna hears: for a diverged trial the worst there is, which its last epoch carries."""
    if _STATES[record.status] is not TrialState.COMPLETE:
        return None
    return record.curve[-1].value if record.value is None else record.value


def _holds(dimension: Dimension, value: Any) -> bool:
    if isinstance(dimension, Choice):
        return value in dimension.options
    return dimension.low <= value <= dimension.high


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.options)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)

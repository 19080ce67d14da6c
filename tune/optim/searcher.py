"""Which configuration comes next: queued ones first, then draws from Optuna, which is told the truth."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from carmodels.records import Cause, TrialRecord
from carmodels.space import Space
from carmodels.training.config import TrialConfig
from carmodels.training.run import Origin, Run
from tune.optim.optuna_records import frozen_trial, params_of, suggest, transferable_trials
from tune.optim.sampler import CurveSampler

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", message="Define-by-run function")  # Ray times the sampler with it


class QueueSearcher(Searcher):
    """Hands out a list of configurations, then ends; before that at one that no longer fits into the time."""

    def __init__(
        self,
        runs: Iterable[Run],
        *,
        metric: str,
        mode: str,
        fits: Callable[[Run], bool] = lambda run: True,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self._runs = list(runs)
        self._fits = fits

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # omits FINISHED
        if not self._runs or not self._fits(self._runs[0]):
            return Searcher.FINISHED
        return self._runs.pop(0).to_dict()

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to learn."""


class OptunaSearcher(OptunaSearch):
    """OptunaSearch over a `Space`: a queue that goes first, a limit, an end of drawing, no trial twice.

    Optuna is told what happened: a stopped trial is pruned (with its intermediate values), a diverged one
    ends with NaN and has the worst value. All trials share
    `origin`. Of the queue, what is `optional` (ids) goes only where it fits. `earlier` are the
    records of other studies, of any data. `storage` gets what has ended, and is not read: a database asked
    for all trials at each draw takes seconds where hundreds run.
    """

    _ot_study: Any  # an optuna.Study; Ray's code starts from None and has no annotation

    def __init__(
        self,
        space: Space,
        *,
        origin: Origin,
        metric: str,
        mode: str,
        seed: int,
        limit: int | None,
        fits: Callable[[TrialConfig], bool],
        queue: Sequence[Run] = (),
        optional: Collection[str] = (),
        known: Sequence[TrialRecord] = (),
        earlier: Sequence[Sequence[TrialRecord]] = (),
        storage: optuna.storages.BaseStorage | None = None,
    ) -> None:
        super().__init__(
            partial(suggest, space=space),
            metric=metric,
            mode=mode,
            sampler=CurveSampler(
                space,
                seed=seed,
                accepts=self._accepts,
                earlier=[transferable_trials(records, space) for records in earlier],
            ),
        )
        self._kept = storage and optuna.create_study(
            storage=storage, study_name=self._ot_study.study_name, direction=self._ot_study.direction
        )
        self._dimensions = space
        self._reported: dict[str, int] = {}  # Ray's trial id -> the last epoch that Optuna knows
        self._origin = origin
        self._queue, self._optional = list(queue), optional
        self._seen = {r.trial_id for r in known} | {run.id for run in queue}
        self._left = None if limit is None else max(0, limit - len(known))
        self._fits = fits
        for record in known:
            if (trial := frozen_trial(record, space)) is not None:
                self._ot_study.add_trial(trial)
        if self._kept:
            self._kept.add_trials(self._ot_study.trials)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # omits FINISHED
        """The next run as a dictionary, or FINISHED at the limit, after the time, with nothing new left."""
        while self._queue and self._queue[0].id in self._optional and not self._fits(self._queue[0].config):
            self._queue.pop(0)  # it stays the row that it was, one of `limit`
            self._count()
        if self._left == 0:
            return Searcher.FINISHED
        run = self._queued(trial_id) if self._queue else self._drawn(trial_id)
        if run is None:
            return Searcher.FINISHED
        self._count()
        return run.to_dict()

    def _count(self) -> None:
        if self._left:
            self._left -= 1

    def _queued(self, trial_id: str) -> Run:
        """The next of the queue. It is a trial of Optuna's where the space could have drawn it."""
        run = self._queue.pop(0)
        params = params_of(run.config, self._dimensions)
        if params is not None:
            self._ot_study.enqueue_trial(params)
            self._asked(trial_id)
        return run

    def _asked(self, trial_id: str) -> dict[str, Any]:
        """What Optuna gives for a new trial."""
        with warnings.catch_warnings():  # Ray takes a sampler that thinks for a training in the wrong place
            warnings.filterwarnings("ignore", message="Define-by-run function")
            drawn = super().suggest(trial_id)
        assert drawn is not None
        return drawn

    def _drawn(self, trial_id: str) -> Run | None:
        """A run that was not drawn before and ends in time; None where none is found."""
        drawn = self._asked(trial_id)
        config = TrialConfig.from_dict(drawn)
        if self._accepts(config):
            run = Run(config, self._origin)
            self._seen.add(run.id)
            return run
        self._tell(trial_id, state=TrialState.FAIL)
        return None

    def save(self, checkpoint_path: str) -> None:
        """Nothing: Ray would write all trials again and again, and we resume from trials.jsonl."""

    def _accepts(self, config: TrialConfig) -> bool:
        return Run(config, self._origin).id not in self._seen and self._fits(config)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell Optuna an epoch's value, once: Ray repeats a trial's last, a trial begun anew all of them."""
        if trial_id not in self._ot_trials:  # of what was queued, some are not Optuna's
            return
        epoch = result["epoch"]
        if self._reported.get(trial_id, 0) < epoch:
            diverged = result.get("cause") == Cause.DIVERGED
            self._ot_trials[trial_id].report(math.nan if diverged else result[self.metric], epoch)
            self._reported[trial_id] = epoch

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna how a trial of its own ended."""
        if trial_id not in self._ot_trials:
            return
        if error or not result or self.metric not in result:
            self._tell(trial_id, state=TrialState.FAIL)
            return
        self.on_trial_result(trial_id, result)
        if result.get("state"):
            self._tell(trial_id, result["best_value"])
        else:
            self._tell(trial_id, state=TrialState.PRUNED)

    def _tell(self, trial_id: str, value: float | None = None, state: TrialState | None = None) -> None:
        """Tell Optuna how a trial of its own ended."""
        observed = self._ot_study.tell(self._ot_trials.pop(trial_id), value, state)
        if self._kept:
            self._kept.add_trial(observed)

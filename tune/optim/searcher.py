"""Ray Tune searchers: a fixed queue of runs, and Optuna over a `Space`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
from tune.optim.optuna_file import OptunaFile
from tune.optim.optuna_records import CAUSE, frozen_trial, params_of, suggest, transferable_trials
from tune.optim.sampler import CurveSampler

optuna.logging.set_verbosity(optuna.logging.WARNING)


class QueueSearcher(Searcher):
    """Hands out runs in order. Ends after the last one, or before the first that does not fit."""

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
    """OptunaSearch that runs a queue first, draws no configuration twice and reports how trials ended.

    Ray's class reports a stopped trial as complete. Here it is pruned and keeps its intermediate values. A
    diverged trial is complete with the worst value; its last intermediate value is NaN. Other failures carry
    their cause, from `causes` by Ray's trial id.

    Every trial gets `origin`. `limit` is the most trials, those in `known` included. `known` are this study's
    records, `earlier` those of other studies, on any data. Queued runs whose ids are in `optional` are left
    out if they do not fit. `copy` receives trials that ended. It is not read, because with hundreds of
    trials a database takes seconds for each draw.
    """

    _ot_study: Any  # an optuna.Study; Ray assigns None first, without an annotation

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
        causes: Mapping[str, Cause] | None = None,
        copy: OptunaFile | None = None,
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
        self._causes, self._copy = causes if causes is not None else {}, copy
        self._search_space = space
        self._last_reported: dict[str, int] = {}  # Ray's trial id -> epoch
        self._origin = origin
        self._queue, self._optional = list(queue), optional
        self._used_ids = {r.trial_id for r in known} | {run.id for run in queue}
        self._remaining = None if limit is None else max(0, limit - len(known))
        self._fits = fits
        self._ot_study.add_trials([t for r in known if (t := frozen_trial(r, space)) is not None])
        if self._copy:
            self._copy.begin(self._ot_study)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # omits FINISHED
        """The next run as a dictionary; FINISHED at the limit or where no new run ends in time."""
        while self._queue and self._queue[0].id in self._optional and not self._fits(self._queue[0].config):
            self._queue.pop(0)
            self._count()  # its record stays and counts towards the limit
        if self._remaining == 0:
            return Searcher.FINISHED
        run = self._next_queued(trial_id) if self._queue else self._draw(trial_id)
        if run is None:
            return Searcher.FINISHED
        self._count()
        return run.to_dict()

    def _count(self) -> None:
        if self._remaining:
            self._remaining -= 1

    def _next_queued(self, trial_id: str) -> Run:
        """The next of the queue, which becomes an Optuna trial if the space can draw it."""
        run = self._queue.pop(0)
        params = params_of(run.config, self._search_space)
        if params is not None:
            self._ot_study.enqueue_trial(params)
            self._ask(trial_id)
        return run

    def _draw(self, trial_id: str) -> Run | None:
        """A new run that ends in time; None if the sampler finds none."""
        config = TrialConfig.from_dict(self._ask(trial_id))
        if self._accepts(config):
            run = Run(config, self._origin)
            self._used_ids.add(run.id)
            return run
        self._tell(trial_id, state=TrialState.FAIL)
        return None

    def _accepts(self, config: TrialConfig) -> bool:
        return Run(config, self._origin).id not in self._used_ids and self._fits(config)

    def _ask(self, trial_id: str) -> dict[str, Any]:
        """The fields of Optuna's next configuration."""
        with warnings.catch_warnings():  # Ray takes a draw of over a second for training in the driver
            warnings.filterwarnings("ignore", message="Define-by-run function")
            values = super().suggest(trial_id)
        assert values is not None
        return values

    def _tell(self, trial_id: str, value: float | None = None, state: TrialState | None = None) -> None:
        """Ends an Optuna trial, and copies it."""
        trial = self._ot_study.tell(self._ot_trials.pop(trial_id), value, state)
        if self._copy:
            self._copy.add([trial])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search resumes from trials.jsonl, and Ray would write all trials again and again."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Reports an epoch to Optuna once: Ray repeats the last result, a restarted trial all of them."""
        if trial_id not in self._ot_trials:  # queued, and not of the space
            return
        epoch = result["epoch"]
        if self._last_reported.get(trial_id, 0) < epoch:
            diverged = result.get("cause") == Cause.DIVERGED
            self._ot_trials[trial_id].report(math.nan if diverged else result[self.metric], epoch)
            self._last_reported[trial_id] = epoch

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells Optuna whether a trial is complete, pruned or failed."""
        if trial_id not in self._ot_trials:
            return
        if error or not result or self.metric not in result:
            if cause := self._causes.get(trial_id):
                self._ot_trials[trial_id].set_user_attr(CAUSE, str(cause))
            self._tell(trial_id, state=TrialState.FAIL)
            return
        self.on_trial_result(trial_id, result)
        if result.get("state"):
            self._tell(trial_id, result["best_value"])
        else:
            self._tell(trial_id, state=TrialState.PRUNED)

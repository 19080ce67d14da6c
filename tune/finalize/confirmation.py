"""Reruns: the best configurations run again with new seeds until it is clear which is best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from statistics import NormalDist
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from carmodels.evaluation.metrics import METRICS
from carmodels.records import Role, State, TrialRecord
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from carmodels.training.run import Run
from tune.budget.clock import LATE_SHARE, Clock
from tune.budget.costs import Costs, rerun_seconds
from tune.budget.stages import RERUNS
from tune.finalize.retraining import shortest_retraining_seconds
from tune.optim.standings import (
    CONTENDERS,
    TAIL,
    RunStatistics,
    independent_val_images,
    runs_by_config,
    standings_of,
    without_seed,
)
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Say
from tune.runtime.runner import run_trials

_ENDED = (State.COMPLETE, State.FAILED)  # the seed is used up


def next_rerun(
    records: Sequence[TrialRecord], *, metric: str, images: float, pending: Sequence[Run] = ()
) -> Run | None:
    """The run with the largest expected gain; None once the best is clearly better than every contender.

    A function of the records alone. `pending` runs count with their expected value.
    """
    stats = RunStatistics.of(runs_by_config(records), metric, images)
    if stats is None:
        return None
    posterior = stats.with_pending(pending).posterior
    order = np.argsort(-posterior.mean, kind="stable")[:CONTENDERS]
    chances = posterior.chances
    if all(chances[j] < TAIL for j in order if j != posterior.best):
        return None
    gains = knowledge_gradient(posterior.mean[order], posterior.sd[order], stats.noise)
    pick = int(np.argmax(gains > gains.max() * (1 - 1e-9)))  # the first of equals, despite rounding
    return _with_next_seed(stats.records[order[pick]].run, records, pending)


def knowledge_gradient(means: np.ndarray, sds: np.ndarray, noise: float) -> np.ndarray:
    """Expected gain, (J,), in the chosen configuration's mean from one more run of each configuration.

    The knowledge gradient of Gupta & Miescke (1996) and Frazier et al. (2008): large for an uncertain
    configuration close to the best one (for the best: to the second). In simulated fields of eight, spread as
    widely as the noise, six runs halve the regret of the choice (tests).
    """
    rivals = np.array([np.delete(means, j).max() for j in range(len(means))])
    moves = sds**2 / np.sqrt(sds**2 + noise**2)  # sd of the change in the posterior mean after one run
    normal = NormalDist()
    z = -np.abs(means - rivals) / moves
    return moves * np.array([x * normal.cdf(x) + normal.pdf(x) for x in z.tolist()])


def _with_next_seed(run: Run, records: Iterable[TrialRecord], pending: Iterable[Run]) -> Run:
    """The run with its first unused seed. Retraining counts seeds from the same start."""
    used = {r.trial_id for r in records if r.state in _ENDED} | {r.id for r in pending}
    candidates = (run.with_origin(seed=run.origin.seed + offset) for offset in count(1))
    return next(candidate for candidate in candidates if candidate.id not in used)


def confirmation_seconds(study: Study, workers: int, *, max_reruns: int, costs: Costs | None = None) -> float:
    """Upper bound on the seconds of all reruns, given today's best configurations; infinite without any."""
    best = [standing.record for standing in standings_of(study)[:CONTENDERS]]
    seconds = max((rerun_seconds(record, costs) for record in best), default=math.inf)
    rounds = math.ceil(max_reruns / workers) + 0.5  # half a round more: the search may end late
    return rounds * seconds if max_reruns else 0.0


class RerunSearcher(Searcher):
    """Ray Tune searcher. Suggests one rerun at a time, based on the study's records at that moment.

    Finishes when the best configuration is clear, after `max_reruns` reruns in the study, or when the next
    would not end by `end` (steady_time()).
    """

    def __init__(
        self, study: Study, *, max_reruns: int, end: float, roles: dict[str, Role], costs: Costs | None = None
    ) -> None:
        super().__init__(metric=study.metric, mode=METRICS[study.metric].mode)
        self._costs = costs
        self._study, self._max_reruns, self._end, self._roles = study, max_reruns, end, roles
        self._images = independent_val_images(study)
        self._suggested: list[Run] = []
        records = (r for r in study.records() if r.stage == "confirm")
        self._unfinished = [r.run for r in records if r.resumable]  # of an earlier command

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED
        run = self.next()
        if run is None:  # pending runs may still change which is best
            return None if self._pending() else Searcher.FINISHED
        first = self._search_records()[without_seed(run)]
        if steady_time() + rerun_seconds(first, self._costs) > self._end:
            return Searcher.FINISHED
        self._suggested.append(run)
        note = f"seed {run.origin.seed} of {first.trial_id}"
        self._roles[run.id] = Role(repeats=first.trial_id, note=note)
        return run.to_dict()

    def next(self) -> Run | None:
        """The next rerun; None if there is none to start now."""
        records, pending = self._study.records(), self._pending()
        ended = [r for r in records if r.stage == "confirm" and r.state in _ENDED]
        reruns = sum(not r.cut_short and not r.resumable for r in ended)
        if reruns + len(pending) >= self._max_reruns:
            return None
        if interrupted := [run for run in self._unfinished if run not in self._suggested]:
            return interrupted[0]  # as in the search: every started run ends
        return next_rerun(records, metric=self.metric, images=self._images, pending=pending)

    def _pending(self) -> list[Run]:
        ended = {r.trial_id for r in self._study.records() if r.state in _ENDED}
        return [run for run in self._suggested if run.id not in ended]

    def _search_records(self) -> Mapping[Run, TrialRecord]:
        return {run: runs[0] for run, runs in runs_by_config(self._study.records()).items()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Does nothing: `suggest` reads the records."""


def confirm(job: Job, *, clock: Clock, watch: ProgressCallback, say: Say, max_reruns: int = RERUNS) -> bool:
    """Rerun the best configurations until it is clear which is best; False if interrupted."""
    roles: dict[str, Role] = {}
    end, late = clock.at(clock.confirm), clock.late(clock.confirm, clock.retrain, LATE_SHARE)
    latest = clock.at(clock.retrain) - shortest_retraining_seconds(job)  # retraining must start by then
    if latest > steady_time():
        end, late = min(end, latest), min(late, latest)
    costs = job.costs if job.workers.packed else None
    reruns = RerunSearcher(job.study, max_reruns=max_reruns, end=end, roles=roles, costs=costs)
    if reruns.next() is None:
        return True
    say(f"Running the best few again with new seeds, at most {max_reruns} runs.")
    completed = run_trials(
        replace(job, workers=replace(job.workers, packed=0), until=late),
        stage="confirm",
        begun=clock.begun,
        end=late,
        search_alg=reruns,
        roles=roles,
        watch=watch,
    )
    job.study.write_table()
    return completed

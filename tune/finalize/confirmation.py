"""Running the best few configurations again with new seeds, until it is clear which is best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from statistics import NormalDist
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from carmodels.evaluation.metrics import METRICS
from carmodels.records import Role, State, TrialRecord
from carmodels.study import Study
from carmodels.training.run import Run
from tune.budget.clock import LATE_SHARE, Clock
from tune.budget.costs import Costs, expected_seconds
from tune.finalize.retraining import least_seconds
from tune.optim.standings import CONTENDERS, TAIL, Field, judged, runs_of, without_seed
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Say
from tune.runtime.runner import run_trials

RERUNS = 6  # most runs with new seeds in a study
_ENDED = (State.COMPLETE, State.FAILED)  # a seed that is used up


def next_rerun(
    records: Sequence[TrialRecord], *, metric: str, images: int, pending: Sequence[Run] = ()
) -> Run | None:
    """The run from which most is to be gained; None where the best is told apart from its contenders.

    It follows from the records alone. Runs that are `pending` count as if they had come to what is expected
    of them.
    """
    field = Field.of(runs_of(records), metric, images)
    if field is None:
        return None
    found = field.expecting(pending).posterior
    order = np.argsort(-found.mean, kind="stable")[:CONTENDERS]
    chances = found.chances
    if all(chances[j] < TAIL for j in order if j != found.best):
        return None
    gains = knowledge_gradient(found.mean[order], found.sd[order], field.noise)
    pick = int(np.argmax(gains > gains.max() * (1 - 1e-9)))  # the first of equals, whatever the rounding
    return _reseeded(field.first[order[pick]].run, records, pending)


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


def _reseeded(run: Run, records: Iterable[TrialRecord], pending: Iterable[Run]) -> Run:
    """The run with its next seed: retraining counts on from the same one."""
    used = {r.trial_id for r in records if r.state in _ENDED} | {r.id for r in pending}
    seeds = (run.with_origin(seed=run.origin.seed + more) for more in count(1))
    return next(candidate for candidate in seeds if candidate.id not in used)


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
        self, study: Study, *, most: int, end: float, roles: dict[str, Role], costs: Costs | None = None
    ) -> None:
        super().__init__(metric=study.metric, mode=METRICS[study.metric].mode)
        self._costs = costs
        self._study, self._most, self._end, self._roles = study, most, end, roles
        self._images = len(study.labels("val"))
        self._handed: list[Run] = []
        records = (r for r in study.records() if r.stage == "confirm")
        self._unfinished = [r.run for r in records if r.resumable]  # of an earlier command

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED
        run = self.next()
        if run is None:  # what is running may yet change who is best
            return None if self._pending() else Searcher.FINISHED
        first = self._first()[without_seed(run)]
        if time.time() + expected_seconds(first, self._costs) > self._end:
            return Searcher.FINISHED
        self._handed.append(run)
        note = f"seed {run.origin.seed} of {first.trial_id}"
        self._roles[run.id] = Role(repeats=first.trial_id, note=note)
        return run.to_dict()

    def next(self) -> Run | None:
        """The next rerun; None where there is none to make for the time being."""
        records, pending = self._study.records(), self._pending()
        ended = [r for r in records if r.stage == "confirm" and r.state in _ENDED]
        made = sum(not r.cut_short and not r.resumable for r in ended)
        if made + len(pending) >= self._most:
            return None
        if begun := [run for run in self._unfinished if run not in self._handed]:
            return begun[0]  # as in the search: no row stays without an end
        return next_rerun(records, metric=self.metric, images=self._images, pending=pending)

    def _pending(self) -> list[Run]:
        ended = {r.trial_id for r in self._study.records() if r.state in _ENDED}
        return [run for run in self._handed if run.id not in ended]

    def _first(self) -> Mapping[Run, TrialRecord]:
        return {run: runs[0] for run, runs in runs_of(self._study.records()).items()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to learn: the records tell."""


def confirm(job: Job, *, clock: Clock, watch: ProgressCallback, say: Say, most: int = RERUNS) -> bool:
    """Run the best few again with new seeds until it is clear who is best; False if interrupted."""
    roles: dict[str, Role] = {}
    end, late = clock.at(clock.confirm), clock.late(clock.confirm, clock.retrain, LATE_SHARE)
    latest = clock.at(clock.retrain) - least_seconds(job)  # for retraining to begin
    if latest > time.time():
        end, late = min(end, latest), min(late, latest)
    costs = job.costs if job.workers.packed else None
    reruns = Reruns(job.study, most=most, end=end, roles=roles, costs=costs)
    if reruns.next() is None:
        return True
    say(f"Running the best few again with new seeds, at most {most} runs.")
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

"""Were the scheduler's stops right? Some stopped trials, drawn at random, are finished after all."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from carmodels.evaluation.intervals import share_interval
from carmodels.evaluation.metrics import METRICS
from carmodels.files import write_json
from carmodels.records import Role, State, TrialRecord
from carmodels.study import Study
from tune.budget.clock import STOPS_SHARE, Clock
from tune.budget.costs import expected_seconds
from tune.optim.searcher import QueueSearcher
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Say
from tune.runtime.runner import run_trials

WRONG, DEBATABLE, RIGHT = "wrong", "debatable", "right"


@dataclass(frozen=True)
class Verdict:
    """A stopped trial, and what came of it once it was finished."""

    trial_id: str
    title: str
    epochs_run: int  # before it was stopped
    epochs: int  # of its schedule
    stopped_at: float  # its value then
    value: float  # its value at the end
    over_best: float  # by how much it is better than the best of the search; < 0: worse
    seconds_saved: float  # of the epochs that were not run
    verdict: str  # wrong: better than the best; debatable: above the median of the finished; or right


def at_rungs(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Trials of the search that the scheduler stopped at a rung, not the clock."""
    return [r for r in records if r.stage == "search" and r.state is State.PRUNED]


def drawn(stopped: Iterable[TrialRecord], most: int, seed: int) -> list[TrialRecord]:
    """At most so many at random, the same ones for the same seed; those of a smaller draw lead a larger one.

    In the order of a hash, so that a draw changes little when a resumed search adds trials.
    """

    def place(record: TrialRecord) -> str:
        return hashlib.sha256(f"{seed} {record.trial_id}".encode()).hexdigest()

    return sorted(stopped, key=place)[:most]


def judge(
    stopped: TrialRecord, finished: TrialRecord, board: Sequence[TrialRecord], metric: str
) -> Verdict | None:
    """What a stop came to, beside the finished trials of the search; None where a value is missing."""
    values = [r.value for r in board if r.value is not None]
    if stopped.value is None or finished.value is None or not values:
        return None
    gain = METRICS[metric].gain
    best = max(values) if METRICS[metric].mode == "max" else min(values)
    over_best, over_median = gain(finished.value, best), gain(finished.value, median(values))
    return Verdict(
        trial_id=stopped.trial_id,
        title=stopped.config.title,
        epochs_run=stopped.epochs_run,
        epochs=stopped.config.epochs,
        stopped_at=stopped.value,
        value=finished.value,
        over_best=over_best,
        seconds_saved=sum(e.seconds for e in finished.curve[stopped.epochs_run :]),
        verdict=WRONG if over_best > 0 else DEBATABLE if over_median > 0 else RIGHT,
    )


def judged_stops(
    chosen: Sequence[TrialRecord],
    finished: Mapping[str, TrialRecord],
    board: Sequence[TrialRecord],
    *,
    metric: str,
    stopped: int,
) -> dict[str, Any]:
    """stops.json: the verdict on each of the chosen that was finished, and their sums."""
    found = [judge(r, finished[r.trial_id], board, metric) for r in chosen if r.trial_id in finished]
    verdicts = [v for v in found if v is not None]
    wrong = sum(v.verdict == WRONG for v in verdicts)
    return {
        "metric": metric,
        "stopped": stopped,
        "drawn": len(chosen),
        "finished": len(verdicts),
        "wrong": wrong,
        "debatable": sum(v.verdict == DEBATABLE for v in verdicts),
        "wrong_share": asdict(share_interval(wrong, len(verdicts))) if verdicts else None,
        "seconds_saved": sum(v.seconds_saved for v in verdicts),
        "trials": [asdict(v) for v in verdicts],
    }


def sentence(results: Mapping[str, Any]) -> str:
    """What the check of stops says, in words."""
    if not results["stopped"]:
        return "No trial was stopped at a rung: there is no stop to check."
    text = f"Of {results['stopped']} trials stopped at a rung {results['drawn']} were drawn at random and "
    if not results["finished"]:
        return f"{text}none was finished: there was no time for it."
    share = results["wrong_share"]
    return (
        f"{text}{results['finished']} of them finished: {results['wrong']} better than the best of the "
        f"search (wrong stops; 95 % interval {100 * share['low']:.0f} to {100 * share['high']:.0f} %), "
        f"{results['debatable']} more above the median of the finished ones (debatable). "
        f"Stopping them saved {results['seconds_saved']:.0f} s of training."
    )


def check_stops(
    job: Job, *, count: int, seed: int, clock: Clock, watching: Callable[[Study], ProgressCallback], say: Say
) -> bool:
    """Finish `count` of the stopped trials after all and write what came of it; False if interrupted.

    They are a study of their own: nothing they come to is known to the other stages.
    """
    study, inner = job.study, job.study.begin_stop_check()
    stopped = at_rungs(study.records())
    chosen = drawn(stopped, count, seed)
    done = {r.trial_id for r in inner.records() if r.state is State.COMPLETE}
    todo = {r.trial_id: r for r in chosen if r.trial_id not in done}
    end, costs = clock.at(clock.search + STOPS_SHARE), job.costs if job.workers.packed else None
    say(f"Check of stops: {len(chosen)} of {len(stopped)} trials stopped at a rung are finished after all.")
    completed = not todo or run_trials(
        replace(job, study=inner, workers=replace(job.workers, packed=0)),
        stage="stop_check",
        begun=clock.begun,
        end=end,
        search_alg=QueueSearcher(
            [r.run for r in todo.values()],
            metric=study.metric,
            mode=METRICS[study.metric].mode,
            fits=lambda run: time.time() + expected_seconds(todo[run.id], costs) <= end,
        ),
        roles={r.trial_id: Role(note=f"pruned after epoch {r.epochs_run}") for r in chosen},
        watch=watching(inner),
    )
    for record in chosen:
        inner.weights_file(record.trial_id).unlink(missing_ok=True)  # nobody uses them
    finished = {r.trial_id: r for r in inner.leaderboard()}
    board = [r for r in study.leaderboard() if r.stage == "search"]
    results = judged_stops(chosen, finished, board, metric=study.metric, stopped=len(stopped))
    write_json(study.stops_file, results)
    return completed

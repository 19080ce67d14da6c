"""Checks the scheduler's pruning: trains a random sample of pruned trials to the end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from carmodels.evaluation.intervals import proportion_interval
from carmodels.evaluation.metrics import METRICS
from carmodels.files import write_json
from carmodels.records import Role, State, TrialRecord
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from tune.budget.clock import STOPS_SHARE, Clock
from tune.budget.costs import rerun_seconds
from tune.optim.searcher import QueueSearcher
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Say
from tune.runtime.runner import run_trials

WRONG, DEBATABLE, RIGHT = "wrong", "debatable", "right"


@dataclass(frozen=True)
class StopVerdict:
    """A pruned trial compared with its full training."""

    trial_id: str
    title: str
    epochs_run: int  # before it was pruned
    epochs: int  # of its schedule
    stopped_at: float  # its value when pruned
    value: float  # its value after the full schedule
    over_best: float  # gain over the best of the search; < 0: worse
    seconds_saved: float  # by not running the remaining epochs
    verdict: str  # wrong: better than the best; debatable: above the median of complete trials; else right


def pruned_in_search(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Trials of the search that the scheduler pruned at a rung."""
    return [r for r in records if r.stage == "search" and r.state is State.PRUNED]


def sample(stopped: Iterable[TrialRecord], most: int, seed: int) -> list[TrialRecord]:
    """Up to `most` random trials; a smaller sample is a prefix of a larger one with the same seed.

    Sorted by a hash, so a sample changes little when a resumed search adds trials.
    """

    def position(record: TrialRecord) -> str:
        return hashlib.sha256(f"{seed} {record.trial_id}".encode()).hexdigest()

    return sorted(stopped, key=position)[:most]


def judge_stop(
    stopped: TrialRecord, finished: TrialRecord, board: Sequence[TrialRecord], metric: str
) -> StopVerdict | None:
    """The verdict on one pruned trial, against the search's leaderboard; None if a value is missing."""
    values = [r.value for r in board if r.value is not None]
    if stopped.value is None or finished.value is None or not values:
        return None
    gain = METRICS[metric].gain
    best = max(values) if METRICS[metric].mode == "max" else min(values)
    over_best, over_median = gain(finished.value, best), gain(finished.value, median(values))
    return StopVerdict(
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


def stops_summary(
    chosen: Sequence[TrialRecord],
    finished: Mapping[str, TrialRecord],
    board: Sequence[TrialRecord],
    *,
    metric: str,
    stopped: int,
) -> dict[str, Any]:
    """Contents of stops.json: the verdict on each chosen trial that is now complete, and totals."""
    judged = [judge_stop(r, finished[r.trial_id], board, metric) for r in chosen if r.trial_id in finished]
    verdicts = [v for v in judged if v is not None]
    wrong = sum(v.verdict == WRONG for v in verdicts)
    return {
        "metric": metric,
        "stopped": stopped,
        "drawn": len(chosen),
        "finished": len(verdicts),
        "wrong": wrong,
        "debatable": sum(v.verdict == DEBATABLE for v in verdicts),
        "wrong_share": asdict(proportion_interval(wrong, len(verdicts))) if verdicts else None,
        "seconds_saved": sum(v.seconds_saved for v in verdicts),
        "trials": [asdict(v) for v in verdicts],
    }


def check_stops(
    job: Job, *, count: int, seed: int, clock: Clock, watching: Callable[[Study], ProgressCallback], say: Say
) -> bool:
    """Train `count` pruned trials to the end and write stops.json; False if interrupted.

    They are in a separate study, so their results do not influence the other stages.
    """
    study, inner = job.study, job.study.begin_stop_check()
    stopped = pruned_in_search(study.records())
    chosen = sample(stopped, count, seed)
    done = {r.trial_id for r in inner.records() if r.state is State.COMPLETE}
    remaining = {r.trial_id: r for r in chosen if r.trial_id not in done}
    end, costs = clock.at(clock.search + STOPS_SHARE), job.costs if job.workers.packed else None
    say(f"Check of stops: {len(chosen)} of {len(stopped)} trials stopped at a rung are finished after all.")
    completed = not remaining or run_trials(
        replace(job, study=inner, workers=replace(job.workers, packed=0)),
        stage="stop_check",
        begun=clock.begun,
        end=end,
        search_alg=QueueSearcher(
            [r.run for r in remaining.values()],
            metric=study.metric,
            mode=METRICS[study.metric].mode,
            fits=lambda run: steady_time() + rerun_seconds(remaining[run.id], costs) <= end,
        ),
        roles={r.trial_id: Role(note=f"pruned after epoch {r.epochs_run}") for r in chosen},
        watch=watching(inner),
    )
    for record in chosen:
        inner.weights_file(record.trial_id).unlink(missing_ok=True)  # not used again
    finished = {r.trial_id: r for r in inner.leaderboard()}
    board = [r for r in study.leaderboard() if r.stage == "search"]
    results = stops_summary(chosen, finished, board, metric=study.metric, stopped=len(stopped))
    write_json(study.stops_file, results)
    return completed

"""Pruned trials are drawn at random, finished apart from the rest, and judged by what came of them."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from carmodels.data.dataset import Splits
from carmodels.files import read_json
from carmodels.formatting import stops_sentence
from carmodels.models.weights import Weights
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run
from carmodels.training.trainer import fit
from tune.budget.clock import Clock
from tune.finalize.stop_check import check_stops, judge_stop, pruned_in_search, sample, stops_summary
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Workers

RUNG = "rung at epoch 2: 0.5000 against a cut-off of 0.6000, rank 3 of 4"


def record(number: int, value: float, state: State = State.PRUNED, reason: str = RUNG) -> TrialRecord:
    run = Run(TrialConfig("test_resnet", image_size=32, epochs=8, lr=number / 1000), Origin(seed=number))
    epochs = 8 if state is State.COMPLETE else 2
    return TrialRecord(run.id, run.config, state, epochs, value, 3.0 * epochs, reason, origin=run.origin)


PRUNED = [record(n, 0.5) for n in range(1, 13)]
VALUES = (0.9, 0.89, 0.8, 0.79, 0.7)  # their mean is 0.816
BOARD = [record(n, value, State.COMPLETE) for n, value in enumerate(VALUES, start=21)]


def complete(value: float, number: int = 1) -> TrialRecord:
    curve = tuple(EpochMetrics(n, 1.0, 1.0, value, value, float(n)) for n in range(1, 9))  # n seconds
    return replace(record(number, value, State.COMPLETE, "ran its 8 epochs"), stage="stop_check", curve=curve)


def test_only_what_the_scheduler_pruned_in_the_search_is_drawn_from() -> None:
    others = [
        record(31, 0.5, State.OUT_OF_TIME, "the time for searching was up after epoch 2 of 8"),
        record(32, 0.5, State.OUT_OF_TIME, "the time was up"),
        record(33, 0.5, State.INTERRUPTED),
        replace(record(34, 0.5), stage="retrain"),
        *BOARD,
    ]
    assert pruned_in_search([*PRUNED, *others]) == PRUNED


def test_a_draw_is_random_by_its_seed_and_leads_a_larger_one() -> None:
    assert sample(PRUNED, 4, 0) == sample(list(reversed(PRUNED)), 4, 0)
    assert sample(PRUNED, 6, 0)[:4] == sample(PRUNED, 4, 0)
    assert sample(PRUNED, 4, 0) != sample(PRUNED, 4, 1)
    assert len(sample(PRUNED, 50, 0)) == len(PRUNED)
    counts = Counter(r.trial_id for seed in range(600) for r in sample(PRUNED, 4, seed))
    assert all(150 < counts[r.trial_id] < 250 for r in PRUNED)  # 200 expected, standard deviation 12


@pytest.mark.parametrize(
    ("value", "over_best", "verdict"),
    [(0.91, 0.01, "wrong"), (0.9, 0.0, "debatable"), (0.81, -0.09, "debatable"), (0.8, -0.1, "right")],
)
def test_a_stop_is_wrong_where_the_trial_would_have_been_the_best(
    value: float, over_best: float, verdict: str
) -> None:
    found = judge_stop(PRUNED[0], complete(value), BOARD, "accuracy")
    assert found is not None
    assert (found.verdict, found.over_best) == (verdict, pytest.approx(over_best))
    assert found.seconds_saved == 3 + 4 + 5 + 6 + 7 + 8
    assert (found.epochs_run, found.epochs, found.stopped_at, found.value) == (2, 8, 0.5, value)


@pytest.mark.parametrize(("value", "verdict"), [(0.69, "wrong"), (0.75, "debatable"), (0.81, "right")])
def test_where_less_is_better_the_verdicts_turn_round(value: float, verdict: str) -> None:
    found = judge_stop(PRUNED[0], complete(value), BOARD, "log_loss")
    assert found is not None
    assert found.verdict == verdict
    assert found.over_best == pytest.approx(0.7 - value)


def test_a_check_counts_its_verdicts_and_says_how_sure_they_are() -> None:
    chosen = PRUNED[:4]
    done = {f.trial_id: f for f in (complete(0.95, 1), complete(0.85, 2), complete(0.6, 3))}
    results = stops_summary(chosen, done, BOARD, metric="accuracy", stopped=12)
    assert [row["verdict"] for row in results["trials"]] == ["wrong", "debatable", "right"]
    assert (results["drawn"], results["finished"], results["seconds_saved"]) == (4, 3, 99.0)
    assert results["wrong_share"]["value"] == pytest.approx(1 / 3)
    assert stops_sentence(results) == (
        "Of 12 trials stopped at a rung 4 were drawn at random and 3 of them finished: 1 better than the "
        "best of the search (wrong stops; 95 % interval 6 to 79 %), 1 more above the median of the "
        "finished ones (debatable). Stopping them saved 99 s of training."
    )


def test_a_check_without_stops_or_time_says_so() -> None:
    none = stops_summary([], {}, BOARD, metric="accuracy", stopped=0)
    assert "there is no stop to check" in stops_sentence(none)
    late = stops_summary(PRUNED[:2], {}, BOARD, metric="accuracy", stopped=12)
    assert stops_sentence(late).endswith("none was finished: there was no time for it.")


def test_the_study_of_stops_has_its_own_trials_and_the_same_data(tmp_path: Path) -> None:
    study = Study(tmp_path / "results" / "cars")
    data = tmp_path / "images"
    facts = {"metric": "accuracy", "data": study.relative(data), "weights": "hub"}
    study.begin(facts, [("val", "a.jpg", 1), ("test", "b.jpg", -1)])
    study.append(PRUNED[0])
    inner = study.begin_stop_check()
    inner.append(complete(0.95))
    assert [r.state for r in study.records()] == [State.PRUNED]
    assert study.leaderboard() == []
    assert inner.resolved(inner.metadata["data"]) == data
    assert inner.metadata["weights"] == "hub"
    assert inner.labels("val") == {"a.jpg": 1}
    assert study.begin_stop_check().records() == inner.records()


def checked(job: Job, seconds: float) -> tuple[list[str], list[Study]]:
    """What a check says and which studies it watches, with two pruned trials and so many seconds of a job."""
    said: list[str] = []
    watched: list[Study] = []

    def watching(study: Study) -> ProgressCallback:
        watched.append(study)
        return ProgressCallback()

    clock = Clock(time.time(), seconds)
    assert check_stops(job, count=2, seed=0, clock=clock, watching=watching, say=said.append)
    return said, watched


@pytest.fixture
def job(splits: Splits, weights: Weights, tmp_path: Path) -> Job:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy", "data": "x", "weights": "none"}, [])
    for number in (1, 2):
        study.append(record(number, 0.5))
    study.append(BOARD[0])
    return Job(study, splits, weights, Workers(1, 1, 0.0), tmp_path / "cache")


@pytest.mark.usefixtures("own_ray")
def test_pruned_trials_are_finished_with_their_own_seed_and_nobody_else_hears_of_it(job: Job) -> None:
    study = job.study
    first, second = sample(pruned_in_search(study.records()), 2, 0)
    study.begin_stop_check().append(
        replace(first, state=State.COMPLETE, epochs_run=8, value=0.95, stage="stop_check")
    )
    before = study.trials_file.read_bytes()
    said, watched = checked(job, math.inf)
    assert said[0].endswith("2 of 2 trials stopped at a rung are finished after all.")
    assert [inner.folder for inner in watched] == [study.stop_check.folder]
    assert study.trials_file.read_bytes() == before
    assert not list((study.folder / "predictions").iterdir())
    done, now = study.stop_check.records()
    assert (done.trial_id, done.value) == (first.trial_id, 0.95)  # of a check that was interrupted
    assert (now.trial_id, now.state, now.stage, now.epochs_run) == (
        second.trial_id,
        State.COMPLETE,
        "stop_check",
        8,
    )
    alone = fit(second.run, job.splits, weights=job.weights)
    assert [e.value for e in now.curve] == [e.value for e in alone.history]
    assert not list((study.stop_check.folder / "weights").iterdir())
    results = read_json(study.stops_file)
    assert [row["trial_id"] for row in results["trials"]] == [first.trial_id, second.trial_id]
    assert (results["stopped"], results["wrong"]) == (2, 1)


@pytest.mark.usefixtures("own_ray")
def test_a_check_does_not_begin_what_it_has_no_time_for(job: Job) -> None:
    checked(job, 30.0)  # 0.72 of them are the search's and its own; 8 epochs take 28 s, by the first two
    assert job.study.stop_check.records() == []
    assert read_json(job.study.stops_file)["finished"] == 0

"""Draws are valid, never the same twice and within the limit; Optuna hears how each trial ended."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from carmodels.presets import SPACES, baseline
from carmodels.records import Cause, State, TrialRecord
from carmodels.space import Choice, Space
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run
from tune.optim.optuna_file import OptunaFile
from tune.optim.optuna_records import CAUSE, transferable_trials
from tune.optim.searcher import OptunaSearcher, QueueSearcher

ORIGIN = Origin(seed=3, metric="accuracy", data="d", split="s")
SPACE = SPACES["demo"]


def made(space: Space = SPACE, **changes: Any) -> OptunaSearcher:
    options: dict[str, Any] = {
        "origin": ORIGIN,
        "metric": "accuracy",
        "mode": "max",
        "seed": 0,
        "limit": None,
        "fits": lambda config: True,
    }
    return OptunaSearcher(space, **{**options, **changes})


def result(value: float, epoch: int, **more: Any) -> dict[str, Any]:
    return {"accuracy": value, "epoch": epoch, "training_iteration": epoch, **more}


def handed(draws: OptunaSearcher | QueueSearcher, trial_id: str) -> Run:
    """What it gives for a trial, which is a run."""
    values = draws.suggest(trial_id)
    assert isinstance(values, dict)
    return Run.from_dict(values)


def of(run: Run, state: State, epochs: int, value: float | None, **more: Any) -> TrialRecord:
    """The record of a run."""
    return TrialRecord(run.id, run.config, state, epochs, value, 3.0, "", origin=run.origin, **more)


def record(run: Run, state: State, value: float | None, **more: Any) -> TrialRecord:
    curve = tuple(EpochMetrics(e, 1.0, 1.0, e / 10, e / 10, 1.0) for e in (1, 2, 3))
    return of(run, state, 3, value, curve=curve, **more)


def states(draws: OptunaSearcher) -> list[TrialState]:
    return [t.state for t in draws._ot_study.trials]


def test_draws_are_runs_of_one_origin_and_never_the_same_twice() -> None:
    draws = made()
    runs = [handed(draws, str(i)) for i in range(12)]
    assert len({run.id for run in runs}) == 12
    assert {run.origin for run in runs} == {ORIGIN}


def test_a_space_that_is_used_up_ends_the_search() -> None:
    tiny = Space({"backbone": Choice(("lcnet_035",)), "image_size": Choice((32, 48))}, {"epochs": 2})
    draws = made(tiny)
    assert {handed(draws, str(i)).config.image_size for i in range(2)} == {32, 48}
    assert draws.suggest("2") == Searcher.FINISHED


def test_queued_runs_go_first_and_count_towards_the_limit() -> None:
    first = Run(baseline(SPACE), ORIGIN)
    draws = made(limit=3, queue=[first])
    given = [draws.suggest(str(i)) for i in range(4)]
    assert given[0] == first.to_dict()
    assert given[3] == Searcher.FINISHED
    draws.on_trial_result("0", result(0.5, 1))  # not one of Optuna's: nothing to tell it
    draws.on_trial_complete("0", result(0.5, 1))
    assert len(states(draws)) == 2


def test_what_is_optional_in_the_queue_goes_where_it_fits() -> None:
    reference, small, large = (Run(replace(baseline(SPACE), image_size=s), ORIGIN) for s in (96, 48, 64))
    draws = made(
        limit=4,
        queue=[reference, large, small],
        optional={large.id, small.id},
        fits=lambda c: c.image_size < 64,
    )
    assert [handed(draws, str(i)) for i in range(2)] == [reference, small]
    assert handed(draws, "2").config.image_size < 64  # drawn
    assert draws.suggest("3") == Searcher.FINISHED  # what was passed over is a row of the table, too


def test_what_cannot_end_in_time_is_not_drawn_and_the_search_ends_where_nothing_can() -> None:
    draws = made(fits=lambda config: config.image_size <= 48)
    assert {handed(draws, str(i)).config.image_size for i in range(8)} <= {32, 48}
    assert made(fits=lambda config: False).suggest("0") == Searcher.FINISHED


def test_optuna_is_told_how_each_trial_ended() -> None:
    draws = made()
    for i in range(4):
        draws.suggest(str(i))
        draws.on_trial_result(str(i), result(0.1, 1))
    draws.on_trial_complete("0", result(0.6, 8, state="complete", cause=None, best_value=0.7))
    draws.on_trial_result("1", result(0.2, 2))  # Ray repeats the last one
    draws.on_trial_complete("1", result(0.2, 2))
    draws.on_trial_complete("2", None, error=True)
    draws.on_trial_complete("3", result(0.0, 2, state="failed", cause="diverged", best_value=0.0))
    trials = draws._ot_study.trials
    assert states(draws) == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE]
    assert [t.value for t in trials] == [0.7, 0.2, None, 0.0]
    assert trials[1].intermediate_values == {1: 0.1, 2: 0.2}


def test_a_restart_leaves_optuna_with_the_recorded_trials_and_none_running(tmp_path: Path) -> None:
    before = made()
    runs = [handed(before, str(i)) for i in range(5)]
    known = [
        record(runs[0], State.COMPLETE, 0.3),
        record(runs[1], State.PRUNED, None),
        record(runs[2], State.FAILED, None, cause=Cause.ERROR),
        record(runs[3], State.FAILED, None, cause=Cause.DIVERGED),
    ]
    file = tmp_path / "optuna.db"
    draws = made(known=known, limit=7, copy=OptunaFile(file, pytest.fail))
    assert states(draws) == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE]
    assert [t.params["lr"] for t in draws._ot_study.trials] == [run.config.lr for run in runs[:4]]
    new: list[Run] = []
    while (drawn := draws.suggest(str(len(new)))) != Searcher.FINISHED:
        assert isinstance(drawn, dict)
        new.append(Run.from_dict(drawn))
    assert len(new) == 3
    assert not {run.id for run in new} & {run.id for run in runs[:4]}
    draws.on_trial_complete("1", result(0.5, 1))
    kept = stored(file)
    assert [t.state for t in kept] == [*states(draws)[:4], TrialState.PRUNED]
    assert kept[4].intermediate_values == {1: 0.5}
    assert kept[4].params["lr"] == new[1].config.lr


def stored(file: Path) -> list[FrozenTrial]:
    """The trials of the file's one study."""
    return optuna.load_study(study_name=None, storage=f"sqlite:///{file}").trials


def test_a_locked_copy_is_told_of_once_and_loses_neither_trial_nor_draw(tmp_path: Path) -> None:
    file, said = tmp_path / "optuna.db", list[str]()
    draws, plain = made(copy=(copy := OptunaFile(file, said.append))), made()
    for number in range(3):
        assert handed(draws, str(number)) == handed(plain, str(number))
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for number in range(3):
            for each in (draws, plain):
                each.on_trial_complete(str(number), result(0.5, 1))
        other.execute("ROLLBACK")
    assert said == [f"{file}: database is locked. It is a copy: the search goes on without it."]
    assert handed(draws, "3") == handed(plain, "3")
    copy.end()
    assert [t.state for t in stored(file)] == [TrialState.PRUNED] * 3


def test_a_copy_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    draws = made(copy=OptunaFile(tmp_path / "nowhere" / "optuna.db", said.append))
    handed(draws, "0")
    draws.on_trial_complete("0", result(0.5, 1))
    assert len(said) == 1


def test_a_copy_lies_where_the_study_does_whatever_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "a%20b?c#d"
    folder.mkdir()
    made(copy=OptunaFile(folder / "optuna.db", pytest.fail))
    assert [file.name for file in folder.iterdir()] == ["optuna.db"]


def test_the_cause_of_a_failure_is_known_to_optuna_in_the_run_and_after_it() -> None:
    causes = {"0": Cause.OUT_OF_MEMORY, "1": Cause.MACHINE, "2": Cause.ERROR}
    draws = made(causes=causes)
    runs = [handed(draws, name) for name in causes]
    for name in causes:
        draws.on_trial_complete(name, None, error=True)
    assert [t.user_attrs for t in draws._ot_study.trials] == [{CAUSE: str(c)} for c in causes.values()]
    known = [
        record(run, State.FAILED, None, cause=cause) for run, cause in zip(runs, causes.values(), strict=True)
    ]
    resumed = made(known=known)._ot_study.trials  # a machine's failure runs again
    assert [t.user_attrs for t in resumed] == [{CAUSE: "out_of_memory"}, {CAUSE: "error"}]


def test_a_queued_run_of_the_space_is_a_trial_of_optunas() -> None:
    run = handed(made(), "0")
    draws = made(queue=[run])
    assert handed(draws, "0") == run
    draws.on_trial_complete("0", result(0.4, 1))
    (trial,) = draws._ot_study.trials
    assert (trial.state, trial.params["lr"]) == (TrialState.PRUNED, run.config.lr)
    assert trial.intermediate_values == {1: 0.4}


def ended(number: int, run: Run) -> TrialRecord:
    """How trial `number` ends: some are pruned, diverge or fail, the others complete; by rate and size."""
    cause = {5: Cause.DIVERGED, 6: Cause.OUT_OF_MEMORY}.get(number % 8)
    state = State.FAILED if cause else State.PRUNED if number % 8 == 3 else State.COMPLETE
    level = run.config.image_size / 200 + run.config.lr
    values = [level * e / 8 for e in range(1, 4 if state is not State.COMPLETE else 9)]
    if cause is Cause.DIVERGED:
        values[-1] = 0.0
    curve = tuple(EpochMetrics(e, 1.0, 1.0, v, v, 1.0) for e, v in enumerate(values, 1))
    value = max(values) if state is State.COMPLETE else None
    return of(run, state, len(curve), value, cause=cause, curve=curve)


def end(draws: OptunaSearcher, trial_id: str, record: TrialRecord) -> None:
    """Tell a searcher what Ray would."""
    *before, last = record.curve
    for epoch in before:
        draws.on_trial_result(trial_id, result(epoch.value, epoch.epoch))
    final = result(last.value, last.epoch)
    if record.state is State.COMPLETE or record.diverged:
        best = record.value or last.value
        final |= {"state": str(record.state), "cause": record.cause, "best_value": best}
    failed = record.cause is Cause.OUT_OF_MEMORY
    draws.on_trial_complete(trial_id, None if failed else final, error=failed)


def test_trials_of_another_study_tell_where_to_begin() -> None:
    """There 32 px and a low rate were best, against what is expected, and half the epochs were enough."""
    other = TrialConfig("test_resnet", image_size=32, epochs=4, unfreeze="full", lr=3e-4, lr_ratio=0.3)
    elsewhere = Origin(seed=9, data="other", split="other")

    def at(size: int, lr: float) -> TrialRecord:
        run = Run(replace(other, image_size=size, lr=lr), elsewhere)
        value = 1 - size / 200 - 20 * lr
        curve = tuple(EpochMetrics(e, 1.0, 1.0, value, value * e / 4, 1.0) for e in range(1, 5))
        return of(run, State.COMPLETE, 4, value, curve=curve)

    records = [at(size, lr) for size in (32, 48, 64, 96) for lr in (3e-4, 1e-3, 3e-3, 1e-2)]
    draws = made(earlier=[records])
    first = [handed(draws, str(i)) for i in range(3)]
    assert {run.config.image_size for run in first} <= {32, 48}
    assert not states(draws)[3:]
    assert transferable_trials([replace(records[0], config=baseline(SPACE))], SPACE) == []
    (trial,) = transferable_trials(records[:1], SPACE)
    assert list(trial.intermediate_values) == [2, 4, 6, 8]


@pytest.mark.parametrize("after", [1, 4, 9])
def test_an_interrupted_search_draws_what_it_would_have_drawn(after: int) -> None:
    """Two trials run at a time; those that run when it is interrupted are run again from their start."""
    whole, known = made(causes={"6": Cause.OUT_OF_MEMORY}), []
    running = {i: handed(whole, str(i)) for i in range(2)}
    for number in range(after):
        done = number if number % 2 else max(running)  # they do not end in the order they began in
        done = done if done in running else min(running)
        known.append(ended(done, running.pop(done)))
        end(whole, str(done), known[-1])
        running[number + 2] = handed(whole, str(number + 2))
    resumed = made(known=known, queue=list(running.values()))
    again = [handed(resumed, f"r{i}") for i in range(4)]
    assert again[:2] == list(running.values())
    assert again[2:] == [handed(whole, str(after + 2 + i)) for i in range(2)]


def test_equal_records_give_equal_draws() -> None:
    run = handed(made(), "0")
    known = [record(run, State.COMPLETE, 0.3)]
    one, other = (handed(made(known=known), "x") for _ in range(2))
    assert one == other != run


def test_a_baseline_from_outside_the_space_is_not_taught_to_the_sampler() -> None:
    reference = Run(baseline(SPACE), ORIGIN)
    assert not states(made(known=[record(reference, State.COMPLETE, 0.9, baseline=True)]))


@pytest.mark.parametrize("count", [0, 2])
def test_a_queue_hands_out_what_it_holds_and_ends(count: int) -> None:
    config = TrialConfig(backbone="lcnet_035", image_size=32, epochs=2)
    runs = [Run(config, Origin(seed=i)) for i in range(count)]
    queue = QueueSearcher(runs, metric="accuracy", mode="max")
    assert [handed(queue, str(i)) for i in range(count)] == runs
    assert queue.suggest("x") == Searcher.FINISHED


def test_the_queue_ends_at_what_no_longer_fits_into_the_time() -> None:
    runs = [Run(baseline(SPACE), Origin(seed=seed)) for seed in range(3)]
    queue = QueueSearcher(runs, metric="accuracy", mode="max", fits=lambda run: run.origin.seed != 1)
    assert queue.suggest("a") == runs[0].to_dict()
    assert queue.suggest("b") == Searcher.FINISHED

"""What retraining takes for the best, and which runs of it there are already."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from carmodels.evaluation.predictions import Predictions
from carmodels.files import read_json, write_atomic, write_json
from carmodels.records import FOLD, FOLD_IN, Cause, State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.run import Origin, Run
from tune.budget.clock import Clock
from tune.budget.costs import RERUN_MARGIN, Costs, rerun_seconds
from tune.budget.plan import Plan
from tune.finalize import confirmation, repeats, retraining, schedules
from tune.finalize.repeats import (
    _announcement,
    _plan_repeats,
    _runner_up_runs,
    chosen_trial,
    retrain_new_seeds,
)
from tune.finalize.retraining import _missing_folds, _plan_folds, retrain_folds, retrain_on_all_labelled
from tune.finalize.schedules import RETRAIN_EPOCHS_RATIO, RetrainOptions, TimeBudget
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Workers
from tune.runtime.search_stage import _to_run_again, _with_time_for_what_follows


def run(lr: float, value: float, seed: int = 0, stage: str = "search", epochs: int = 8) -> TrialRecord:
    """A complete run at 10 s an epoch."""
    config = TrialConfig("test_resnet", image_size=32, epochs=epochs, lr=lr)
    one, seconds = Run(config, Origin(seed=seed)), 10.0 * epochs
    record = TrialRecord(one.id, config, State.COMPLETE, epochs, value, seconds, "ran", stage=stage)
    return replace(record, origin=one.origin)


def of(run: Run, like: TrialRecord, **more: Any) -> TrialRecord:
    """The record of a run that went as another one did."""
    return replace(like, trial_id=run.id, config=run.config, origin=run.origin, **more)


LUCKY, STEADY = run(1e-3, 0.93), run(2e-3, 0.92)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has run has left its weights."""
    for module in (repeats, retraining):
        monkeypatch.setattr(module, "weights_lost", lambda study, record: False)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [("val", f"{n}.jpg", 0) for n in range(250)])
    for record in (LUCKY, STEADY, run(3e-3, 0.88)):
        study.append(record)
    return study


@pytest.mark.parametrize(
    ("end", "baseline", "seconds", "again"),
    [
        ((State.OUT_OF_TIME, None), False, 90, True),
        ((State.OUT_OF_TIME, None), False, 70, False),
        ((State.PRUNED, None), False, 90, False),
        ((State.OUT_OF_TIME, None), True, 70, True),
        ((State.INTERRUPTED, None), False, 70, True),
        ((State.RUNNING, None), False, 70, True),
        ((State.FAILED, Cause.OUT_OF_MEMORY), False, 90, False),
        ((State.FAILED, Cause.MACHINE), False, 70, True),
        ((State.COMPLETE, None), False, 90, False),
    ],
)
def test_a_resumed_search_runs_again_what_was_cut_off_and_what_there_is_time_for_now(
    end: tuple[State, Cause | None], baseline: bool, seconds: float, again: bool
) -> None:
    costs = Costs({"test_resnet": {32: 0.01}}, train=1000, val=0)  # 80 s
    plan = Plan(costs, time.time() + seconds, 1)
    state, cause = end
    assert _to_run_again(replace(LUCKY, state=state, cause=cause, baseline=baseline), plan) == again


def test_a_longer_search_draws_nothing_that_later_stages_have_no_time_for(study: Study) -> None:
    costs = Costs({"test_resnet": {32: 0.01}}, train=1000, val=0)  # 80 s, as the best ones
    clock, plan = Clock(0.0, 1000, search=0.3, confirm=0.5, retrain=0.9), Plan(costs, math.inf, 1)
    assert _with_time_for_what_follows(plan, study, clock).max_trial_seconds == pytest.approx(300)
    shorter = replace(plan, max_trial_seconds=200)
    assert _with_time_for_what_follows(shorter, study, clock).max_trial_seconds == 200
    little = replace(clock, search=0.8)
    assert _with_time_for_what_follows(plan, study, little).max_trial_seconds == pytest.approx(80)
    unbounded = Plan(None, math.inf, 1)
    assert _with_time_for_what_follows(unbounded, study, clock) is unbounded


def test_what_retraining_takes_at_most_goes_by_the_dearest_of_the_best(study: Study) -> None:
    splits = SimpleNamespace(train=range(700), val=range(150), holdout=range(150))
    job = Job(study, splits, None, Workers(2, 1, 0.0), study.folder)  # type: ignore[arg-type]
    slow = replace(run(4e-3, 0.90), seconds=160.0)
    study.append(slow)
    each = RETRAIN_EPOCHS_RATIO * rerun_seconds(slow)
    assert retraining.retraining_seconds(job) == pytest.approx(
        3 * each
    )  # three seeds, three others, two workers
    assert retraining.retraining_seconds(job, folds=4) == pytest.approx(6 * 850 / 700 * each)
    half = rerun_seconds(run(4e-3, 0.85)) / 2  # of the cheapest
    assert retraining.retraining_seconds(job, within=1.01 * half) == pytest.approx(3 * each)
    assert retraining.retraining_seconds(job, within=0.99 * half) == 0
    empty = Study(study.folder / "empty")
    empty.begin({"metric": "accuracy"}, [])
    assert math.isinf(retraining.retraining_seconds(replace(job, study=empty)))


def test_reruns_leave_retraining_the_time_for_its_shortest_run(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        confirmation, "run_trials", lambda job, **more: asked.update(more, until=job.until) or True
    )
    job = Job(study, None, None, Workers(1, 1, 0.0), study.folder)  # type: ignore[arg-type]
    shortest = rerun_seconds(LUCKY) / 2
    clock = Clock(time.time(), 1000, search=0.3, confirm=0.8, retrain=0.9)
    for retrain_share, end, late in ((0.9, 800, 820), (0.82, 820 - shortest, 820 - shortest)):
        one = replace(clock, retrain=retrain_share)
        assert confirmation.confirm(job, clock=one, watch=ProgressCallback(), say=print)
        assert asked["search_alg"]._end == pytest.approx(clock.begun + end)
        assert asked["end"] == asked["until"] == pytest.approx(clock.begun + late)
    late_already = replace(clock, begun=clock.begun - 870)  # for retraining, too
    confirmation.confirm(job, clock=late_already, watch=ProgressCallback(), say=print)
    assert asked["search_alg"]._end == pytest.approx(late_already.begun + 800)


def test_where_the_best_takes_too_long_the_next_that_is_as_good_is_retrained(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Run] = []
    monkeypatch.setattr(repeats, "train_runs", lambda job, runs, **more: trained.extend(runs) or True)
    slow = replace(run(4e-3, 0.935), seconds=800.0)
    study.append(slow)
    job = Job(study, None, None, Workers(2, 1, 0.0), study.folder)  # type: ignore[arg-type]

    def retrained(**more: Any) -> tuple[str, list[str], int]:
        said: list[str] = []
        trained.clear()
        clock = Clock(time.time(), 110, retrain=0.9)
        assert retrain_new_seeds(job, clock=clock, watch=ProgressCallback(), say=said.append, **more)
        return read_json(study.best_file)["trial_id"], said, len(trained)

    best, said, runs = retrained()
    assert (best, runs) == (LUCKY.trial_id, 2)
    assert said[0] == f"The time that is left does not hold one run of {slow.config.title} ({slow.trial_id})."
    assert said[1].startswith(f"Retraining {LUCKY.config.title} ({LUCKY.trial_id}), new seeds: 2; 8 epochs")
    left_out = ["Retraining is left out: the time that is left does not hold one run of it."]
    assert retrained(trial_id=slow.trial_id) == (slow.trial_id, left_out, 0)
    study.append(replace(slow, value=1.0))
    assert retrained() == (slow.trial_id, left_out, 0)  # the others are clearly worse


def test_of_single_runs_the_best_is_retrained(study: Study) -> None:
    assert chosen_trial(study, None) == LUCKY
    assert chosen_trial(study, STEADY.trial_id) == STEADY
    with pytest.raises(ValueError, match=r"--trial nobody: no finished trial of .* has this id"):
        chosen_trial(study, "nobody")


def test_the_best_by_all_its_runs_is_retrained_and_not_the_lucky_one(study: Study) -> None:
    for seed, value in ((1, 0.87), (2, 0.88)):
        study.append(run(1e-3, value, seed, "confirm"))
    assert study.leaderboard()[0] == LUCKY
    assert chosen_trial(study, None) == STEADY
    assert chosen_trial(study, LUCKY.trial_id) == LUCKY


def test_retraining_does_not_change_who_is_retrained_when_it_goes_on(study: Study) -> None:
    for seed, value in ((1, 0.80), (2, 0.81)):
        study.append(run(1e-3, value, seed, "retrain"))
    assert chosen_trial(study, None) == LUCKY


def to_train(study: Study, seconds: float = math.inf, epochs: int | None = None) -> tuple[list[int], int]:
    """Seeds, and epochs of each, that two workers have in a job with so many seconds left for retraining."""
    runs, like = _plan_repeats(study, LUCKY, 3, RetrainOptions(epochs), TimeBudget(seconds, 2))
    assert all(r == like.with_origin(seed=r.origin.seed) for r in runs)
    assert LUCKY.run.with_config(epochs=like.config.epochs).with_origin(head_seed=0) == like
    return [r.origin.seed for r in runs], like.config.epochs


def test_only_seeds_that_have_not_run_are_trained(study: Study) -> None:
    assert to_train(study, epochs=8) == ([1, 2, 3], 8)
    study.append(run(1e-3, 0.9, 2, "confirm"))
    assert to_train(study, epochs=8) == ([1, 3], 8)
    assert to_train(study, seconds=100) == ([1, 3], 8)
    assert to_train(study, epochs=5) == ([1, 2, 3], 5)
    for seed in (1, 3):
        study.append(run(1e-3, 0.9, seed, "confirm"))
    assert to_train(study, epochs=8) == ([], 8)


@pytest.fixture
def longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retraining is twice as long as the trial where there is time."""
    monkeypatch.setattr(schedules, "RETRAIN_EPOCHS_RATIO", 2.0)


@pytest.mark.usefixtures("longer")
def test_where_the_time_allows_training_is_longer_and_a_shorter_run_is_no_run_of_it(study: Study) -> None:
    study.append(run(1e-3, 0.9, 1, "confirm"))
    assert to_train(study) == ([1, 2, 3], 16)
    assert to_train(study, seconds=190) == ([1, 2], 16)  # 8 epochs took 80 s
    assert to_train(study, seconds=180) == ([2, 3], 8)
    study.append(run(1e-3, 0.9, 2, "retrain", epochs=16))
    assert to_train(study, seconds=190) == ([1, 3], 16)
    assert to_train(study, seconds=20) == ([], 16)  # there is one of these


def left_weights(study: Study, *records: TrialRecord) -> None:
    for record in records:
        write_atomic(study.weights_file(record.trial_id), save({"x": torch.zeros(1)}))


def onward(study: Study, seconds: float = math.inf, **way: Any) -> tuple[list[tuple[int, str]], int]:
    """Seeds with the runs they go on from, and epochs, on two workers."""
    runs, like = _plan_repeats(study, LUCKY, 3, RetrainOptions(**way), TimeBudget(seconds, 2))
    starts = {r.trial_id: r.origin.init_seed for r in study.records()} | {"": 0}
    for one in runs:
        own = {"seed": one.origin.seed, "continues": one.origin.continues}
        head_seed = starts[one.origin.continues]  # the run's own head, by which soups know what mixes
        expected = LUCKY.run.with_config(epochs=like.config.epochs)
        assert one == expected.with_origin(**own, head_seed=head_seed)
    return [(r.origin.seed, r.origin.continues) for r in runs], like.config.epochs


def test_for_want_of_time_training_goes_on_from_the_runs_that_left_weights_in_turn(study: Study) -> None:
    again = run(1e-3, 0.9, 1, "confirm")
    left_weights(study, STEADY)
    assert onward(study, 100) == ([(1, ""), (2, "")], 8)
    with pytest.raises(ValueError, match=f"--onward: .* has no weights of {LUCKY.trial_id}; leave it"):
        onward(study, must_continue=True)
    left_weights(study, LUCKY, again)
    own = [(seed, LUCKY.trial_id) for seed in (1, 2, 3)]
    assert onward(study) == (own, 16)
    assert onward(study, 200) == (own[:2], 16)  # 8 epochs took 80 s, and are given 92
    assert onward(study, 180) == (own[:2], 15)  # each epoch more helps
    study.append(again)
    both = [(1, LUCKY.trial_id), (2, again.trial_id), (3, LUCKY.trial_id)]
    assert onward(study, 100) == (both[:2], 8)
    assert onward(study, 70) == (both[:2], 6)
    assert onward(study, 20) == ([], 8)
    assert onward(study, must_continue=True) == (both, 16)
    assert onward(study, must_continue=True, epochs=5) == (both, 5)
    assert onward(study, epochs=5) == ([(1, ""), (2, ""), (3, "")], 5)
    deeper, like = _plan_repeats(
        study, LUCKY, 3, RetrainOptions(changes={"head_depth": 1}), TimeBudget(math.inf, 2)
    )
    assert [r.origin.continues for r in deeper] == [""] * 3  # the weights have another head
    assert like.config.epochs == 16
    done = LUCKY.run.with_origin(seed=1, head_seed=0, continues=LUCKY.trial_id)
    study.append(of(done, run(1e-3, 0.95, 1, "retrain")))
    assert onward(study, 100) == (both[1:], 8)
    assert onward(study, 70) == ([], 8)
    study.weights_file(again.trial_id).write_bytes(b"cut")
    assert onward(study, 100) == ([(2, LUCKY.trial_id), (3, LUCKY.trial_id)], 8)


def test_a_frozen_backbone_is_opened_at_what_that_costs_here(study: Study) -> None:
    frozen = LUCKY.run.with_config(unfreeze="frozen")
    record = of(frozen, LUCKY, seconds=2.0)  # its outputs were stored
    study.append(record)
    opened = frozen.with_config(unfreeze="full", lr_ratio=0.004)
    assert RetrainOptions().new_model_runs(frozen) == [opened.with_config(epochs=16), opened]
    assert RetrainOptions(changes={"unfreeze": "frozen"}).new_model_runs(frozen)[1] == frozen
    costs = Costs({"test_resnet": {32: 0.01}}, train=1000, val=0)  # 10 s an epoch

    def trained(seconds: float) -> tuple[list[str], int]:
        runs, like = _plan_repeats(study, record, 3, RetrainOptions(), TimeBudget(seconds, 2, costs))
        assert {(r.config.unfreeze, r.config.lr_ratio) for r in runs} <= {("full", 0.004)}
        return [r.origin.continues for r in runs], like.config.epochs

    assert trained(190) == ([""] * 2, 16)
    assert trained(100) == ([""] * 2, 8)
    left_weights(study, record)
    assert trained(190) == ([record.trial_id] * 2, 16)
    assert trained(100) == ([record.trial_id] * 2, 8)
    assert trained(60) == ([record.trial_id] * 2, 5)
    assert trained(40) == ([], 8)
    assert TimeBudget(100, 2, costs).training_seconds(record, frozen.config) == pytest.approx(
        2 * RERUN_MARGIN
    )


def test_what_time_retraining_leaves_goes_to_the_next_best(study: Study) -> None:
    study.append(run(5e-3, 0.5))
    left_weights(study, LUCKY, STEADY)

    def beside(seconds: float, workers: int = 2) -> list[tuple[float, int, str]]:
        runs, _ = _plan_repeats(study, LUCKY, 3, RetrainOptions(), TimeBudget(seconds, workers))
        found = _runner_up_runs(study, LUCKY, runs, RetrainOptions(), TimeBudget(seconds, workers))
        assert all(record.config.lr == one.config.lr for one, record in found.items())
        return [(r.config.lr, r.config.epochs, r.origin.continues) for r in found]

    third = (3e-3, 16, "")  # without weights
    assert beside(math.inf) == []  # all that was asked for is trained, and that is all
    assert beside(1000) == [(2e-3, 16, STEADY.trial_id), third]  # not the bad one
    assert beside(370) == [(2e-3, 16, STEADY.trial_id)]  # after three runs of 184 s on two workers
    assert beside(290) == [(2e-3, 9, STEADY.trial_id), (3e-3, 8, "")]
    assert beside(280) == [(2e-3, 8, STEADY.trial_id), (3e-3, 8, "")]
    assert beside(270) == []
    assert beside(100, workers=4) == [(2e-3, 8, STEADY.trial_id)]
    assert beside(100) == []


def test_going_on_all_of_the_backbone_is_open() -> None:
    gradual = LUCKY.run.with_config(unfreeze="gradual")
    *_, like = RetrainOptions(changes={"ema": 0.998}).continued_runs(gradual, "parent")
    assert like == gradual.with_config(unfreeze="full", ema=0.998).with_origin(continues="parent")
    words = _announcement(replace(LUCKY, config=gradual.config), 2, 0, like)
    assert words.endswith(
        "new seeds: 2; 8 epochs more each, on from its weights, unfreeze full instead of gradual, "
        "ema 0.998 instead of 0.0."
    )


def cut(record: TrialRecord) -> TrialRecord:
    """The same, its time up before its last epoch."""
    return replace(record, cut_short=True)


def test_what_the_clock_cut_short_does_not_stand_for_a_whole_run(study: Study) -> None:
    study.append(cut(run(1e-3, 0.9, 1, "confirm")))
    study.append(run(1e-3, 0.9, 2, "confirm"))
    assert to_train(study, epochs=8) == ([3, 4], 8)  # it stays as it is, another seed takes its place
    assert to_train(study, 10, epochs=8) == ([], 8)


def test_what_was_cut_short_does_not_stand_in_the_way_of_a_shorter_schedule(study: Study) -> None:
    study.append(cut(run(1e-3, 0.9, 1, "confirm")))
    assert to_train(study, 70) == ([2, 3], 6)


def test_the_best_is_written_down_as_what_was_trained(study: Study) -> None:
    job = Job(study, None, None, Workers(1, 1, 0.0), study.folder)  # type: ignore[arg-type]
    said: list[str] = []
    assert retrain_new_seeds(job, clock=Clock(time.time(), 1e-3), watch=ProgressCallback(), say=said.append)
    assert said == ["Retraining is left out: the time that is left does not hold one run of it."]
    best = read_json(study.best_file)
    assert best["retrained"] == {}
    assert Run.from_dict(best) == LUCKY.run


def test_nothing_is_left_of_time_that_is_over(study: Study) -> None:
    job = Job(study, None, None, Workers(2, 1, 0.0), study.folder)  # type: ignore[arg-type]
    assert TimeBudget.until(time.time() - 1000, job).seconds_left == 0


def test_what_shared_a_gpu_is_planned_by_what_it_takes_alone() -> None:
    costs = Costs({"test_resnet": {32: 0.01}}, train=100, val=0)  # 8 s, of which the trial took 80
    longer = replace(LUCKY.config, epochs=16)
    assert TimeBudget(100, 2, costs, packed=True).training_seconds(LUCKY, longer) == pytest.approx(
        16 * RERUN_MARGIN
    )
    assert TimeBudget(100, 2, costs).training_seconds(LUCKY, longer) == pytest.approx(160 * RERUN_MARGIN)
    assert rerun_seconds(LUCKY, costs) == pytest.approx(8 * RERUN_MARGIN)


def test_a_soup_is_no_run_of_its_configuration(study: Study) -> None:
    study.append(replace(run(1e-3, 0.95, 2), trial_id="soup", stage="soup"))
    assert to_train(study, epochs=8) == ([1, 2, 3], 8)
    retrained = LUCKY.run.with_origin(seed=2, head_seed=0)
    study.append(of(retrained, run(1e-3, 0.9, 2, "retrain")))
    assert to_train(study, epochs=8) == ([1, 3], 8)


@pytest.mark.usefixtures("longer")
def test_whole_longer_runs_get_no_shorter_ones_beside_them(study: Study) -> None:
    assert to_train(study, 110) == ([1, 2], 8)
    study.append(run(1e-3, 0.95, 1, "retrain", epochs=16))
    assert to_train(study, 110) == ([], 16)


def test_shorter_runs_of_earlier_are_not_made_again(study: Study) -> None:
    assert to_train(study, 70) == ([1, 2], 6)
    study.append(run(1e-3, 0.91, 1, "retrain", epochs=6))
    assert to_train(study, 70) == ([2], 6)
    assert to_train(study, 60) == ([], 6)  # 5 epochs would be no better
    study.append(run(1e-3, 0.91, 2, "retrain", epochs=6))
    assert to_train(study, 70) == ([], 6)
    assert to_train(study, 100) == ([1, 2], 8)


def test_seeds_that_diverged_are_used_up_and_runs_without_weights_are_not_there(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverged: dict[str, Any] = {"state": State.FAILED, "cause": Cause.DIVERGED, "value": None}
    study.append(replace(run(1e-3, 0.0, 1, "retrain"), **diverged))
    gone = run(1e-3, 0.9, 2, "retrain")
    study.append(gone)
    assert to_train(study, epochs=8) == ([3], 8)
    monkeypatch.setattr(repeats, "weights_lost", lambda study, record: record.trial_id == gone.trial_id)
    assert to_train(study, epochs=8) == ([2, 3], 8)


def test_a_shorter_schedule_is_only_for_want_of_a_whole_one(study: Study) -> None:
    assert to_train(study, seconds=70) == ([1, 2], 6)
    assert to_train(study, seconds=20) == ([], 8)
    study.append(run(1e-3, 0.9, 1, "confirm"))
    assert to_train(study, seconds=70) == ([], 8)


def test_what_retraining_does_is_said() -> None:
    name = f"{LUCKY.config.title} ({LUCKY.trial_id})"
    same = LUCKY.run
    assert _announcement(LUCKY, 3, 0, same) == f"Retraining {name}, new seeds: 3; 8 epochs each."
    there = f"Retraining {name}, new seeds: 1, 2 more are there; 8 epochs each."
    assert _announcement(LUCKY, 1, 2, same) == there
    [other] = RetrainOptions(16, {"ema": 0.998, "start_image_size": 16}).new_model_runs(same)
    assert _announcement(LUCKY, 2, 0, other) == (
        f"Retraining {name}, new seeds: 2; 16 epochs each instead of 8, ema 0.998 instead of 0.0, "
        "start_image_size 16 instead of 0."
    )
    assert _announcement(LUCKY, 0, 3, same) == f"Retraining {name} is left out, new seeds that are there: 3."
    assert _announcement(LUCKY, 0, 0, same).startswith("Retraining is left out: the time that is left")


def over_folds(study: Study, seconds: float, chosen: tuple[TrialRecord, ...]) -> list[tuple[float, int]]:
    """Learning rate and epochs of what is trained over four folds on two workers, on as many images."""
    planned = _plan_folds(study, chosen, 4, RetrainOptions(), TimeBudget(seconds, 2), image_ratio=1.0)
    return [(like.config.lr, like.config.epochs) for like in planned.values()]


@pytest.mark.usefixtures("longer")
def test_as_many_configurations_are_trained_over_folds_as_the_time_holds(study: Study) -> None:
    both = (LUCKY, STEADY)  # a run of 8 epochs is given 92 s; four folds on two workers are two rounds
    assert over_folds(study, math.inf, both) == [(1e-3, 16), (2e-3, 16)]
    assert over_folds(study, 740, both) == [(1e-3, 16), (2e-3, 16)]
    assert over_folds(study, 560, both) == [(1e-3, 16), (2e-3, 8)]
    assert over_folds(study, 380, both) == [(1e-3, 16)]
    assert over_folds(study, 190, both) == [(1e-3, 8)]
    assert over_folds(study, 140, both) == [(1e-3, 6)]
    assert over_folds(study, 60, both) == []
    dear = replace(LUCKY, seconds=800.0)  # the others do not take its place, nor its time
    assert over_folds(study, 900, (dear, STEADY)) == []
    assert over_folds(study, 1900, (dear, STEADY)) == [(1e-3, 8)]
    assert over_folds(study, 1000, (dear, STEADY)) == [(1e-3, 4)]


def test_new_seeds_take_the_place_of_folds_that_do_not_fit(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = SimpleNamespace(train=range(100), val=range(30))
    job = Job(study, splits, None, Workers(2, 1, 0.0), study.folder)  # type: ignore[arg-type]
    trained: list[tuple[str, int, int]] = []

    def collect(job: Job, runs: list[Run], *, stage: str, **_: object) -> bool:
        trained.extend((stage, r.origin.seed, r.config.epochs) for r in runs)
        return True

    monkeypatch.setattr(repeats, "train_runs", collect)
    said: list[str] = []
    clock = Clock(time.time(), 60, retrain=1.0)
    assert retrain_folds(job, folds=4, clock=clock, watch=ProgressCallback(), say=said.append)
    assert said[0].startswith("Folds are left out: the time that is left does not hold 4 runs of the best.")
    assert trained == [("retrain", 1, 5), ("retrain", 2, 5)]


@pytest.mark.usefixtures("longer")
def test_folds_that_were_begun_are_gone_on_with(study: Study) -> None:
    begun = LUCKY.run.with_origin(folds=4, fold=2)
    study.append(of(begun, LUCKY, stage="fold"))
    assert over_folds(study, math.inf, (LUCKY,)) == [(1e-3, 8)]
    assert over_folds(study, 140, (LUCKY,)) == []
    shorter = STEADY.run.with_config(epochs=5).with_origin(folds=4, fold=0)
    study.append(of(shorter, STEADY, stage="fold"))
    assert over_folds(study, 200, (STEADY,)) == [(2e-3, 5)]
    assert over_folds(study, math.inf, (STEADY,)) == [(2e-3, 5)]
    for fold in (1, 2, 3):
        study.append(of(shorter.with_origin(fold=fold), STEADY, stage="fold"))
    assert over_folds(study, math.inf, (STEADY,)) == [(2e-3, 16)]
    assert LUCKY in study.leaderboard()
    assert begun.id not in {r.trial_id for r in study.leaderboard()}


def left_folds(study: Study, like: Run, *, cut_short: int) -> list[TrialRecord]:
    """All four folds of it, the first so many of which the clock cut short."""
    found = []
    for fold in range(4):
        record = of(like.with_origin(folds=4, fold=fold), LUCKY, stage=FOLD)
        found.append(cut(record) if fold < cut_short else record)
        study.append(found[-1])
    return found


def test_folds_that_are_all_there_are_not_left_out_for_new_seeds(
    study: Study, training: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retraining, "record_complete_folds", lambda study: [])
    left_folds(study, LUCKY.run, cut_short=1)
    said: list[str] = []
    over = Clock(time.time() - 10, 1.0)
    assert retrain_folds(a_job(study), folds=4, clock=over, watch=ProgressCallback(), say=said.append)
    assert (said, training.asked) == ([], [])


@pytest.mark.usefixtures("longer")
def test_folds_that_the_clock_cut_short_are_trained_again_where_there_is_time(study: Study) -> None:
    first, *_ = left_folds(study, LUCKY.run, cut_short=1)
    assert _missing_folds(study, LUCKY.run, 4) == [first.run]
    assert over_folds(study, 100, (LUCKY,)) == [(1e-3, 8)]
    assert over_folds(study, 60, (LUCKY,)) == []  # what there is will do
    left_folds(study, STEADY.run, cut_short=4)
    assert over_folds(study, 190, (STEADY,)) == [(2e-3, 8)]
    assert over_folds(study, 140, (STEADY,)) == []
    longer = replace(run(4e-3, 0.9), trial_id="longer")
    left_folds(study, longer.run.with_config(epochs=16), cut_short=1)
    # not enough for the one that was cut: no shorter ones beside those there are
    for seconds in (50, 100, 150):
        assert over_folds(study, seconds, (longer,)) == []
    shorter = STEADY.run.with_config(epochs=6)  # planned so, and whole
    left_folds(study, shorter, cut_short=0)
    assert _missing_folds(study, shorter, 4) == []


def a_job(study: Study) -> Job:
    splits = SimpleNamespace(train=range(100), val=range(20), holdout=range(20), test=range(2))
    splits.sample_file = None
    return Job(study, splits, None, Workers(2, 1, 0.0), study.folder)  # type: ignore[arg-type]


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In the place of training: `asked` holds the runs, all of which get the state `ends` and `cause`."""
    told = SimpleNamespace(asked=[], ends=State.COMPLETE, cause=None)

    def run_trials(job: Job, *, stage: str, search_alg: Any, **more: Any) -> bool:
        for one in search_alg._runs:
            told.asked.append(one)
            record = of(one, LUCKY, state=told.ends, cause=told.cause, stage=stage)
            role = more["roles"][one.id]
            job.study.append(replace(record, epochs_run=1, value=0.5, seconds=1.0, repeats=role.repeats))
            if stage == FOLD_IN and told.ends is State.COMPLETE:
                answer = Predictions(("a", "b"), ("0", "1"), np.eye(2))
                answer.save(job.study.predictions_file(one.id, "test"))
        return told.ends is not State.INTERRUPTED

    monkeypatch.setattr(repeats, "run_trials", run_trials)
    return told


def test_a_model_of_everything_that_the_clock_cut_short_is_trained_again(
    study: Study, training: SimpleNamespace
) -> None:
    said: list[str] = []
    common: dict[str, Any] = {
        "watch": ProgressCallback(),
        "say": said.append,
        "options": RetrainOptions(epochs=8),
    }
    unbounded, over = Clock(time.time()), Clock(time.time() - 10, 1.0)
    assert retrain_on_all_labelled(a_job(study), clock=unbounded, **common)
    first, *others = training.asked
    assert [r.origin.seed for r in (first, *others)] == [1, 2, 3]
    done = {r.trial_id: r for r in study.records()}
    study.append(cut(done[first.id]))
    study.fold_in_file.unlink()
    training.asked.clear()
    assert retrain_on_all_labelled(a_job(study), clock=over, **common)
    assert training.asked == []
    assert "the mean of 2 models that learnt from everything" in said[-1]  # the whole ones
    training.ends = State.INTERRUPTED
    assert not retrain_on_all_labelled(a_job(study), clock=unbounded, **common)
    assert training.asked == [first]
    assert {r.trial_id: r for r in study.records()}[first.id] == cut(done[first.id])
    training.ends = State.COMPLETE
    assert retrain_on_all_labelled(a_job(study), clock=unbounded, **common)
    assert training.asked == [first, first]
    assert retrain_on_all_labelled(a_job(study), clock=unbounded, **common)
    assert training.asked == [first, first]


def test_shorter_models_of_everything_are_used_and_not_made_again(
    study: Study, training: SimpleNamespace
) -> None:
    said: list[str] = []
    common: dict[str, Any] = {"watch": ProgressCallback(), "say": said.append}
    little = {"clock": Clock(time.time(), 120, retrain=1.0), **common}
    assert retrain_on_all_labelled(a_job(study), **little)
    made = [(r.origin.seed, r.config.epochs) for r in training.asked]
    assert [seed for seed, _ in made] == [1, 2]
    assert all(4 <= epochs < 8 for _, epochs in made)
    study.fold_in_file.unlink()
    training.asked.clear()
    over = Clock(time.time() - 10, 1.0)
    assert retrain_on_all_labelled(a_job(study), clock=over, **common)
    assert training.asked == []
    assert "the mean of 2 models that learnt from everything" in said[-1]


def test_models_of_everything_whose_answers_are_lost_or_damaged_are_made_anew(
    study: Study, training: SimpleNamespace
) -> None:
    said: list[str] = []
    common: dict[str, Any] = {"clock": Clock(time.time()), "watch": ProgressCallback(), "say": said.append}
    assert retrain_on_all_labelled(a_job(study), options=RetrainOptions(epochs=8), **common)
    first, second, _ = training.asked
    files = [study.predictions_file(one.id, "test") for one in (first, second)]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:50])
    training.asked.clear()
    assert retrain_on_all_labelled(a_job(study), options=RetrainOptions(epochs=8), **common)
    assert training.asked == [first, second]
    assert "the mean of 3 models that learnt from everything" in said[-1]


def test_new_seeds_take_the_place_of_folds_of_which_one_diverges(
    study: Study, training: SimpleNamespace
) -> None:
    said: list[str] = []
    training.ends, training.cause = State.FAILED, Cause.DIVERGED
    common: dict[str, Any] = {"clock": Clock(time.time()), "watch": ProgressCallback(), "say": said.append}
    assert retrain_folds(a_job(study), folds=4, trial_id=LUCKY.trial_id, **common)
    assert said[1].startswith("A fold diverged")
    assert [r.origin.folds for r in training.asked] == [4] * 4 + [0] * 3
    made = [r for r in study.records() if r.stage != "search"]
    assert [r.repeats for r in made] == [LUCKY.trial_id] * 7
    training.asked.clear()
    assert retrain_folds(
        a_job(study), folds=4, trial_id=LUCKY.trial_id, options=RetrainOptions(epochs=16), **common
    )
    assert training.asked == []  # they would diverge again


def test_where_nothing_learns_from_everything_that_is_said(study: Study, training: SimpleNamespace) -> None:
    said: list[str] = []
    over = Clock(time.time() - 10, 1.0)
    assert retrain_on_all_labelled(a_job(study), clock=over, watch=ProgressCallback(), say=said.append)
    assert training.asked == []
    assert [line.endswith("on everything is left out: there is no time for it.") for line in said] == [True]


def test_a_runner_up_that_does_not_take_a_change_is_left_out_and_the_best_is_not(
    study: Study, training: SimpleNamespace
) -> None:
    training.ends = State.PRUNED  # there are no complete folds
    large = LUCKY.run.with_config(image_size=64, lr=4e-3)
    study.append(of(large, LUCKY, value=0.95))
    said: list[str] = []
    common: dict[str, Any] = {"clock": Clock(time.time()), "watch": ProgressCallback(), "say": said.append}
    options = RetrainOptions(epochs=8, changes={"start_image_size": 48})
    assert retrain_folds(a_job(study), folds=2, options=options, **common)
    assert {r.config.image_size for r in training.asked} == {64}
    left_out = f"{LUCKY.config.title} ({LUCKY.trial_id}) is left out: start_image_size=48 must be at most"
    assert any(line.startswith(left_out) for line in said)
    with pytest.raises(ValueError, match="start_image_size=48 must be at most image_size=32"):
        retrain_folds(a_job(study), folds=2, options=options, trial_id=LUCKY.trial_id, **common)


@pytest.mark.usefixtures("longer")
def test_a_schedule_that_the_search_had_shortened_is_trained_at_the_length_of_the_others(
    study: Study,
) -> None:
    fixed = {"backbone": "test_resnet", "image_size": 32, "epochs": 8}
    write_json(study.folder / "study.json", {**study.metadata, "space": {"dimensions": {}, "fixed": fixed}})
    options, short = RetrainOptions().for_study(study), run(4e-3, 0.95, epochs=5)
    study.append(short)

    def lengths(runs: list[Run]) -> list[tuple[int, str]]:
        return [(r.config.epochs, r.origin.continues) for r in runs]

    assert lengths(options.new_model_runs(short.run)) == [(16, ""), (10, ""), (8, ""), (5, "")]
    assert lengths(options.new_model_runs(LUCKY.run)) == [(16, ""), (8, "")]
    every = [(epochs, "it") for epochs in range(16, 7, -1)]
    assert lengths(options.candidate_runs(short.run, ["it"])) == every
    assert lengths(options.candidate_runs(LUCKY.run, ["it"])) == every
    assert lengths(RetrainOptions(epochs=3).for_study(study).new_model_runs(short.run)) == [(3, "")]
    for seconds, epochs in ((190, 16), (120, 10), (100, 8), (60, 5)):  # 10 s an epoch, given 11.5
        assert _plan_repeats(study, short, 2, options, TimeBudget(seconds, 2))[1].config.epochs == epochs


def test_without_a_limit_of_time_nothing_takes_the_place_of_the_best(
    study: Study, training: SimpleNamespace
) -> None:
    training.ends, training.cause = State.FAILED, Cause.DIVERGED
    common: dict[str, Any] = {
        "clock": Clock(time.time()),
        "watch": ProgressCallback(),
        "options": RetrainOptions(epochs=8),
    }
    for diverged in (False, True):  # the second time all seeds of the best have
        said: list[str] = []
        training.asked.clear()
        assert retrain_new_seeds(a_job(study), say=said.append, **common)
        assert len(training.asked) == (0 if diverged else 3)
        assert not any(line.startswith("The time that is left does not hold one run of") for line in said)

"""Stops have reasons; protected trials, last epochs and what the clock allows are never stopped."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from carmodels.catalog import UNFREEZE
from carmodels.records import Cause, State, TrialRecord
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run
from tune.optim.scheduler import AshaScheduler, StopDecision, TimeLimit, grace_period

EPOCHS = 8
ALWAYS = TimeLimit(math.inf, math.inf)
CONFIG = TrialConfig(backbone="lcnet_035", image_size=64, epochs=EPOCHS)


def made(time_limit: TimeLimit = ALWAYS, protect: tuple[str, ...] = (), mode: str = "max") -> AshaScheduler:
    return AshaScheduler(
        metric="score", mode=mode, epochs=EPOCHS, grace_period=2, time_limit=time_limit, protect=protect
    )


def tell(scheduler: Any, name: str, epoch: int, value: float, elapsed: float = 1.0, **more: Any) -> str:
    trial = SimpleNamespace(trial_id=name, config=Run(CONFIG).to_dict())
    if name not in scheduler._trial_info:
        scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(
        None, trial, {"epoch": epoch, "score": value, "elapsed": elapsed, "run_id": name, **more}
    )


def test_a_trial_below_the_cutoff_is_stopped_and_told_why() -> None:
    scheduler = made()
    for name, value in (("a", 0.9), ("b", 0.8), ("c", 0.7)):
        tell(scheduler, name, 2, value)
    assert tell(scheduler, "d", 2, 0.6) == TrialScheduler.STOP
    reason = "rung at epoch 2: 0.6000 against a cut-off of 0.8000, rank 4 of 4"
    assert scheduler.stops["d"] == StopDecision(State.PRUNED, reason)


def test_where_less_is_better_the_rank_and_the_cutoff_turn_round() -> None:
    scheduler = made(mode="min")
    for name, value in (("a", 0.9), ("b", 0.8), ("c", 0.7)):
        tell(scheduler, name, 2, value)
    assert tell(scheduler, "e", 2, 0.5) == TrialScheduler.CONTINUE
    assert tell(scheduler, "d", 2, 0.95) == TrialScheduler.STOP
    reason = "rung at epoch 2: 0.9500 against a cut-off of 0.7500, rank 5 of 5"
    assert scheduler.stops["d"] == StopDecision(State.PRUNED, reason)


def test_nobody_is_stopped_before_the_grace_period() -> None:
    scheduler = made()
    actions = [tell(scheduler, str(i), 1, 1.0 - i / 10) for i in range(9)]
    assert set(actions) == {TrialScheduler.CONTINUE}


@pytest.mark.parametrize("epochs", [1, 2, 8, 30])
def test_the_grace_period_lets_every_strategy_open_its_backbone(epochs: int) -> None:
    slowest = max(row.head_only_epochs or 0 for row in UNFREEZE.values())
    assert grace_period(epochs) == min(epochs, slowest + 2)


def test_a_protected_trial_runs_its_whole_schedule_and_is_no_peer_of_others() -> None:
    scheduler = made(protect=("baseline",))
    for name in "abc":
        tell(scheduler, name, 2, 0.9)
    assert [tell(scheduler, "baseline", e, 0.1) for e in range(2, 9)] == [TrialScheduler.CONTINUE] * 7
    tell(scheduler, "d", 2, 0.89)
    assert scheduler.stops["d"].reason.endswith("rank 4 of 4")


def test_nor_is_it_one_when_it_ends() -> None:
    """Ray enters the last value of a trial that ends at the last rung it has passed."""
    scheduler = made(protect=("baseline",))
    for name in ("baseline", "other"):
        tell(scheduler, name, 1, 0.9)
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_complete(None, trial, {"epoch": 3, "score": 0.9, "run_id": name})
        assert name not in scheduler._trial_info
        stopped = tell(scheduler, f"after {name}", 2, 0.1)
        assert stopped == (TrialScheduler.CONTINUE if name == "baseline" else TrialScheduler.STOP)


def test_nor_is_it_one_where_a_search_goes_on() -> None:
    config = TrialConfig("test_resnet", image_size=32, epochs=EPOCHS)
    curve = tuple(EpochMetrics(e, 1.0, 1.0, 0.9, 0.9, 1.0) for e in range(1, EPOCHS + 1))
    record = TrialRecord("baseline", config, State.COMPLETE, EPOCHS, 0.9, 8.0, "ran", curve=curve)
    scheduler = made(protect=("baseline",))
    scheduler.replay([record])
    assert tell(scheduler, "a", 2, 0.1) == TrialScheduler.CONTINUE
    scheduler.replay([replace(record, trial_id="other")])
    assert tell(scheduler, "b", 2, 0.1) == TrialScheduler.STOP


def test_a_last_result_is_never_stopped() -> None:
    scheduler = made()
    for name in "abc":
        tell(scheduler, name, 2, 0.9)
    assert tell(scheduler, "d", 2, 0.1, state="complete") == TrialScheduler.CONTINUE
    assert tell(scheduler, "e", EPOCHS, 0.1) == TrialScheduler.CONTINUE
    assert not scheduler.stops


def test_the_cause_of_a_failure_is_kept_for_the_searcher() -> None:
    scheduler = made()
    for name, error in (("lost", None), ("full", RayTaskError("train", "", MemoryError()))):
        scheduler.on_trial_error(None, SimpleNamespace(trial_id=name, get_pickled_error=lambda e=error: e))
    assert scheduler.causes == {"lost": Cause.MACHINE, "full": Cause.OUT_OF_MEMORY}


def test_the_clock_stops_what_cannot_end_in_time_and_lets_end_what_can() -> None:
    now = time.time()
    scheduler = made(TimeLimit(soft=now - 1, hard=now + 100))
    assert tell(scheduler, "slow", 4, 0.9, elapsed=200.0) == TrialScheduler.STOP
    reason = "the time for searching was up after epoch 4 of 8"
    assert scheduler.stops["slow"] == StopDecision(State.OUT_OF_TIME, reason)
    assert tell(scheduler, "quick", 4, 0.9, elapsed=20.0) == TrialScheduler.CONTINUE
    early = made(TimeLimit(soft=now + 50, hard=now + 100))
    assert tell(early, "slow", 4, 0.9, elapsed=200.0) == TrialScheduler.CONTINUE


def test_decisions_are_those_of_rays_asha() -> None:
    """Against the reference: the same sequence of results, told to Ray's own scheduler."""
    ours = made()
    rays = AsyncHyperBandScheduler(
        time_attr="epoch",
        metric="score",
        mode="max",
        max_t=EPOCHS,
        grace_period=2,
        reduction_factor=2,
        stop_last_trials=False,
    )
    draw = random.Random(0)
    alive = {str(i): 0 for i in range(40)}
    stops = 0
    while alive:
        name = draw.choice(sorted(alive))
        alive[name] += 1
        value = draw.random()
        if alive[name] == EPOCHS:
            del alive[name]
            continue
        decisions = [tell(s, name, alive[name], value) for s in (ours, rays)]
        assert decisions[0] == decisions[1]
        if decisions[0] == TrialScheduler.STOP:
            stops += 1
            del alive[name]
    assert stops > 5


def test_a_resumed_search_decides_as_one_that_was_not_interrupted() -> None:
    draw = random.Random(1)
    curves = {f"t{i}": [draw.random() for _ in range(EPOCHS)] for i in range(12)}
    whole = made()
    records = []
    for number, (name, values) in enumerate(curves.items()):
        epochs: list[EpochMetrics] = []
        for epoch, value in enumerate(values[:-1], start=1):
            epochs.append(EpochMetrics(epoch, 1.0, 1.0, value, value, 1.0))
            if tell(whole, name, epoch, value) == TrialScheduler.STOP:
                break
        run, curve = Run(CONFIG, Origin(seed=number)), tuple(epochs)
        records.append(
            TrialRecord(
                run.id, CONFIG, State.PRUNED, len(curve), value, 1.0, "", origin=run.origin, curve=curve
            )
        )
    resumed = made()
    resumed.replay(records)
    for number in range(20):
        value, epoch = draw.random(), draw.choice([2, 4])
        assert tell(whole, f"n{number}", epoch, value) == tell(resumed, f"n{number}", epoch, value)
    assert whole.stops | resumed.stops == whole.stops

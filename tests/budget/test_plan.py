"""A plan knows what an epoch costs, shrinks what costs too much, and starts nothing that cannot end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from ray.exceptions import WorkerCrashedError

from carmodels.files import write_json
from carmodels.models.weights import Weights
from carmodels.presets import SPACES, baseline
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.features import VIEWS_KEPT
from carmodels.training.run import Run
from tune.budget.costs import CONTEXT_BYTES, FORWARD_COST, MEMORY_MARGIN, Compiled, Costs, cost_ratio
from tune.budget.plan import Plan, _surviving_share
from tune.runtime import profiling
from tune.runtime.job import Job, Workers
from tune.runtime.packing import Packing
from tune.runtime.profiling import _known, _untried, costs_of

SPACE = SPACES["demo"]
COSTS = Costs({b: {32: 0.001, 96: 0.009} for b in SPACE.backbones}, train=700, val=100)
BASELINE = baseline(SPACE)  # 96 px, 8 epochs, the first two with the head alone


def plan(seconds: float, workers: int = 1) -> Plan:
    return Plan(COSTS, time.time() + seconds, workers)


def test_cost_between_two_measured_sizes_goes_with_the_area() -> None:
    assert COSTS.image("test_resnet", 32) == pytest.approx(0.001)
    assert COSTS.image("test_resnet", 64) == pytest.approx(0.001 + 0.008 * (64**2 - 32**2) / (96**2 - 32**2))


@pytest.mark.parametrize(
    ("strategy", "head_only"), [("frozen", 8), ("full", 0), ("head_first", 2), ("gradual", 1)]
)
def test_frozen_epochs_cost_a_forward_pass_for_what_is_not_stored_yet(strategy: str, head_only: int) -> None:
    config = replace(BASELINE, unfreeze=strategy)
    train, val = 0.009 * FORWARD_COST * 700, 0.009 * FORWARD_COST * 100
    learning, left = (8 - head_only) * (0.009 * 700 + val), 3 * val  # of val, holdout and test
    stored = min(head_only, VIEWS_KEPT) * train + min(head_only, 1) * val
    costs = replace(COSTS, holdout_and_test=200)
    assert costs.schedule(config) == pytest.approx(stored + learning + left)
    for other, of in (
        (replace(config, mixup=0.2), costs),
        (replace(config, cutmix=0.5), costs),
        (config, replace(costs, caches_features=False)),
    ):
        assert of.schedule(other) == pytest.approx(head_only * (train + val) + learning + left)


def test_growing_images_cost_their_area_and_larger_test_images_theirs() -> None:
    config = replace(BASELINE, unfreeze="full", start_image_size=48)
    areas = sum((config.train_image_size(n) / 96) ** 2 for n in range(1, 9))
    shown = 9 * FORWARD_COST * 100  # once more by the finished trial
    assert areas < 8
    frozen = replace(config, unfreeze="frozen")
    assert replace(COSTS, caches_features=False).schedule(frozen) == pytest.approx(
        0.009 * FORWARD_COST * (areas * 700 + 9 * 100)
    )
    beyond = replace(config, start_image_size=0, eval_image_size=2 * 96)
    assert COSTS.inference(beyond) == pytest.approx(4 * 0.009 * FORWARD_COST)
    assert COSTS.schedule(config) == pytest.approx(0.009 * (areas * 700 + shown))
    larger = replace(BASELINE, unfreeze="full", eval_image_size=192)
    assert COSTS.schedule(larger) == pytest.approx(0.009 * (8 * 700 + 4 * shown))
    assert cost_ratio(replace(larger, epochs=16), larger) == pytest.approx(2)
    assert cost_ratio(config, larger, train=1.2) == pytest.approx(1.2 * areas / 8)


def test_without_a_limit_on_time_everything_fits_unchanged() -> None:
    free = Plan(None, math.inf, 2)
    assert free.fits(BASELINE)
    assert free.shrink_to_fit(BASELINE, SPACE.image_sizes, 0.2) == (BASELINE, "")


def test_a_trial_fits_where_its_whole_schedule_ends_in_time() -> None:
    cost = COSTS.schedule(BASELINE)
    assert plan(cost + 5).fits(BASELINE)
    assert not plan(cost - 5).fits(BASELINE)


def test_what_memory_does_not_hold_fits_in_no_time() -> None:
    beyond = replace(BASELINE, image_size=128)
    for strategy in ("full", "frozen"):
        config = replace(beyond, unfreeze=strategy)
        assert COSTS.schedule(config) == math.inf
        assert not Plan(COSTS, math.inf, 1).fits(config)
    small, _ = Plan(COSTS, math.inf, 1).shrink_to_fit(beyond, (32, 96, 128), 0.2)
    assert small.image_size == 96


def test_a_trial_that_would_take_the_time_of_many_does_not_fit() -> None:
    cost = COSTS.schedule(BASELINE)
    assert replace(plan(10 * cost), max_trial_seconds=cost + 1).fits(BASELINE)
    assert not replace(plan(10 * cost), max_trial_seconds=cost - 1).fits(BASELINE)


def test_the_baseline_is_first_made_smaller_and_then_shorter_to_cost_its_share() -> None:
    whole, small = COSTS.schedule(BASELINE), COSTS.schedule(replace(BASELINE, image_size=32))
    assert plan(whole / 0.2 + 5).shrink_to_fit(BASELINE, SPACE.image_sizes, 0.2) == (BASELINE, "")
    config, changed = plan(0.7 * whole / 0.2).shrink_to_fit(BASELINE, SPACE.image_sizes, 0.2)
    assert (config.image_size, config.epochs) == (64, 8)
    assert changed == " at 64 instead of 96 px"
    config, changed = plan(0.5 * small / 0.2).shrink_to_fit(BASELINE, SPACE.image_sizes, 0.2)
    assert config.image_size == 32
    assert 1 < config.epochs < 8
    assert changed == f" at 32 instead of 96 px for {config.epochs} instead of 8 epochs"
    assert COSTS.schedule(config) <= 0.5 * small
    assert plan(0).shrink_to_fit(BASELINE, SPACE.image_sizes, 0.2)[0].epochs == 1


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
def test_however_many_workers_there_are_the_baseline_ends_in_time(workers: int) -> None:
    few = plan(0.9 * COSTS.schedule(BASELINE), workers)
    reference, _ = few.shrink_to_fit(BASELINE, SPACE.image_sizes, 0.2)
    assert few.fits(reference)


def test_a_size_beyond_memory_does_not_fit_and_does_not_spoil_the_plan() -> None:
    tight = Costs({"test_resnet": {32: 0.001, 64: 0.004}, "test_efficientnet": {}}, train=700, val=100)
    assert math.isinf(tight.image("test_resnet", 96))
    assert tight.image("test_resnet", 48) < 0.004
    some = Plan(tight, time.time() + 1000, 1)
    assert not some.fits(BASELINE)
    assert some.shrink_to_fit(BASELINE, SPACE.image_sizes, 0.9)[0].image_size == 64
    assert some.trials(SPACE, 3) > 0


def test_successive_halving_halves_after_the_grace_period() -> None:
    assert [_surviving_share(epoch, 3) for epoch in range(1, 9)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_twice_the_workers_buy_twice_the_trials() -> None:
    one, two = plan(10_000).trials(SPACE, 3), plan(10_000, workers=2).trials(SPACE, 3)
    assert two == pytest.approx(2 * one, abs=1)
    mean = sum(COSTS.schedule(replace(BASELINE, image_size=s)) for s in SPACE.image_sizes) / 4
    assert one > 10_000 / mean  # stopping and frozen epochs save time


def test_a_space_of_one_size_needs_one_measurement() -> None:
    single = Costs({"test_resnet": {64: 0.002}}, train=10, val=10)
    assert single.image("test_resnet", 64) == 0.002
    config = TrialConfig(backbone="test_resnet", image_size=64, epochs=1)
    assert single.schedule(config) == pytest.approx(0.002 * (10 + FORWARD_COST * (10 + 10)))


Measuring = Callable[[Job, list[TrialConfig]], dict[str, Any]]


def evenly(seconds: float) -> Measuring:
    """Measures the same for every size."""
    return lambda job, configs: {
        "seconds": {str(c.image_size): seconds for c in configs},
        "bytes": {},
        "compiled": {},
    }


@pytest.fixture
def measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Costs, list[str], list[str]]]:
    """Measures with functions in place of Ray's tasks; the costs, what was measured and what was said."""

    def result(task: Callable[[], Any]) -> Any:
        return task()

    monkeypatch.setattr(
        profiling, "as_task", lambda f, workers: SimpleNamespace(remote=lambda *given: partial(f, *given))
    )
    monkeypatch.setattr("ray.get", result)
    splits = SimpleNamespace(train=range(700), val=range(150), holdout=range(150), test=range(300))

    def measure(
        how: Measuring, pace: float, workers: int = 2, looked: Callable[..., tuple[str, float]] | None = None
    ) -> tuple[Costs, list[str], list[str]]:
        names: list[str] = []
        said: list[str] = []

        def counted(job: Job, configs: list[TrialConfig]) -> dict[str, Any]:
            names.append(configs[0].backbone)
            return how(job, configs)

        monkeypatch.setattr(profiling, "_measure", counted)
        monkeypatch.setattr(profiling, "_looked_at", looked or (lambda job, config: ("a processor", pace)))
        own = Workers(workers, 1, 0.0)
        job = Job(Study(tmp_path), splits, Weights("none"), own, tmp_path)  # type: ignore[arg-type]
        return costs_of(job, SPACE, said.append), names, said

    return measure


@pytest.mark.parametrize(("now", "anew"), [(0.012, False), (0.0155, False), (0.017, True), (0.006, True)])
def test_costs_that_were_kept_hold_as_long_as_the_machine_is_as_fast(
    measured: Callable[..., Any], now: float, anew: bool
) -> None:
    first, names, _ = measured(evenly(0.010), 0.010)
    assert names == list(SPACE.backbones)
    assert first.seconds["test_resnet"][96] == 0.010
    assert (first.train, first.val, first.holdout_and_test) == (700, 150, 450)
    assert not first.caches_features
    again, names, _ = measured(evenly(now), now)
    assert names == (list(SPACE.backbones) if anew else [])
    assert again.seconds["test_resnet"][96] == (now if anew else 0.010)


@pytest.mark.parametrize("workers", [1, 2, 5, 8])
def test_as_many_measure_side_by_side_as_trials_will_train(
    measured: Callable[..., Any], workers: int
) -> None:
    looks: list[str] = []

    def looked(job: Job, config: TrialConfig) -> tuple[str, float]:
        looks.append(config.backbone)
        return "a processor", 0.01

    turn = iter(range(100))

    def in_turn(job: Job, configs: list[TrialConfig]) -> dict[str, Any]:
        return evenly(next(turn))(job, configs)

    found, names, _ = measured(in_turn, 0.01, workers, looked)
    assert len(looks) == workers
    assert len(names) % workers == 0
    assert len(names) - workers < len(SPACE.backbones)
    for backbone in SPACE.backbones:
        turns = [
            turn for turn, name in enumerate(sorted(names, key=SPACE.backbones.index)) if name == backbone
        ]
        assert found.seconds[backbone][96] == np.median(turns)


def test_a_size_that_did_not_fit_beside_the_others_costs_infinitely_much(
    measured: Callable[..., Any],
) -> None:
    turn = iter(range(100))

    def tight(job: Job, configs: list[TrialConfig]) -> dict[str, Any]:
        found = evenly(0.01)(job, configs)
        if next(turn) % 2:
            del found["seconds"]["96"]
        return found

    costs, _, _ = measured(tight, 0.01, workers=8)
    assert all(math.isinf(costs.image(backbone, 96)) for backbone in SPACE.backbones)
    assert all(costs.image(backbone, 32) == 0.01 for backbone in SPACE.backbones)


def test_a_backbone_whose_measuring_dies_is_named_and_the_search_goes_on_without(
    measured: Callable[..., Any],
) -> None:
    """It is measured again by the next search, as the worker may have been killed for another reason."""
    first, *others = SPACE.backbones
    died = {first}

    def dying(job: Job, configs: list[TrialConfig]) -> dict[str, Any]:
        if configs[0].backbone in died:
            raise WorkerCrashedError
        return evenly(0.01)(job, configs)

    costs, _, said = measured(dying, 0.01)
    [line] = said
    assert line.startswith(f"No trial will have {first}: measuring its training failed (The worker died")
    assert "\n" not in line
    assert not Plan(costs, math.inf, 1).fits(replace(BASELINE, backbone=first))
    assert all(Plan(costs, math.inf, 1).fits(replace(BASELINE, backbone=other)) for other in others)
    died.clear()
    costs, names, said = measured(dying, 0.01)
    assert (set(names), said) == ({first}, [])
    assert Plan(costs, math.inf, 1).fits(replace(BASELINE, backbone=first))


def test_where_the_first_look_dies_another_backbone_is_looked_at(measured: Callable[..., Any]) -> None:
    def looked(job: Job, config: TrialConfig) -> tuple[str, float]:
        if config.backbone == SPACE.backbones[0]:
            raise WorkerCrashedError
        return "a processor", 0.01

    _, names, said = measured(evenly(0.01), 0.01, 2, looked)
    assert set(names) == set(SPACE.backbones[1:])
    assert [line.split(":")[0] for line in said] == [f"No trial will have {SPACE.backbones[0]}"]


@pytest.mark.parametrize("where", ["the look", "the measuring"])
def test_where_nothing_can_be_measured_the_search_ends_in_one_line(
    measured: Callable[..., Any], where: str
) -> None:
    def dying(*given: object) -> Any:
        raise WorkerCrashedError

    with pytest.raises(ValueError, match=r"^no backbone can be trained here.*The worker died.*--workers"):
        measured(dying, 0.01, looked=dying if where == "the look" else None)


def test_out_of_memory_in_compiling_leaves_the_measurement_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(job: Job, config: TrialConfig, compiled: bool = False) -> float:
        if compiled:
            raise torch.OutOfMemoryError
        return 0.5

    monkeypatch.setattr(profiling, "_seconds", seconds)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    splits, workers = SimpleNamespace(train=range(700)), SimpleNamespace(device="cuda")
    job = cast(Job, SimpleNamespace(begin=lambda: None, workers=workers, splits=splits))
    found = profiling._measure(job, [BASELINE, replace(BASELINE, image_size=32)])
    assert found == {"seconds": {"96": 0.5, "32": 0.5}, "bytes": {"96": 7, "32": 7}, "compiled": {}}


GB = 10**9
SHARED = replace(
    COSTS, memory={"test_resnet": {32: 1 * GB, 96: 20 * GB}}, compiled={"test_resnet": Compiled(60.0, 0.7)}
)


@pytest.mark.parametrize(
    ("image_size", "gpu_gigabytes", "share"),
    [(32, 80, 1 / 4), (32, 8, 1 / 3), (32, 5, 1 / 2), (96, 80, 1 / 3), (96, 48, 1.0), (96, 8, 1.0)],
)
def test_a_trial_asks_for_the_smallest_share_of_a_gpu_that_holds_it(
    image_size: int, gpu_gigabytes: int, share: float
) -> None:
    config = replace(BASELINE, backbone="test_resnet", image_size=image_size)
    assert SHARED.gpu_share(config, gpu_gigabytes * GB) == share
    needed = MEMORY_MARGIN * SHARED.memory["test_resnet"][image_size] + CONTEXT_BYTES
    assert needed <= share * gpu_gigabytes * GB or share == 1
    packing = Packing(SHARED, gpu_gigabytes * GB, cpus=16)
    assert packing(Run(config).to_dict()).required_resources == {"CPU": int(16 * share), "GPU": share}


def test_what_was_not_measured_gets_a_whole_gpu() -> None:
    assert SHARED.gpu_share(replace(BASELINE, backbone="test_efficientnet"), 80 * GB) == 1


def test_a_trial_that_shares_a_gpu_may_take_so_many_times_longer() -> None:
    config = replace(BASELINE, backbone="test_resnet", image_size=32)
    cost = SHARED.schedule(config)
    assert Plan(SHARED, time.time() + 1.1 * cost, 1).fits(config)
    assert not Plan(SHARED, time.time() + 3.9 * cost, 1, gpu_bytes=80 * GB).fits(config)
    assert Plan(SHARED, time.time() + 4.1 * cost, 1, gpu_bytes=80 * GB).fits(config)


def test_compiling_pays_in_a_long_run_of_one_stage() -> None:
    config = replace(BASELINE, backbone="test_resnet", unfreeze="full")
    assert not SHARED.pays_to_compile(replace(config, epochs=8))  # saves 16 s
    assert SHARED.pays_to_compile(replace(config, epochs=60))
    assert not SHARED.pays_to_compile(replace(config, epochs=60, unfreeze="frozen"))
    assert not SHARED.pays_to_compile(replace(config, epochs=60, unfreeze="gradual"))  # sixteen stages
    assert not COSTS.pays_to_compile(replace(config, epochs=60))


@pytest.mark.parametrize(
    ("compiled", "images", "untried"),
    [
        (None, 2000, True),
        (None, 500, False),
        ({}, 2000, False),
        ({"seconds": 60.0, "ratio": 0.8}, 2000, False),
    ],
)
def test_compiling_is_tried_once_a_trial_is_long_enough_for_it_to_pay(
    compiled: dict[str, float] | None, images: int, untried: bool
) -> None:
    measured = {"seconds": {"96": 0.01, "32": 0.001}, "bytes": {}, "compiled": compiled}
    job = cast(Job, SimpleNamespace(splits=SimpleNamespace(train=range(images))))
    assert _untried(measured, job, [BASELINE]) == untried  # 8 epochs: 160 s or 40 s


def test_a_file_of_costs_from_before_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    assert _known(path) == {}
    path.write_text('{"a": {"96": 0.1}}')
    assert _known(path) == {}
    compiled = {"seconds": 60.0, "ratio": 0.8}
    tried: list[dict[str, float] | None] = [{}, compiled, None]
    whole = {str(t): {"seconds": {"96": 0.1}, "bytes": {}, "compiled": t} for t in tried}
    write_json(path, whole)
    assert _known(path) == whole

"""One warm worker of a real Ray: a trial leaves nothing behind that the next one could notice."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from ray.tune import PlacementGroupFactory
from ray.tune.schedulers import FIFOScheduler

from carmodels.data.dataset import Splits
from carmodels.models.weights import Weights
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.features import FeatureStore
from carmodels.training.run import Run
from carmodels.training.trainer import fit
from tune.optim.searcher import QueueSearcher
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Workers
from tune.runtime.runner import run_trials

pytestmark = pytest.mark.ray
pytestmark = pytest.mark.usefixtures("own_ray")


class Watching(FIFOScheduler):
    """Notes which worker each epoch was trained in, by the strategy of its trial."""

    def __init__(self) -> None:
        super().__init__()
        self.workers: list[tuple[str, int]] = []

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self.workers.append((trial.config["config"]["unfreeze"], result["pid"]))
        return super().on_trial_result(tune_controller, trial, result)


@pytest.fixture
def job(splits: Splits, weights: Weights, tmp_path: Path) -> Job:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [])
    return Job(study, splits, weights, Workers(1, 1, 0.0), tmp_path / "cache")


def train(job: Job, runs: list[Run], cpus: dict[str, int]) -> tuple[Watching, list[dict[str, Any]]]:
    """The workers of the runs, and every trial's last line of trials.jsonl; `cpus` by strategy."""

    def packing(values: dict[str, Any]) -> PlacementGroupFactory:
        return PlacementGroupFactory([{"CPU": cpus[values["config"]["unfreeze"]]}])

    seen = Watching()
    assert run_trials(
        job,
        stage="search",
        begun=time.time(),
        end=math.inf,
        search_alg=QueueSearcher(runs, metric="accuracy", mode="max"),
        scheduler=seen,
        roles={},
        watch=ProgressCallback(),
        packing=packing if cpus else None,
    )
    lines = [json.loads(line) for line in job.study.trials_file.read_text().splitlines()]
    return seen, [line for line in lines if line["state"] != "running"]


def numbers(curve: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """A learning curve without the time it took."""
    return [(e["epoch"], e["train_loss"], e["val_loss"], e["val_accuracy"]) for e in curve]


def test_a_then_b_then_a_again_in_one_worker_gives_as_numbers_to_the_bit(
    job: Job, config: TrialConfig
) -> None:
    first = Run(replace(config, head_depth=1, augment="color", unfreeze="head_first", epochs=3))
    changed = replace(config, backbone="test_efficientnet", image_size=48, mixup=0.2, ema=0.9)
    other = Run(changed).with_origin(seed=3)
    seen, trials = train(job, [first, other, first], cpus={})
    assert len({worker for _, worker in seen.workers}) == 1, "the trials did not share a worker"
    a, b, again = (numbers(trial["curve"]) for trial in trials)
    assert a == again != b
    alone = fit(first, job.splits, weights=job.weights, features=FeatureStore(job.cache / "features"))
    assert numbers([asdict(metrics) for metrics in alone.history]) == a


def test_trials_that_ask_for_different_shares_each_get_theirs(job: Job, config: TrialConfig) -> None:
    shared = replace(job, workers=Workers(1, 2, 0.0, packed=2))
    wide = Run(config)
    narrow = wide.with_config(unfreeze="frozen")
    seen, trials = train(shared, [wide, narrow, narrow], cpus={"full": 2, "frozen": 1})
    assert [trial["state"] for trial in trials] == ["complete"] * 3
    kinds = {kind: {worker for k, worker in seen.workers if k == kind} for kind in ("full", "frozen")}
    assert not kinds["full"] & kinds["frozen"], "a worker is kept for an equal request alone"

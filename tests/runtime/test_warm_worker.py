"""One warm worker of a real Ray: a trial leaves nothing behind that the next one could notice."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from carmodels.data.dataset import Splits
from carmodels.models.weights import Weights
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.features import FeatureStore
from carmodels.training.run import Run
from carmodels.training.trainer import fit
from tune.runtime.job import Job, Workers

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, pickle, sys, time
import ray
from ray.tune import PlacementGroupFactory
from ray.tune.schedulers import FIFOScheduler
from tune.optim.searcher import QueueSearcher
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.runner import run_trials
from tune.runtime.cluster import start_ray

job, runs, cores, cpus = pickle.load(open(sys.argv[1], "rb"))
start_ray(address=None, cores=cores, gpus=0)
workers = []

class Watching(FIFOScheduler):
    def on_trial_result(self, controller, trial, result):
        workers.append([trial.config["config"]["unfreeze"], result["pid"]])
        return super().on_trial_result(controller, trial, result)

def packing(values):
    return PlacementGroupFactory([{"CPU": cpus[values["config"]["unfreeze"]]}])

completed = run_trials(
    job,
    stage="search",
    begun=time.time(),
    end=float("inf"),
    search_alg=QueueSearcher(runs, metric="accuracy", mode="max"),
    scheduler=Watching(),
    roles={},
    watch=ProgressCallback(),
    packing=packing if cpus else None,
)
ray.shutdown()
print(json.dumps({"completed": completed, "workers": workers}))
"""


@pytest.fixture
def job(splits: Splits, weights: Weights, tmp_path: Path) -> Job:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [])
    return Job(study, splits, weights, Workers(1, 1, 0.0), tmp_path / "cache")


def train(job: Job, runs: list[Run], cores: int, cpus: dict[str, int]) -> dict[str, Any]:
    """What the script above prints, with every trial's last line of trials.jsonl."""
    asked = job.study.folder / "asked.pickle"
    asked.write_bytes(pickle.dumps((job, runs, cores, cpus)))
    command = [sys.executable, "-c", SCRIPT, str(asked)]
    found = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=280)
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in job.study.trials_file.read_text().splitlines()]
    ended = [line for line in lines if line["state"] != "running"]
    return {**json.loads(found.stdout.splitlines()[-1]), "trials": ended}


def numbers(curve: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """A learning curve without the time it took."""
    return [(e["epoch"], e["train_loss"], e["val_loss"], e["val_accuracy"]) for e in curve]


def test_a_then_b_then_a_again_in_one_worker_gives_as_numbers_to_the_bit(
    job: Job, config: TrialConfig
) -> None:
    first = Run(replace(config, head_depth=1, augment="color", unfreeze="head_first", epochs=3))
    changed = replace(config, backbone="test_efficientnet", image_size=48, mixup=0.2, ema=0.9)
    other = Run(changed).with_origin(seed=3)
    found = train(job, [first, other, first], cores=1, cpus={})
    assert found["completed"]
    assert len({worker for _, worker in found["workers"]}) == 1, "the trials did not share a worker"
    a, b, again = (numbers(trial["curve"]) for trial in found["trials"])
    assert a == again != b
    alone = fit(first, job.splits, weights=job.weights, features=FeatureStore(job.cache / "features"))
    assert numbers([asdict(metrics) for metrics in alone.history]) == a


def test_trials_that_ask_for_different_shares_each_get_theirs(job: Job, config: TrialConfig) -> None:
    shared = replace(job, workers=Workers(1, 2, 0.0, packed=2))
    wide = Run(config)
    narrow = wide.with_config(unfreeze="frozen")
    found = train(shared, [wide, narrow, narrow], cores=2, cpus={"full": 2, "frozen": 1})
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 3
    kinds = {kind: {worker for k, worker in found["workers"] if k == kind} for kind in ("full", "frozen")}
    assert not kinds["full"] & kinds["frozen"], "a worker is kept for an equal request alone"

"""python tests/benchmarks/bench_overhead.py

The share of a search's core-time that is not spent in epochs of training: 1 - seconds of all epochs /
(workers x wall seconds of the search stage). What is left is starting the workers, building models,
probabilities and weights of finished trials, Ray, Optuna, the table, the measurement of costs, and workers
idle at the end. With --data and --weights also on those images, in the `cpu` preset.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import ray
from platformdirs import user_cache_path

from carmodels.data.dataset import open_dataset
from carmodels.demo.folder import DEMO_WEIGHTS, draw_demo
from carmodels.models.weights import Weights
from carmodels.presets import SPACES
from carmodels.space import Space
from carmodels.study import Study
from carmodels.training.run import Origin
from tune.budget.clock import SEARCH_SHARE, Clock
from tune.commands import run_search
from tune.runtime import search_stage
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.cluster import start_ray
from tune.runtime.job import Job, Workers
from tune.runtime.profiling import costs_of

from table import Row, asked, finish

WORKERS = 2


def main() -> None:
    """Measure every case and write the table."""
    options = asked(
        __doc__,
        lambda p: p.add_argument("--minutes", type=float, default=4.0, help="of search, with --data (4)"),
    )
    if options.data:
        finish("bench_overhead", [on_images(options.data.absolute(), options.weights, options.minutes)])
    else:
        own = Weights.parse(str(DEMO_WEIGHTS))
        drawn = user_cache_path("carmodels") / "demo"
        draw_demo(drawn)
        space = SPACES["demo"]
        seconds = 3600 * run_search.DEMO_HOURS
        row = measure("demo preset", drawn, own, space, trials=space.trials, seconds=seconds)
        finish("bench_overhead", [row])


def on_images(data: Path, source: str, minutes: float) -> Row:
    """A search of so many minutes in the `cpu` preset, at sizes up to 128 px."""
    weights = Weights.parse(source)
    space = SPACES["cpu"].with_override("image_size=64,96,128")
    space = space.with_backbones(tuple(b for b in space.backbones if weights.has(b)))
    whole = 60 * minutes / SEARCH_SHARE
    return measure(f"{data.name}, cpu preset", data, weights, space, trials=None, seconds=whole)


def measure(
    name: str, data: Path, weights: Weights, space: Space, *, trials: int | None, seconds: float
) -> Row:
    """One search, from empty stores of outputs and costs; the image cache is there."""
    splits = open_dataset(data, cache_dir=user_cache_path("carmodels"), max_size=max(space.image_sizes))
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder) / "study")
        study.begin({"metric": "accuracy", "hardware": {}}, [])
        start_ray(address=None, cores=WORKERS, gpus=0)
        job = Job(study, splits, weights, Workers(WORKERS, 1, 0.0), Path(folder) / "cache")
        started = time.time()
        search_stage.search(
            replace(job, costs=costs_of(job, space, print)),
            space,
            origin=Origin(data=splits.fingerprint, split=splits.split_hash),
            trials=trials,
            clock=Clock(started, seconds),
            seed=0,
            watch=ProgressCallback(),
            say=print,
        )
        wall = time.time() - started
        ray.shutdown()
        records = study.records()
    overhead = 1 - sum(r.seconds for r in records) / (WORKERS * wall)
    print(f"{len(records)} trials in {wall:.0f} s")
    return Row(name, overhead, "", "", 0.10, 1, "share")


if __name__ == "__main__":
    main()

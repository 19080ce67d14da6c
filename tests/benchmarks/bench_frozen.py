"""python tests/benchmarks/bench_frozen.py

Trials with a frozen backbone, with stored outputs against without: the same configurations and seeds, in
turn, on the demo's images. Ours: the store is full; the first use, which fills it, has a row of its own.
Accuracy is on val, where both keep their best epoch; its difference over the seeds has a 95 % interval (t).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from platformdirs import user_cache_path

from carmodels.data.dataset import Splits, open_dataset
from carmodels.demo.folder import DEMO_WEIGHTS, draw_demo
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig
from carmodels.training.features import FeatureStore
from carmodels.training.run import Origin, Run
from carmodels.training.trainer import TrainResult, fit

from table import Row, as_in_a_worker, finish

CASES = {
    "test_resnet 64 px": TrialConfig("test_resnet", image_size=64, epochs=8, unfreeze="frozen", lr=5e-3),
    "test_efficientnet 96 px": TrialConfig(
        "test_efficientnet", image_size=96, epochs=8, unfreeze="frozen", lr=5e-3, head_depth=1
    ),
}


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="runs of each configuration, each with its own seed"
    )
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    weights = Weights.parse(str(DEMO_WEIGHTS))
    data = user_cache_path("carmodels") / "demo"
    draw_demo(data)
    splits = open_dataset(data, cache_dir=user_cache_path("carmodels"), max_size=96)
    rows: list[Row] = []
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            runs = [Run(config, Origin(seed=seed)) for seed in seeds]
            rows += compare(name, runs, splits, weights, Path(folder))
    finish("bench_frozen", rows)


def compare(name: str, runs: list[Run], splits: Splits, weights: Weights, folder: Path) -> list[Row]:
    """Seconds of all epochs, and accuracy, of one configuration over its seeds."""
    store = FeatureStore(folder)
    first = seconds(fit(runs[0], splits, weights=weights, features=store))
    ours: list[TrainResult] = []
    theirs: list[TrainResult] = []
    for run in runs:
        theirs.append(fit(run, splits, weights=weights))
        ours.append(fit(run, splits, weights=weights, features=store))
    with_store, without = ([seconds(f) for f in side] for side in (ours, theirs))
    gained = np.array([o.best.value - t.best.value for o, t in zip(ours, theirs, strict=True)])
    half = scipy.stats.t.ppf(0.975, len(gained) - 1) * gained.std(ddof=1) / len(gained) ** 0.5
    n = len(runs)
    means = [float(np.mean([f.best.value for f in side])) for side in (ours, theirs)]
    ratio = float(np.median(np.array(without) / np.array(with_store)))
    difference = f"{gained.mean():+.4f} ± {half:.4f}"
    return [
        Row(
            f"{name}: 8 frozen epochs",
            *map(float, (np.median(with_store), np.median(without), ratio)),
            10.0,
            n,
            "s",
        ),
        Row(
            f"{name}: first use",
            first,
            float(np.median(without)),
            float(np.median(without)) / first,
            "",
            1,
            "s",
        ),
        Row(f"{name}: val accuracy, ours - theirs", *means, difference, "0 within the interval", n, "share"),
    ]


def seconds(result: TrainResult) -> float:
    """Of all its epochs, training and validation."""
    return sum(epoch.seconds for epoch in result.history)


if __name__ == "__main__":
    as_in_a_worker()
    main()

"""python tests/benchmarks/bench_scale.py

What grows with what: seconds to decode and to open a data set with its images, memory of a further worker
with its images, seconds the driver spends on a trial with the trials before it. `ours` is at the largest
number, `theirs` at the smallest, `ratio` the one over the other.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import cv2
import numpy as np
import optuna

from carmodels.catalog import AUGMENTS
from carmodels.data.dataset import Splits, open_dataset
from carmodels.data.loader import Loader
from carmodels.presets import SPACES
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run
from tune.optim.optuna_records import suggest
from tune.optim.searcher import OptunaSearcher

from table import Row, finish

IMAGES = (500, 8000)
TRIALS = (20, 500)
WORKERS = 3
SIZE = 96


def main() -> None:
    """Measure every case and write the table."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        found = [images(Path(folder), count) for count in IMAGES]
        rows += [
            grown("seconds to decode 1,000 images", IMAGES, [f["decode"] for f in found], "", "s"),
            grown("seconds to open it again, an image", IMAGES, [f["open"] for f in found], "", "s"),
            grown("memory of a further worker", IMAGES, [f["further"] for f in found], 1.1, "MiB"),
            grown("decoded images on disk", IMAGES, [f["disk"] for f in found], "", "MiB"),
        ]
        spent = [driver(Path(folder) / f"trials{count}", count) for count in TRIALS]
        rows.append(grown("seconds of the driver for a trial", TRIALS, spent, "", "s"))
    finish("bench_scale", rows)


def grown(name: str, counts: tuple[int, ...], values: list[float], target: float | str, unit: str) -> Row:
    """The value at the largest number beside that at the smallest."""
    return Row(
        f"{name}, at {counts[-1]:,} and {counts[0]:,}",
        values[-1],
        values[0],
        values[-1] / values[0],
        target,
        1,
        unit,
    )


def images(folder: Path, count: int) -> dict[str, float]:
    """What a data set of `count` images of 320 x 240 costs."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        path = folder / f"{count}" / "train" / f"{number % 10}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.resize(coarse, (320, 240), interpolation=cv2.INTER_CUBIC))
    cache = folder / f"cache{count}"
    started = time.monotonic()
    open_dataset(folder / f"{count}", cache_dir=cache, max_size=SIZE)
    built = time.monotonic()
    splits = open_dataset(folder / f"{count}", cache_dir=cache, max_size=SIZE)
    opened = time.monotonic()
    disk = sum(path.stat().st_size for path in (cache / "images").rglob("*") if path.is_file())
    return {
        "decode": 1000 * (built - started) / count,
        "open": (opened - built) / count,
        "further": further_worker(splits),
        "disk": disk / 2**20,
    }


def further_worker(splits: Splits) -> float:
    """MiB that the last of a few workers has to itself, each having shown itself every image of train."""
    context = multiprocessing.get_context("spawn")
    shown, end = context.Barrier(WORKERS + 1), context.Event()
    workers = [context.Process(target=worker, args=(splits, shown, end)) for _ in range(WORKERS)]
    for process in workers:
        process.start()
    shown.wait()
    private = [_private(process.pid) for process in workers]
    end.set()
    for process in workers:
        process.join()
    return float(np.median(private))


def worker(splits: Splits, shown: Barrier, end: Event) -> None:
    """Looks at all of train once, then waits to be measured."""
    loader = Loader(
        splits.images, splits.train, image_size=SIZE, batch_size=32, augment=AUGMENTS["crop"], shuffle=True
    )
    for _ in loader.epoch(1):
        pass
    shown.wait()
    end.wait()


def _private(pid: int | None) -> float:
    """MiB of a process that no other shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def driver(folder: Path, count: int) -> float:
    """Seconds to draw a configuration, write a record and the table, with `count` trials there already."""
    rng = np.random.default_rng(0)
    drawing = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study = Study(folder)
    study.begin({"metric": "accuracy"}, [])
    records = [_record(drawing, rng) for _ in range(count)]
    for record in records:
        study.append(record)
    draws = OptunaSearcher(
        SPACES["cpu"],
        origin=Origin(),
        metric="accuracy",
        mode="max",
        seed=0,
        limit=None,
        fits=lambda config: True,
        known=records,
    )
    started, rounds = time.monotonic(), 5
    for number in range(rounds):
        assert isinstance(draws.suggest(f"t{number}"), dict)
        study.append(_record(drawing, rng))
        study.write_table()
        study.keep_weights(12)
    return (time.monotonic() - started) / rounds


def _record(drawing: optuna.Study, rng: np.random.Generator) -> TrialRecord:
    run = Run(TrialConfig.from_dict(suggest(drawing.ask(), SPACES["cpu"])))
    curve = tuple(EpochMetrics(n, 1.0, 1.0, v, v, 1.0) for n, v in enumerate(rng.random(8).tolist(), start=1))
    best = max(e.value for e in curve)
    return TrialRecord(run.id, run.config, State.COMPLETE, 8, best, 8.0, "ran its 8 epochs", curve=curve)


if __name__ == "__main__":
    main()

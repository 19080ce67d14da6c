"""python tests/benchmarks/collect_curves.py --data ../shared/data/cars9 --weights ../shared/weights

Whole learning curves of a quasi-random design over the `cpu` preset (64 to 128 px), nothing stopped early,
for comparing searchers and schedulers on. Appends to results/curves/<data>-cpu.csv; run again, it goes on
where it was, unless the preset has changed. Seconds are CPU time of one core, less what filling the store of
frozen outputs took, which is in a file of its own, a line for each view of train.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import numpy as np
import torch
from platformdirs import user_cache_path
from scipy.stats import qmc

from carmodels.data.dataset import Splits, open_dataset
from carmodels.files import append_line
from carmodels.models.weights import Weights
from carmodels.presets import SPACES
from carmodels.space import Space
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.features import FeatureStore
from carmodels.training.run import Origin, Run
from carmodels.training.trainer import fit
from tune.optim.optuna_records import suggest

from table import as_in_a_worker

FOLDER = Path(__file__).parents[2] / "results" / "curves"
SIZES = "image_size=64,96,128"
REPEATED, SEEDS = 12, 3  # so many configurations of the design are trained from so many seeds
CURVE = ("config_id", "seed", "epoch", "val_accuracy", "val_loss", "seconds")
FILL = ("backbone", "image_size", "seconds")


def main() -> None:
    """Train what is not there yet, in the order of the design."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--configs", type=int, default=160, help="of the design (160)")
    parser.add_argument("--workers", type=int, default=2, help="processes, a core each (2)")
    options = parser.parse_args()
    weights = Weights.parse(options.weights)
    space = curve_space(weights)
    splits = open_dataset(
        options.data, cache_dir=user_cache_path("carmodels"), max_size=max(space.image_sizes)
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    curves = FOLDER / f"{options.data.name}-cpu.csv"
    configs = design(space, options.configs)
    write_configs(curves.with_name(f"{curves.stem}-configs.csv"), configs)
    done = finished(curves, epochs=int(space.fixed["epochs"]))
    jobs = [job for job in planned(configs) if job not in done]
    print(f"{len(done)} curves are there, {len(jobs)} to go", flush=True)
    train = partial(
        run, splits=splits, weights=weights, folder=user_cache_path("carmodels") / "features", curves=curves
    )
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for line in pool.map(train, [(configs[number], number, seed) for number, seed in jobs]):
            print(line, flush=True)


def curve_space(weights: Weights) -> Space:
    """The `cpu` preset with the backbones there are weights for, at sizes that two cores can afford."""
    space = SPACES["cpu"].with_override(SIZES)
    return space.with_backbones(tuple(b for b in space.backbones if weights.has(b)))


class _Point:
    """A point of the unit cube that draws as an Optuna trial does: one coordinate for each dimension."""

    def __init__(self, coordinates: dict[str, float]) -> None:
        self._coordinates = coordinates

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return choices[int(self._coordinates[name] * len(choices))]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        share = self._coordinates[name]
        value = low * (high / low) ** share if log else low + (high - low) * share
        return float(f"{value:.4g}")


def design(space: Space, count: int) -> list[TrialConfig]:
    """The first `count` points of a scrambled Sobol sequence over the space; any prefix is spread evenly."""
    sequence = qmc.Sobol(d=len(space.dimensions), rng=np.random.default_rng(0))
    points = sequence.random(2 ** int(np.ceil(np.log2(max(count, 2)))))[:count]
    names = list(space.dimensions)
    return [
        TrialConfig.from_dict(suggest(_Point(dict(zip(names, point, strict=True))), space))
        for point in points.tolist()
    ]


def planned(configs: Sequence[TrialConfig]) -> Iterator[tuple[int, int]]:
    """(number in the design, seed), in the order of training: repeats of the first ones come early."""
    for number in range(len(configs)):
        yield number, 0
        if number == REPEATED - 1:
            yield from ((again, seed) for again in range(REPEATED) for seed in range(1, SEEDS))


def write_configs(path: Path, configs: Sequence[TrialConfig]) -> None:
    """One row a configuration: its number in the design, and every field.

    Exits if the file holds another design: its curves would be taken for those of this one.
    """
    rows = [{"config_id": number, **asdict(config)} for number, config in enumerate(configs)]
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            before = [row["backbone"] + row["lr"] for row in csv.DictReader(file)]
        if any(f"{row['backbone']}{row['lr']}" != old for row, old in zip(rows, before, strict=False)):
            sys.exit(f"{path} holds the design of another space; move the three files away to begin anew")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def finished(curves: Path, epochs: int) -> set[tuple[int, int]]:
    """(number, seed) of the curves that are whole; ones that a kill cut short are trained again."""
    if not curves.is_file():
        append_line(curves, ",".join(CURVE))
        append_line(curves.with_name(f"{curves.stem}-fills.csv"), ",".join(FILL))
    with curves.open(newline="", encoding="utf-8") as file:
        return {
            (int(row["config_id"]), int(row["seed"]))
            for row in csv.DictReader(file)
            if int(row["epoch"]) == epochs
        }


class _TimedStore(FeatureStore):
    """Keeps count of the CPU seconds that filling took."""

    def __init__(self, folder: Path, on_fill: Callable[[int, float], None]) -> None:
        super().__init__(folder)
        object.__setattr__(self, "_on_fill", on_fill)

    def get(self, content: dict[str, Any], rows: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        def timed() -> np.ndarray:
            started = time.process_time()
            found = compute()
            self._on_fill(rows, time.process_time() - started)  # type: ignore[attr-defined]
            return found

        return super().get(content, rows, timed)


def run(
    job: tuple[TrialConfig, int, int], splits: Splits, weights: Weights, folder: Path, curves: Path
) -> str:
    """Train one curve and append it, all its epochs in one write."""
    config, number, seed = job
    torch.set_num_threads(1)
    seconds: list[float] = []
    filling, fills = [0.0], []
    clock = [time.process_time()]

    def on_fill(rows: int, taken: float) -> None:
        filling[0] += taken
        if rows == len(splits.train):
            fills.append(f"{config.backbone},{config.image_size},{taken:.2f}")

    def on_epoch(metrics: EpochMetrics) -> None:
        now = time.process_time()
        seconds.append(now - clock[0] - filling[0])
        clock[0], filling[0] = now, 0.0

    origin = Origin(seed=seed, data=splits.fingerprint, split=splits.split_hash)
    store = _TimedStore(folder, on_fill)
    result = fit(Run(config, origin), splits, weights=weights, features=store, on_epoch=on_epoch)
    lines = [
        f"{number},{seed},{e.epoch},{e.val_accuracy:.5f},{e.val_loss:.5f},{taken:.2f}"
        for e, taken in zip(result.history, seconds, strict=True)
    ]
    for line in fills:
        append_line(curves.with_name(f"{curves.stem}-fills.csv"), line)
    with curves.open("a", encoding="utf-8") as file:  # one write: a curve is there whole or not at all
        file.write("".join(f"{line}\n" for line in lines))
    best = max(e.val_accuracy for e in result.history)
    return f"{number:>4} seed {seed}  {best:.4f}  {sum(seconds):6.0f} s  {config.title} lr {config.lr:g}"


if __name__ == "__main__":
    as_in_a_worker()
    main()

"""python tests/benchmarks/bench_trials.py

Trials an hour: the workers of a search against the training function of Ray's own tutorials (`tutorial.py`),
both through Ray Tune on the same cores, on the same list of configurations, stopped at the same epochs, on
the same images of train and val. Ours finds them decoded: that takes its time once for a data set, and is
not in here. Then ours with one thing taken away at a time, which says where the gain is from. With --data and
--weights also on those images, in the `cpu` preset, else on the demo's alone.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from carmodels.demo.folder import DEMO_WEIGHTS, draw_demo

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import cv2
import joblib
import numpy as np
import ray
import torch
import tutorial
from platformdirs import user_cache_path
from ray.tune import CheckpointConfig, RunConfig, TuneConfig, Tuner, with_parameters, with_resources
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from carmodels.data.dataset import Splits, open_dataset
from carmodels.models.classifier import Classifier
from carmodels.models.weights import Weights
from carmodels.presets import SPACES
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.run import Origin, Run
from tune.optim.searcher import QueueSearcher
from tune.runtime import runner, worker
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.cluster import start_ray
from tune.runtime.environment import MALLOC
from tune.runtime.job import Job, Workers
from tune.runtime.runner import run_trials

from table import Row, asked, finish

WORKERS, EPOCHS = 2, 8
STOPS = (1, 2, 1, 4, 1, 2, 1, 8)  # epochs of eight configurations: rungs at 1, 2 and 4, half stop at each
SHARED = {"optimizer": "adam", "augment": "color"}  # what the tutorial does


@dataclass(frozen=True)
class Case:
    """One list of configurations on one set of images."""

    name: str
    preset: str
    data: Path
    weights: str
    sizes: tuple[int, ...]
    configs: int
    runs: int
    target: float
    backbones: tuple[str, ...] = ()  # those of the preset that there are weights for, where none are named
    gpus: int = 0


def main() -> None:
    """Measure every case and write the table."""
    options = asked(
        __doc__, lambda p: p.add_argument("--runs", type=int, default=2, help="of both sides, in turn (2)")
    )
    own = str(DEMO_WEIGHTS)
    drawn = user_cache_path("carmodels") / "demo"
    draw_demo(drawn)
    if options.data:
        data, sizes = options.data.absolute(), (64, 96, 128)
        case = Case(f"{data.name}, cpu preset", "cpu", data, options.weights, sizes, 8, options.runs, 1.5)
    else:
        case = Case("demo preset", "demo", drawn, own, (32, 48, 64, 96), 24, options.runs, 3.0)
    finish("bench_trials", compare(case, causes=not options.data))


def compare(case: Case, causes: bool = True) -> list[Row]:
    """Both sides in turn, then, for the causes, ours with one thing less at a time."""
    workers = Workers(1, max(1, joblib.cpu_count()), 1.0) if case.gpus else Workers(WORKERS, 1, 0.0)
    weights = Weights.parse(case.weights)
    splits = open_dataset(case.data, cache_dir=user_cache_path("carmodels"), max_size=max(case.sizes))
    runs = drawn(case, splits, weights)
    stops = {run.id: stop for run, stop in zip(runs, stopped_at(len(runs)), strict=True)}
    files = by_row(case.data, splits)
    images = {
        part.name: ([files[row] for row in part.rows.tolist()], part.labels.tolist())
        for part in (splits.train, splits.val)
    }
    less: dict[str, dict[str, Any]] = {
        "decoding each time": {"splits": replace(splits, images=Afresh(files))},
        "without stored outputs": {"trainable": without_store},
        "with a fresh actor each": {"reuse_actors": False},
        "giving memory back": {"environment": {}},
        "without channels last": {"trainable": without_channels_last},
    }
    ours, theirs = [], []
    for _ in range(case.runs):
        theirs.append(run_theirs(runs, stops, images, weights, workers))
        ours.append(run_ours(runs, stops, splits, weights, workers))
    hourly = [3600 * len(runs) / float(np.median(seconds)) for seconds in (ours, theirs)]
    ratio = float(np.median(np.array(theirs) / np.array(ours)))
    rows = [Row(f"{case.name}, {len(runs)} trials", *hourly, ratio, case.target, case.runs, "trials/h")]
    for name, changed in less.items() if causes else ():
        seconds = run_ours(runs, stops, weights=weights, workers=workers, **{"splits": splits, **changed})
        hourly_less = 3600 * len(runs) / seconds
        rows.append(
            Row(
                f"{case.name}: ours {name}",
                hourly_less,
                hourly[1],
                hourly_less / hourly[1],
                "",
                1,
                "trials/h",
            )
        )
    return rows


def drawn(case: Case, splits: Splits, weights: Weights) -> list[Run]:
    """Runs with every backbone, size and strategy about equally often."""
    rng = np.random.default_rng(0)
    space = SPACES[case.preset]
    backbones = case.backbones or [b for b in space.backbones if weights.has(b)]

    def evenly(options: Sequence[Any]) -> list[Any]:
        return [options[n % len(options)] for n in rng.permutation(case.configs)]

    columns = zip(
        evenly(backbones),
        evenly(case.sizes),
        evenly((0, 1, 2)),
        evenly(("frozen", "full", "head_first", "gradual")),
        (10 ** rng.uniform(-4, -2, case.configs)).round(6).tolist(),
        strict=True,
    )
    origin = Origin(data=splits.fingerprint, split=splits.split_hash)
    configs = (
        TrialConfig(
            backbone=backbone,
            image_size=size,
            epochs=EPOCHS,
            head_depth=depth,
            unfreeze=unfreeze,
            lr=lr,
            **SHARED,
        )
        for backbone, size, depth, unfreeze, lr in columns
    )
    return [Run(config, origin) for config in configs]


def stopped_at(count: int) -> list[int]:
    """The epoch at which each configuration stops: half at every rung, as the tutorial's ASHA does."""
    return [STOPS[n % len(STOPS)] for n in np.random.default_rng(1).permutation(count)]


class StopAt(FIFOScheduler):
    """Stops each trial after the epoch that the table says, whoever reports it."""

    def __init__(self, stops: dict[str, int]) -> None:
        super().__init__()
        self._last = stops

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        stop = self._last[trial.config.get("run_id") or Run.from_dict(trial.config).id]
        ends_itself = result.get("state") or result["epoch"] == EPOCHS
        stops = result["epoch"] >= stop and not ends_itself
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE


class Listed(Searcher):
    """Hands out dictionaries, then ends."""

    def __init__(self, configs: Sequence[dict[str, Any]]) -> None:
        super().__init__(metric="val_accuracy", mode="max")
        self._configs = list(configs)

    def suggest(self, trial_id: str) -> Any:
        return self._configs.pop(0) if self._configs else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        assert not error, "a trial of the tutorial's failed"


@contextmanager
def ray_here(environment: dict[str, str], workers: Workers) -> Iterator[None]:
    """A Ray of our own whose workers see these variables of the C library's, and no others of them."""
    kept = {name: os.environ.pop(name) for name in MALLOC if name in os.environ}
    os.environ.update(environment)
    start_ray(address=None, cores=workers.count * workers.cpus, gpus=int(workers.gpus))
    try:
        yield
    finally:
        ray.shutdown()
        for name in environment:
            os.environ.pop(name)
        os.environ.update(kept)


def run_theirs(
    runs: Sequence[Run],
    stops: dict[str, int],
    images: dict[str, tutorial.Images],
    weights: Weights,
    workers: Workers,
) -> float:
    """Seconds for all configurations."""
    listed = [
        {
            "run_id": run.id,
            "backbone": run.config.backbone,
            "size": run.config.image_size,
            "head_depth": run.config.head_depth,
            "lr": run.config.lr,
            "unfreeze": run.config.unfreeze,
        }
        for run in runs
    ]
    function = with_parameters(tutorial.train, images=images, weights=weights.source, epochs=EPOCHS)
    with tempfile.TemporaryDirectory() as folder, ray_here({}, workers):
        started = time.monotonic()
        results = Tuner(
            with_resources(function, {"cpu": workers.cpus, "gpu": workers.gpus}),
            tune_config=TuneConfig(
                metric="val_accuracy",
                mode="max",
                search_alg=Listed(listed),
                scheduler=StopAt(stops),
                num_samples=-1,
                max_concurrent_trials=workers.count,
            ),
            run_config=RunConfig(
                storage_path=folder,
                verbose=0,
                checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="val_accuracy"),
            ),
        ).fit()
        seconds = time.monotonic() - started
        ran = {r.config["run_id"]: r.metrics["epoch"] for r in results}
    assert ran == stops, "the tutorial's trials did not stop where they should"
    return seconds


def run_ours(
    runs: Sequence[Run],
    stops: dict[str, int],
    splits: Splits,
    weights: Weights,
    workers: Workers,
    environment: dict[str, str] = MALLOC,
    trainable: Callable[[dict[str, Any], Job], None] = worker.train_trial,
    reuse_actors: bool = True,
) -> float:
    """Seconds for all configurations, from an empty store of frozen outputs."""
    own = worker.train_trial, runner.TuneConfig
    worker.train_trial = trainable
    runner.TuneConfig = lambda **options: own[1](**{**options, "reuse_actors": reuse_actors})
    with tempfile.TemporaryDirectory() as folder, ray_here(environment, workers):
        study = Study(Path(folder) / "study")
        study.begin({"metric": "accuracy"}, [])
        job = Job(study, splits, weights, workers, Path(folder) / "cache")
        started = time.monotonic()
        run_trials(
            job,
            stage="search",
            begun=time.time(),
            end=float("inf"),
            search_alg=QueueSearcher(runs, metric="accuracy", mode="max"),
            scheduler=StopAt(stops),
            roles={},
            watch=ProgressCallback(),
        )
        seconds = time.monotonic() - started
        ran = {r.trial_id: r.epochs_run for r in study.records()}
    worker.train_trial, runner.TuneConfig = own
    assert ran == stops, f"our trials did not stop where they should: {ran} instead of {stops}"
    return seconds


# ---- ours with one thing less


class Afresh:
    """In the place of the image cache: every image decoded from its file each time."""

    def __init__(self, files: dict[int, str]) -> None:
        self._files = files

    def __getitem__(self, row: int) -> np.ndarray:
        return cv2.cvtColor(cv2.imread(self._files[int(row)]), cv2.COLOR_BGR2RGB)


def by_row(data: Path, splits: Splits) -> dict[int, str]:
    """The file of every row of the cache."""
    files = {path.name: str(path) for path in data.rglob("*.*")}
    return {
        int(row): files[Path(name).name]
        for part in (splits.train, splits.val, splits.holdout, splits.test)
        for name, row in zip(part.ids, part.rows, strict=True)
    }


def without_store(values: dict[str, Any], job: Job) -> None:
    """Runs in a worker: frozen epochs run the backbone, as all others."""
    own = worker.fit
    worker.fit = lambda *given, **options: own(*given, **{**options, "features": None})
    try:
        worker.train_trial(values, job)
    finally:
        worker.fit = own


def without_channels_last(values: dict[str, Any], job: Job) -> None:
    """Runs in a worker: images and weights lie channel by channel in memory."""
    own, normalise = torch.channels_last, Classifier.normalise
    torch.channels_last = torch.contiguous_format
    Classifier.normalise = lambda self, images: normalise(self, images).contiguous()
    try:
        worker.train_trial(values, job)
    finally:
        torch.channels_last, Classifier.normalise = own, normalise


if __name__ == "__main__":
    main()

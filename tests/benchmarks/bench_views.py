"""python tests/benchmarks/bench_views.py --data ../shared/data/cars9 --weights ../shared/weights

What test-time views are worth, on out-of-fold predictions over all labelled images: one configuration,
fixed beforehand, is trained from several seeds over several folds (near-duplicates together; a tenth of what
is learnt from chooses the epoch), and every model is shown the images through every row of VIEWS, and
through ten random flips and shifts as in the baseline. The rows are gains over the plain view, in
points of accuracy and in nats of log loss, with 95 % intervals (paired bootstrap over images, seeds
together), for single models and for the mean of the seeds' models. It goes on where it was: probabilities are
in results/final/predictions.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_path
from sklearn.model_selection import StratifiedGroupKFold

from carmodels.catalog import AUGMENTS, VIEWS
from carmodels.data.dataset import Splits, open_dataset
from carmodels.data.loader import Loader
from carmodels.data.splits import Split
from carmodels.demo.folder import DEMO_WEIGHTS, draw_demo
from carmodels.ensembling.selection import choose_views
from carmodels.evaluation.metrics import log_loss
from carmodels.evaluation.nested import nested_check
from carmodels.evaluation.predictions import Predictions
from carmodels.models.classifier import Classifier
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig
from carmodels.training.forward import predict
from carmodels.training.run import Origin, Run
from carmodels.training.trainer import fit

from table import FOLDER, as_in_a_worker, asked, processor

PLACE = FOLDER.parent / "final"
CONFIG = TrialConfig("mobilenetv2_035", image_size=96, epochs=8, lr=5e-3, lr_ratio=0.0168)
DEMO_CONFIG = replace(CONFIG, backbone="test_resnet", image_size=48)
RANDOM = tuple(f"random_{n}" for n in range(10))  # views of the baseline
MOST = 4  # views that a choice may keep, the plain one included
VAL = 0.15  # of the images, that a study chooses by
DRAWS = 60  # of such a val
SETS: dict[str, tuple[str, ...]] = {
    "flip": ("plain", "flip"),
    "flip and larger": ("plain", "flip", "larger", "larger_flip"),
    "three sizes": ("plain", "larger", "smaller"),
    "five crops": ("centre", "top_left", "top_right", "bottom_left", "bottom_right"),
    "plain and five crops": ("plain", "centre", "top_left", "top_right", "bottom_left", "bottom_right"),
    "colours": ("plain", "brighter", "darker", "more_contrast", "less_contrast"),
    "all": tuple(VIEWS),
    "the competitor's ten random flips and shifts": RANDOM,
}


@dataclass(frozen=True)
class Gain:
    """A row of the table."""

    case: str
    views: str
    accuracy: float  # percent, of the plain view
    points: float
    low: float
    high: float
    nats: float  # > 0: a lower log loss
    nats_low: float
    nats_high: float
    set_right: float  # images a model
    set_wrong: float
    note: str = ""


def main() -> None:
    """Train and show what is missing, judge, write the table."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each fold (3)")
        parser.add_argument("--folds", type=int, default=3, metavar="K", help="folds (3)")

    options = asked(__doc__, add)
    cache = user_cache_path("carmodels")
    config, data = (CONFIG, options.data) if options.data else (DEMO_CONFIG, cache / "demo")
    if not options.data:
        draw_demo(data)
    weights = Weights.parse(options.weights or str(DEMO_WEIGHTS))
    splits = open_dataset(data, cache_dir=cache, max_size=128)
    everything = joined(splits)
    torch.set_num_threads(1)
    (PLACE / "predictions").mkdir(parents=True, exist_ok=True)
    shown = [
        out_of_fold(Run(config, Origin(seed=seed)), splits, everything, weights, options.folds)
        for seed in range(options.seeds)
    ]
    stacks = {view: np.stack([one[view] for one in shown]) for view in (*VIEWS, *RANDOM)}
    labels = everything.labels
    assert labels is not None
    together = {view: stack.mean(axis=0, keepdims=True) for view, stack in stacks.items()}
    rows = list(judged("single models", stacks, labels))
    rows += judged(f"mean of {options.seeds} models", together, labels)
    case = options.data.name if options.data else "demo"
    write(PLACE / f"views{'' if options.data else '-demo'}.csv", rows, case, config, options)


def joined(splits: Splits) -> Split:
    """All labelled images."""
    parts = (splits.train, splits.val, splits.holdout)
    labels = np.concatenate([part.labels for part in parts if part.labels is not None])
    ids = tuple(name for part in parts for name in part.ids)
    return Split("all", ids, labels, np.concatenate([part.rows for part in parts]))


def out_of_fold(
    run: Run, splits: Splits, everything: Split, weights: Weights, folds: int
) -> dict[str, np.ndarray]:
    """(N, C) for each view: every image is shown to the model that has not learnt from its fold."""
    found: dict[str, list[Predictions]] = {view: [] for view in (*VIEWS, *RANDOM)}
    for fold, (learns, held_out) in enumerate(halved(everything, splits, folds, run.origin.seed)):
        paths = {
            view: PLACE / "predictions" / f"views-{run.id}-{splits.fingerprint}-{fold}of{folds}.{view}.npz"
            for view in found
        }
        missing = [view for view, path in paths.items() if not path.is_file()]
        images = part(everything, held_out, "held out")
        if missing:
            started = time.monotonic()
            model = trained(run, splits, part(everything, learns, "train"), weights)
            for view in missing:
                shown_to(model, splits, images, run, view).save(paths[view])
            print(f"seed {run.origin.seed}, fold {fold}: {time.monotonic() - started:.0f} s", flush=True)
        for view, path in paths.items():
            found[view].append(Predictions.load(path).aligned(images.ids))
    return {view: joined_rows(parts, everything.ids) for view, parts in found.items()}


def halved(images: Split, splits: Splits, folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions to learn from and positions held out, fold by fold."""
    folder = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    yield from folder.split(images.rows, images.labels, splits.images.groups[images.rows])


def trained(run: Run, splits: Splits, images: Split, weights: Weights) -> Classifier:
    """A model that learns from nine tenths of the images and takes its epoch by the rest."""
    learns, val = next(halved(images, splits, 10, run.origin.seed))
    inner = replace(splits, train=part(images, learns, "train"), val=part(images, val, "val"))
    return fit(run, inner, weights=weights).model


def part(split: Split, chosen: np.ndarray, name: str) -> Split:
    """The images at these positions."""
    assert split.labels is not None
    ids = tuple(split.ids[n] for n in chosen.tolist())
    return Split(name, ids, split.labels[chosen], split.rows[chosen])


def shown_to(model: Classifier, splits: Splits, images: Split, run: Run, view: str) -> Predictions:
    """What a model says of the images, seen through a row of VIEWS or varied at random."""
    if view in VIEWS:
        return predict(model, splits, images, config=run.config, view=view)
    loader = Loader(
        splits.images,
        images,
        image_size=run.config.image_size,
        batch_size=64,
        augment=AUGMENTS["shift"],
        seed=run.origin.seed,
    )
    model.eval()
    with torch.inference_mode():
        parts = [model(batch.images).softmax(dim=1) for batch in loader.epoch(RANDOM.index(view))]
    return Predictions(images.ids, splits.classes, torch.cat(parts).numpy())


def joined_rows(parts: Sequence[Predictions], ids: Sequence[str]) -> np.ndarray:
    """(N, C) in the order of the ids, which each are in one part."""
    names = tuple(name for one in parts for name in one.ids)
    probs = np.concatenate([one.probs for one in parts])
    return Predictions(names, parts[0].classes, probs).aligned(ids).probs


def judged(case: str, stacks: Mapping[str, np.ndarray], labels: np.ndarray) -> Iterator[Gain]:
    """The rows of one case; stacks: (S, N, C) for each view, a model or a mean of models each."""
    plain = stacks["plain"]
    for view in VIEWS:
        if view != "plain":
            yield gain(case, f"{view} alone", plain, stacks[view], labels)
            yield gain(case, f"plain, {view}", plain, mean(stacks, ("plain", view)), labels)
    for name, views in SETS.items():
        yield gain(case, name, plain, mean(stacks, views), labels, ", ".join(views))
    for metric in ("accuracy", "log_loss"):
        chosen = [by_halves(stacks, one, labels, metric) for one in range(len(plain))]
        words = f"greedy by {metric}, each half chosen on the other"
        yield gain(case, words, plain, np.stack(chosen), labels)
    for metric in ("accuracy", "log_loss"):
        for guarded in (False, True):
            yield as_in_a_study(case, stacks, labels, metric, guarded)


def mean(stacks: Mapping[str, np.ndarray], views: Sequence[str]) -> np.ndarray:
    """(S, N, C)"""
    found: np.ndarray = np.mean([stacks[view] for view in views], axis=0)
    return found


def of_one(stacks: Mapping[str, np.ndarray], one: int) -> dict[str, np.ndarray]:
    """(N, C) of one model for each row of VIEWS, the plain one first."""
    return {view: stacks[view][one] for view in VIEWS}


def by_halves(stacks: Mapping[str, np.ndarray], one: int, labels: np.ndarray, metric: str) -> np.ndarray:
    """(N, C): the views of each half of the images are those chosen on the other half."""
    shown = of_one(stacks, one)
    first = np.random.default_rng(one).permutation(len(labels)) % 2 == 0
    found = np.empty_like(shown["plain"])
    for half in (first, ~first):
        views = choose_views(
            {view: probs[half] for view, probs in shown.items()}, labels[half], metric=metric, max_views=MOST
        )
        found[~half] = np.mean([shown[view][~half] for view in views], axis=0)
    return found


def as_in_a_study(
    case: str, stacks: Mapping[str, np.ndarray], labels: np.ndarray, metric: str, guarded: bool
) -> Gain:
    """Views chosen by a metric on a val drawn at random, scored on all other images; mean of many draws.

    Guarded: they are kept only where a nested check of accuracy within val says that choosing them helps. The
    interval is that of single draws, not of their mean.
    """
    found: list[tuple[float, float, bool, float]] = []
    for draw in range(DRAWS):
        shown = of_one(stacks, draw % len(stacks["plain"]))
        val = np.random.default_rng(draw).permutation(len(labels)) < VAL * len(labels)
        views = kept({view: probs[val] for view, probs in shown.items()}, labels[val], metric, guarded)
        probs = np.mean([shown[view][~val] for view in views], axis=0)
        plain, rest = shown["plain"][~val], labels[~val]
        right = [100 * float((p.argmax(1) == rest).mean()) for p in (plain, probs)]
        found.append(
            (right[1] - right[0], log_loss(plain, rest) - log_loss(probs, rest), len(views) > 1, right[0])
        )
    points, nats, used, before = (np.array(column, float) for column in zip(*found, strict=True))
    ends = [float(np.quantile(values, q)) for values in (points, nats) for q in (0.025, 0.975)]
    words = f"greedy by {metric} on a val of 15 %, scored on the rest" + (", nested check" if guarded else "")
    note = f"views kept in {used.mean():.0%} of {DRAWS} draws, worse than plain in {(points < 0).mean():.0%}"
    return Gain(
        case, words, before.mean(), points.mean(), *ends[:2], nats.mean(), *ends[2:], np.nan, np.nan, note
    )


def kept(shown: Mapping[str, np.ndarray], labels: np.ndarray, metric: str, guarded: bool) -> tuple[str, ...]:
    """The views that a study would keep."""

    def choose(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        some = {view: probs[rows] for view, probs in shown.items()}
        views = choose_views(some, labels[rows], metric=metric, max_views=MOST)
        return np.mean([shown[view] for view in views], axis=0), shown["plain"]

    if guarded and not nested_check(choose, labels, metric="accuracy").helps:
        return ("plain",)
    return choose_views(shown, labels, metric=metric, max_views=MOST)


def gain(
    case: str, views: str, plain: np.ndarray, probs: np.ndarray, labels: np.ndarray, note: str = ""
) -> Gain:
    """probs and plain (S, N, C) -> the row; an image's gain is its mean over the S models."""
    was, now = (stack.argmax(axis=2) == labels for stack in (plain, probs))
    points = bootstrapped(100 * (now.astype(float) - was).mean(axis=0))
    nats = bootstrapped((losses(plain, labels) - losses(probs, labels)).mean(axis=0))
    right, wrong = (now & ~was).sum() / len(plain), (was & ~now).sum() / len(plain)
    return Gain(case, views, 100 * was.mean(), *points, *nats, right, wrong, note)


def losses(stack: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(S, N, C) -> (S, N), nats."""
    found: np.ndarray = -np.log(
        np.maximum(stack[:, np.arange(len(labels)), labels], np.finfo(np.float32).eps)
    )
    return found


def bootstrapped(values: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """(N,) -> mean and the ends of its 95 % percentile bootstrap interval."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def write(
    path: Path, rows: Sequence[Gain], case: str, config: TrialConfig, options: argparse.Namespace
) -> None:
    """The table, and on what it was measured, in every row."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "timm", "numpy"))
    on = {
        "data": f"{case}, {options.folds} folds, {options.seeds} seeds",
        "configuration": f"{config.title}, {config.epochs} epochs, lr {config.lr}, {config.augment}",
        "hardware": f"{os.cpu_count()} cores, {processor()}",
        "versions": versions,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Gain.__dataclass_fields__, *on])
        for row in rows:
            cells = [f"{v:.4g}" if isinstance(v, float | np.floating) else v for v in vars(row).values()]
            writer.writerow([*cells, *on.values()])
            print("  ".join(str(cell) for cell in cells))


if __name__ == "__main__":
    as_in_a_worker()
    main()

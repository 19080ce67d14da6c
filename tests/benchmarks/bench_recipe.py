"""nice python tests/benchmarks/bench_recipe.py --data ../shared/data/cars9 --weights ../shared/weights

Whether retraining a trial's winner in another way makes it better: one change each, on out-of-fold
predictions of all labelled images (three folds, so that as many are learnt from as in a study), every seed
with folds of its own, the last epoch's weights. Runs are kept in the cache folder as they end, and not made
again; started twice, it trains on two cores. A row a variant: its gain in accuracy over the one it is held
against, on the seeds that both have, and a 95 % interval from resampling images (the mean over seeds of
each), and how many answers it set right or wrong.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from rich.console import Console
from rich.table import Table as Shown
from torch import nn

from carmodels.catalog import Augment, Step
from carmodels.data.dataset import Splits, open_dataset
from carmodels.data.loader import Loader
from carmodels.data.resplit import merge_into_train
from carmodels.demo.folder import DEMO_WEIGHTS, draw_demo
from carmodels.evaluation.metrics import log_loss
from carmodels.evaluation.predictions import Predictions
from carmodels.files import csv_text, write_atomic
from carmodels.models.classifier import Classifier, save_weights
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig
from carmodels.training.forward import predict
from carmodels.training.held_out import splits_for
from carmodels.training.run import Origin, Run
from carmodels.training.trainer import Trainer

from table import as_in_a_worker, asked, measured_on

FILE = Path(__file__).parents[2] / "results" / "final" / "recipe.csv"
FOLDS = 3
LARGER = {"tested at 1.2 times": 96, "tested at 1.3 times": 104}  # pixels, of test images
TUNED = "tested at 1.3 times, classifier and BatchNorm tuned"
EMA = "moving average"
RESAMPLES = 4000

# What won in results/cars9, as a small backbone that can be trained a hundred times.
BASE = Run(
    TrialConfig(
        "mobilenetv2_035",
        image_size=80,
        epochs=8,
        lr=7.3e-3,
        lr_ratio=0.0046,
        label_smoothing=0.1,
        ema=0.998,
    ),
    Origin(folds=FOLDS, fold=0),
)
DEMO = BASE.with_config(backbone="test_resnet", epochs=2, lr=3e-3)


# What wins where there is little time, and the same with the layer decay of the base.
FROZEN = {"image_size": 128, "unfreeze": "frozen", "lr": 1.5e-2, "head_depth": 1, "augment": "shift"}
OPENED = {**FROZEN, "unfreeze": "full"}


@dataclass(frozen=True)
class Variant:
    """A change to the base configuration, and the variant that it is held against."""

    change: Mapping[str, Any]
    against: str = "base"
    larger: tuple[str, ...] = ()  # how images are answered besides
    order: int = 0  # which random order of the images, another one for each
    onward: str = ""  # the variant from whose weights, of the same seed and fold, it goes on
    head_seed: int | None = None  # of a new head

    @property
    def looks(self) -> tuple[str, ...]:
        """How the held-out images are answered, the plain way first."""
        return ("plain", *(() if self.order else (EMA,)), *self.larger)

    def of(self, base: Run, seed: int, fold: int) -> Run:
        """Its run on a fold."""
        changed = base.with_config(**self.change)
        return changed.with_origin(seed=seed, fold=fold, head_seed=self.head_seed)

    def name(self, run: Run) -> str:
        """Of the files of its run."""
        return run.id + ("-onward" if self.onward else "") + (f"-{self.order}" if self.order else "")


# Means of the answers of several variants' models, against those of one.
MEANS = {
    "mean of two new models": (("base", "a new model"), "base"),
    "mean of three new models": (("base", "a new model", "another new model"), "base"),
    "mean of two that go on": (
        ("goes on as long again", "goes on as long again, another order"),
        "mean of three new models",
    ),
    "goes on twice as long, beside a new model for as long": (("goes on twice as long",), "2 times as long"),
}
VARIANTS = {
    "base": Variant({}, larger=(*LARGER, TUNED)),
    "goes on as long again": Variant({}, order=1, onward="base"),
    "goes on as long again, another order": Variant({}, order=2, onward="base"),
    "goes on half as long": Variant({"epochs": 4}, order=3, onward="base"),
    "goes on twice as long": Variant({"epochs": 16}, "goes on as long again", order=1, onward="base"),
    "a new model": Variant({}, order=1, head_seed=101),
    "another new model": Variant({}, order=2, head_seed=102),
    "2 times as long": Variant({"epochs": 16}, larger=tuple(LARGER)),
    "progressive from 48 px, as much time": Variant({"start_image_size": 48, "epochs": 11}),
    "2 times as long, strong augmentation": Variant({"epochs": 16, "augment": "strong"}, "2 times as long"),
    "2 times as long, mixup 0.2": Variant({"epochs": 16, "mixup": 0.2}, "2 times as long"),
    "2 times as long, progressive, as much time": Variant(
        {"start_image_size": 48, "epochs": 22}, "2 times as long"
    ),
    "3 times as long": Variant({"epochs": 24}, "2 times as long"),
    "no label smoothing": Variant({"label_smoothing": 0.0}),
    "frozen, 128 px": Variant(FROZEN, "frozen, 128 px"),
    "opened, from its weights": Variant(OPENED, "frozen, 128 px", onward="frozen, 128 px"),
    "opened, a new model": Variant(OPENED, "frozen, 128 px"),
    "opened, from its weights at a third of its rate": Variant(
        {**OPENED, "lr": 5e-3}, "opened, from its weights", onward="frozen, 128 px"
    ),
    "opened, from its weights at a fifteenth": Variant(
        {**OPENED, "lr": 1e-3}, "opened, from its weights", onward="frozen, 128 px"
    ),
    "opened, from its weights, all groups at one rate": Variant(
        {**OPENED, "lr_ratio": 1.0}, "opened, from its weights", onward="frozen, 128 px"
    ),
    "opened, a new model at a third of the rate": Variant({**OPENED, "lr": 5e-3}, "opened, a new model"),
    "opened, a new model, two epochs of the head first": Variant(
        {**OPENED, "unfreeze": "head_first"}, "opened, a new model"
    ),
}


@dataclass(frozen=True)
class Place:
    """What the processes share, to be opened by each."""

    data: Path
    weights: Weights
    cache: Path

    def splits(self) -> Splits:
        """All labelled images in train, to be cut into folds."""
        return merge_into_train(open_dataset(self.data, cache_dir=self.cache, max_size=128))

    @property
    def folder(self) -> Path:
        return self.cache / "recipe"

    def file(self, name: str, shown: str) -> Path:
        return self.folder / f"{name}.{shown.replace(' ', '-')}.npz"

    def seconds_file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def weights_file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def main() -> None:
    """Make what is missing and write the table of what there is."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--seeds", type=int, default=3, metavar="N", help="seeds, each with its folds (3)"
        )
        parser.add_argument("--only-table", action="store_true", help="of what there is; train nothing")

    options = asked(__doc__, add)
    cache = user_cache_path("carmodels")
    data = options.data or cache / "demo"
    if not options.data:
        draw_demo(data)
    weights = Weights.parse(options.weights or str(DEMO_WEIGHTS))
    place = Place(data.absolute(), weights, cache)
    splits = place.splits()
    base = BASE if options.data else DEMO
    base = base.with_origin(data=splits.fingerprint, split=splits.split_hash)
    place.folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    for run, variant in [] if options.only_table else planned(base, range(options.seeds)):
        done = place.seconds_file(variant.name(run))
        with suppress(Timeout), FileLock(f"{done}.lock", timeout=0):  # another process has it
            if not done.is_file():
                said = train(base, run, variant, place)
                print(f"{time.monotonic() - begun:6.0f} s  {said}", flush=True)
    found = rows(base, splits, place, options.seeds)
    show(found)
    if options.data:
        write(found)


def runs_of(base: Run, variant: Variant, seed: int) -> list[Run]:
    """A run a fold."""
    return [variant.of(base, seed, fold) for fold in range(FOLDS)]


def planned(base: Run, seeds: range) -> Iterator[tuple[Run, Variant]]:
    """Every run, those that tell most first."""
    for variant in VARIANTS.values():
        for seed in seeds:
            for run in runs_of(base, variant, seed):
                yield run, variant


def train(base: Run, run: Run, variant: Variant, place: Place) -> str:
    """Train one fold and keep what it says of the images that were held out.

    As `fit` trains with a moving average, but the weights that are averaged, those of training without one,
    are kept as well; val is not looked at meanwhile.
    """
    torch.set_num_threads(1)
    splits = place.splits()
    start = parent(base, run, variant, place)
    began, parts = time.process_time(), splits_for(run.origin, splits)
    training = through(run, variant, place, parts, start)
    seconds = time.process_time() - began
    name, model = variant.name(run), training.model

    def keep(shown: str, model: Classifier, size: int = 0) -> None:
        answers = predict(model, splits, parts.val, config=replace(run.config, eval_image_size=size))
        answers.save(place.file(name, shown))

    keep("plain", model)
    if EMA in variant.looks:
        keep(EMA, training.eval_model)
    for shown, size in LARGER.items():
        if shown in variant.looks:
            keep(shown, model, size)
    if TUNED in variant.looks:
        tune(model, run, parts, max(LARGER.values()))
        keep(TUNED, model, max(LARGER.values()))
    write_atomic(place.seconds_file(name), json.dumps({"cpu_seconds": seconds}))
    origin = run.origin
    return f"seed {origin.seed}, fold {origin.fold}, {run.config.epochs} epochs: {seconds:.0f} s"


def through(run: Run, variant: Variant, place: Place, parts: Splits, start: Path | None) -> Trainer:
    """The whole schedule; orders of images follow from the numbers of the epochs."""
    unseen = replace(parts, val=parts.val.subset(np.arange(len(parts.val)) == 0))
    training = Trainer(run, unseen, weights=place.weights, device=torch.device("cpu"), start=start)
    for epoch in range(1, run.config.epochs + 1):
        training.epoch(epoch + 100 * variant.order)
    return training


def parent(base: Run, run: Run, variant: Variant, place: Place) -> Path | None:
    """The weights that it goes on from, of the same fold; None for a new model."""
    if not variant.onward:
        return None
    assert run.origin.fold is not None
    earlier = VARIANTS[variant.onward].of(base, run.origin.seed, run.origin.fold)
    path = place.weights_file(earlier.id)
    if not path.is_file():
        parts = splits_for(earlier.origin, place.splits())
        save_weights(through(earlier, VARIANTS[variant.onward], place, parts, None).model, path)
    return path


def tune(model: Classifier, run: Run, splits: Splits, size: int) -> None:
    """An epoch of classifier and BatchNorm alone, whole images of the test size (Touvron et al., 2019)."""
    config = run.config
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    learning = [p for m in (*norms, model.head) for p in m.parameters()]
    model.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
    flipped = Augment(crop=None, steps=(Step("HorizontalFlip", {"p": 0.5}),))
    loader = Loader(
        splits.images,
        splits.train,
        image_size=size,
        batch_size=config.batch_size,
        augment=flipped,
        seed=run.origin.seed,
        shuffle=True,
        drop_last=True,
    )
    optimizer = torch.optim.AdamW(learning, lr=config.lr / 10, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
    model.train()
    for batch in loader.epoch(0):
        loss = nn.functional.cross_entropy(
            model(batch.images), batch.labels, label_smoothing=config.label_smoothing
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


Known = dict[int, np.ndarray]  # by seed, (N, C) out-of-fold probabilities of all labelled images


def out_of_fold(base: Run, variant: Variant, shown: str, splits: Splits, place: Place, seeds: int) -> Known:
    """Of the seeds whose folds are all there."""
    found: Known = {}
    for seed in range(seeds):
        files = [place.file(variant.name(run), shown) for run in runs_of(base, variant, seed)]
        if all(file.is_file() for file in files):
            parts = [Predictions.load(file) for file in files]
            ids = tuple(i for part in parts for i in part.ids)
            probs = np.concatenate([part.probs for part in parts])
            found[seed] = Predictions(ids, splits.classes, probs).aligned(splits.train.ids).probs
    return found


def rows(base: Run, splits: Splits, place: Place, seeds: int) -> list[dict[str, Any]]:
    """A row for each variant, and for each larger size it was shown, as far as there are runs."""
    found: dict[str, Known] = {}
    table = []
    for name, variant in VARIANTS.items():
        for shown in variant.looks:
            title = name if shown == "plain" else f"{name}; {shown}"
            found[title] = out_of_fold(base, variant, shown, splits, place, seeds)
            against = variant.against if shown == "plain" else name
            if found[title]:
                assert splits.train.labels is not None
                compared = gained(found[title], found[against], splits.train.labels)
                table.append({"variant": title, "against": "" if title == against else against, **compared})
                table[-1]["cpu_seconds"] = cost(base, variant, place, seeds) if shown == "plain" else ""
    for title, (names, against) in MEANS.items():
        members = [found[name] for name in names]
        both = set.intersection(*(set(member) for member in members))
        found[title] = {seed: np.mean([member[seed] for member in members], axis=0) for seed in both}
        if both:
            assert splits.train.labels is not None
            compared = gained(found[title], found[against], splits.train.labels)
            table.append({"variant": title, "against": against, **compared, "cpu_seconds": ""})
    return table


def gained(new: Known, old: Known, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy, and what there is to say of the gain over the other on the seeds that both have."""
    own = np.mean([(probs.argmax(1) == labels).mean() for probs in new.values()])
    both = sorted(set(new) & set(old))
    right = {s: np.stack([new[s].argmax(1) == labels, old[s].argmax(1) == labels]) for s in both}
    gains = np.array([ours.astype(int) - theirs for ours, theirs in right.values()])  # (S, N)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(labels), (RESAMPLES, len(labels)))
    low, high = np.quantile(gains.mean(0)[drawn].mean(1), (0.025, 0.975))
    losses = [log_loss(old[s], labels) - log_loss(new[s], labels) for s in both]
    return {
        "seeds": len(both),
        "accuracy": f"{own:.4f}",
        "gain": f"{gains.mean():+.4f}",
        "low": f"{low:+.4f}",
        "high": f"{high:+.4f}",
        "by_seed": " ".join(f"{g:+.4f}" for g in gains.mean(1)),
        "set_right": int((gains > 0).sum()),
        "set_wrong": int((gains < 0).sum()),
        "log_loss_gain": f"{np.mean(losses):+.4f}",
    }


def cost(base: Run, variant: Variant, place: Place, seeds: int) -> str:
    """CPU seconds of a run, mean."""
    runs = [run for seed in range(seeds) for run in runs_of(base, variant, seed)]
    files = [place.seconds_file(variant.name(run)) for run in runs]
    taken = [json.loads(file.read_text())["cpu_seconds"] for file in files if file.is_file()]
    return f"{np.mean(taken):.1f}"


def write(found: list[dict[str, Any]]) -> None:
    """The table, with what it was measured on."""
    on = measured_on("torch", "timm", "albumentations")
    table = [{**row, **on} for row in found]
    FILE.parent.mkdir(parents=True, exist_ok=True)
    if table:
        write_atomic(FILE, csv_text([tuple(table[0]), *(tuple(row.values()) for row in table)]))


def show(found: list[dict[str, Any]]) -> None:
    """On the screen."""
    table = Shown(title="bench_recipe", title_justify="left")
    for column in found[0] if found else ():
        table.add_column(column)
    for row in found:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=220).print(table)


if __name__ == "__main__":
    as_in_a_worker()
    main()

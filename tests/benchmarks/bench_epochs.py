"""nice python tests/benchmarks/bench_epochs.py --data ../shared/data/cars9 --weights ../shared/weights

What makes an epoch of fine-tuning cheaper or worth more: one change each to a plain strong recipe, all at
the same CPU seconds a run, on out-of-fold predictions of all labelled images (three folds, near-duplicates
on one side, the last epoch's weights). The epochs that fit are found once for each variant, by the CPU
seconds of its steps; so runs may share the machine with other work. Runs are kept in the cache folder as
they end, and not made again; started twice, it trains on two cores. A row a variant: its gain in accuracy
over the one it is held against, with a 95 % interval from resampling images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from carmodels.data.dataset import Splits, open_dataset
from carmodels.data.resplit import merge_into_train
from carmodels.data.splits import assign_folds
from carmodels.evaluation.linear_probe import fit_linear_probe
from carmodels.evaluation.metrics import log_loss
from carmodels.evaluation.predictions import Predictions, blend
from carmodels.files import csv_text, write_atomic
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig
from carmodels.training.forward import predict
from carmodels.training.held_out import splits_for
from carmodels.training.probing import PROBE_FOLDS, extract_features
from carmodels.training.run import Origin, Run
from carmodels.training.trainer import Trainer

from table import as_in_a_worker, measured_on

FOLDER = Path(__file__).parents[2] / "results" / "anytime"
FOLDS, RESAMPLES = 3, 4000
TIMED = 6  # steps by which a variant's pace is found; the first one does not count

BASE = TrialConfig(  # the expert's recipe
    "tf_efficientnet_lite0",
    image_size=160,
    epochs=1,
    lr=1e-3,
    weight_decay=0.05,
    augment="color",
    label_smoothing=0.1,
    ema=0.998,
)


@dataclass(frozen=True)
class Variant:
    """A change to the base."""

    change: Mapping[str, Any] = field(default_factory=dict)
    against: str = "base"
    ridge: bool = False  # the classifier starts as a ridge regression on frozen features
    frozen: float = 0.0  # share of the forward pass's FLOPs, from the stem, that never trains


GROWING = {"start_image_size": 96, "image_size": 192}
VARIANTS = {
    "base": Variant(),
    "ridge head": Variant(ridge=True),
    "first half frozen": Variant(frozen=0.5),
    "ridge head, first half frozen": Variant(ridge=True, frozen=0.5, against="ridge head"),
    "96 to 192 px": Variant(GROWING),
    "ridge head, 96 to 192 px": Variant(GROWING, ridge=True, against="ridge head"),
    "ridge head, 96 to 192 px, first half frozen": Variant(
        GROWING, ridge=True, frozen=0.5, against="ridge head, 96 to 192 px"
    ),
    "ridge head, first third frozen": Variant(ridge=True, frozen=0.33, against="ridge head"),
    "ridge head, 128 px, tested at 160": Variant(
        {"image_size": 128, "eval_image_size": 160}, ridge=True, against="ridge head"
    ),
    "ridge head, stem at a fifth of the rate": Variant({"lr_ratio": 0.2}, ridge=True, against="ridge head"),
    "ridge head, twice the rate": Variant({"lr": 2e-3}, ridge=True, against="ridge head"),
    "ridge head, half the rate": Variant({"lr": 5e-4}, ridge=True, against="ridge head"),
    "ridge head, no moving average": Variant({"ema": 0.0}, ridge=True, against="ridge head"),
    "ridge head, no label smoothing": Variant({"label_smoothing": 0.0}, ridge=True, against="ridge head"),
    "ridge head, crop alone": Variant({"augment": "crop"}, ridge=True, against="ridge head"),
}


@dataclass(frozen=True)
class Place:
    """What the processes share, to be opened by each."""

    data: Path
    weights: Weights
    cache: Path
    seconds: float  # of CPU, a run

    def splits(self) -> Splits:
        """All labelled images in train, to be cut into folds."""
        return merge_into_train(open_dataset(self.data, cache_dir=self.cache, max_size=192))

    def file(self, variant: str, fold: int, ending: str) -> Path:
        name = variant.replace(", ", "-").replace(" ", "_")
        return self.cache / "epochs" / f"{self.data.name}-{self.seconds:g}-{name}-{fold}{ending}"


def main() -> None:
    """Make what is missing and write the table of what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--seconds", type=float, default=840.0, help="of CPU, a run")
    parser.add_argument("--only-table", action="store_true", help="of what there is; train nothing")
    options = parser.parse_args()
    weights = Weights.parse(options.weights)
    place = Place(options.data.absolute(), weights, user_cache_path("carmodels"), options.seconds)
    (place.cache / "epochs").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in [] if options.only_table else VARIANTS:
        for fold in range(FOLDS):
            done = place.file(name, fold, ".json")
            with suppress(Timeout), FileLock(f"{done}.lock", timeout=0):  # another process has it
                if not done.is_file():
                    print(f"{name}, fold {fold}: {train(name, fold, place)}", flush=True)
    write(rows(place), place)


def run_of(variant: Variant, fold: int, epochs: int = 1) -> Run:
    config = replace(BASE, epochs=epochs, **variant.change)
    return Run(config, Origin(folds=FOLDS, fold=fold))


def train(name: str, fold: int, place: Place) -> str:
    """Train on the other folds for the CPU seconds there are, and keep the answers to this one."""
    variant, splits = VARIANTS[name], place.splits()
    parts = splits_for(run_of(variant, fold).origin, splits)
    epochs = affordable_epochs(name, variant, parts, place)
    run = run_of(variant, fold, epochs)
    began = time.process_time()
    training = prepared(run, variant, parts, place)
    for epoch in range(1, epochs + 1):
        config = training.config
        for images, labels in training.train_batches(epoch):
            training.step(images, labels)
        assert config.epochs == epochs
    seconds = time.process_time() - began
    for view in ("plain", "flip"):
        answers = predict(training.eval_model, splits, parts.val, config=run.config, view=view)
        answers.save(place.file(name, fold, f".{view}.npz"))
    said = {"epochs": epochs, "cpu_seconds": seconds}
    write_atomic(place.file(name, fold, ".json"), json.dumps(said))
    return f"{epochs} epochs, {seconds:.0f} CPU seconds"


def prepared(run: Run, variant: Variant, parts: Splits, place: Place) -> Trainer:
    """A trainer whose layers are frozen and whose head is started as the variant says."""
    unseen = replace(parts, val=parts.val.subset(np.arange(len(parts.val)) == 0))
    training = Trainer(run, unseen, weights=place.weights, device=torch.device("cpu"))
    model = training.model
    if variant.ridge:
        split = parts.train
        assert split.labels is not None
        features = extract_features(model, parts, split, image_size=run.config.image_size)
        folds = assign_folds(split.labels, parts.images.groups[split.rows], PROBE_FOLDS, 0)
        probe, _ = fit_linear_probe(features, split.labels, folds, classes=len(parts.classes))
        for head in (model.head[-1], training.eval_model.head[-1]):
            head.weight.data = torch.from_numpy(probe.weight.T.astype(np.float32)).contiguous()
            head.bias.data = torch.from_numpy(probe.bias.astype(np.float32))
        assert isinstance(training.optimizer, torch.optim.Optimizer)
    model.unfreeze_top(len(model.groups) - frozen_groups(training, variant.frozen, run.config.image_size))
    model.train()
    return training


def frozen_groups(training: Trainer, share: float, size: int) -> int:
    """The layer groups, from the stem, that take about this share of the forward pass's FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    if not share:
        return 0
    model = training.model
    counter = FlopCounterMode(display=False, depth=None)
    with counter, torch.inference_mode():
        model.eval()(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    by_module = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}

    def flops(parameter: str) -> int:
        return by_module.get(f"Classifier.backbone.{parameter.rpartition('.')[0]}", 0)

    by_group = np.array(
        [sum({n.rpartition(".")[0]: flops(n) for n in names}.values()) for names in model.groups]
    )
    shares = by_group.cumsum() / by_group.sum()
    return int(np.abs(np.concatenate([[0.0], shares]) - share).argmin())


def affordable_epochs(name: str, variant: Variant, parts: Splits, place: Place) -> int:
    """Found once for a variant, by the CPU seconds of a few steps and of the head's start."""
    path = place.file(name, 0, ".pace.json")
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            run = run_of(replace(variant, change={**variant.change, "start_image_size": 0}), 0)
            began = time.process_time()
            training = prepared(run, variant, parts, place)
            start, taken = time.process_time() - began, []
            for number, (images, labels) in enumerate(training.train_batches(1)):
                training.step(images, labels)
                taken.append(time.process_time())
                if number == TIMED:
                    break
            pace = (taken[-1] - taken[0]) / TIMED / run.config.batch_size
            write_atomic(path, json.dumps({"start": start, "seconds_per_image": pace}))
    pace = json.loads(path.read_text())
    images, epochs = len(parts.train), 1

    def seconds(epochs: int) -> float:
        config = run_of(variant, 0, epochs).config
        areas = [(config.train_image_size(n) / config.image_size) ** 2 for n in range(1, epochs + 1)]
        return float(pace["start"] + pace["seconds_per_image"] * images * sum(areas))

    while seconds(epochs + 1) <= place.seconds:
        epochs += 1
    nearer = seconds(epochs + 1) - place.seconds < place.seconds - seconds(epochs)
    return epochs + nearer


def answers_of(name: str, place: Place, splits: Splits) -> dict[str, np.ndarray] | None:
    """(N, C) out-of-fold probabilities by view; None if a fold is missing."""
    if not all(place.file(name, fold, ".json").is_file() for fold in range(FOLDS)):
        return None
    found = {}
    parts = {
        v: [Predictions.load(place.file(name, k, f".{v}.npz")) for k in range(FOLDS)]
        for v in ("plain", "flip")
    }
    parts["both"] = [blend(list(pair)) for pair in zip(parts["plain"], parts["flip"], strict=True)]
    for view, by_fold in parts.items():
        ids = tuple(i for part in by_fold for i in part.ids)
        probs = np.concatenate([part.probs for part in by_fold])
        found[view] = Predictions(ids, splits.classes, probs).aligned(splits.train.ids).probs
    return found


def rows(place: Place) -> list[dict[str, Any]]:
    """A row a variant, both views averaged."""
    splits, table = place.splits(), []
    labels = splits.train.labels
    assert labels is not None
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(labels), (RESAMPLES, len(labels)))
    for name, variant in VARIANTS.items():
        own, other = answers_of(name, place, splits), answers_of(variant.against, place, splits)
        if own is None:
            continue
        said = [json.loads(place.file(name, k, ".json").read_text()) for k in range(FOLDS)]
        row = {
            "data": place.data.name,
            "budget": place.seconds,
            "variant": name,
            "epochs": said[0]["epochs"],
            "cpu_seconds": f"{np.mean([s['cpu_seconds'] for s in said]):.0f}",
            "plain": f"{(own['plain'].argmax(1) == labels).mean():.4f}",
            "with_flip": f"{(own['both'].argmax(1) == labels).mean():.4f}",
            "log_loss": f"{log_loss(own['both'], labels):.4f}",
            "against": variant.against,
        }
        if other is not None:
            gain = (own["both"].argmax(1) == labels).astype(int) - (other["both"].argmax(1) == labels)
            low, high = np.quantile(gain[drawn].mean(1), (0.025, 0.975))
            row |= {"gain": f"{gain.mean():+.4f}", "low": f"{low:+.4f}", "high": f"{high:+.4f}"}
        table.append(row)
    return table


def write(found: list[dict[str, Any]], place: Place) -> None:
    """The table, with what it was measured on."""
    for row in found:
        print("  ".join(str(value) for value in row.values()))
    on = measured_on("torch", "timm", "albumentations")
    table = [{**row, **on} for row in found if "gain" in row]
    FOLDER.mkdir(parents=True, exist_ok=True)
    if table:
        path = FOLDER / f"epochs-{place.data.name}-{place.seconds:g}.csv"
        write_atomic(path, csv_text([tuple(table[0]), *(tuple(row.values()) for row in table)]))


if __name__ == "__main__":
    as_in_a_worker()
    main()

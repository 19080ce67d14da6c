"""python tests/benchmarks/bench_gpu.py --part input

What can be measured on a GPU alone, in three parts of less than eight minutes each: `input` (images a
second of the loader's processes at 224 px), `steps` (training steps of six backbones fed by the loader,
against the same model fed from memory), `trials` (trials an hour against the tutorial's training function).
All on 15,000 drawn images of 640x480, backbones with random weights. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import bench_trials
import cv2
import joblib
import numpy as np
import torch
from platformdirs import user_cache_path

from carmodels.catalog import AUGMENTS
from carmodels.data.dataset import Splits, open_dataset
from carmodels.data.loader import Loader
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig
from carmodels.training.run import Run
from carmodels.training.trainer import Trainer

from table import Row, as_in_a_worker, finish

IMAGES, SIZE, BATCH = 15_000, 224, 64
STEPS, WARM = 60, 15
BACKBONES = (
    "efficientnet_b0",
    "efficientnet_b3",
    "tf_efficientnetv2_s",
    "convnext_tiny",
    "resnet50",
    "swin_tiny_patch4_window7_224",
)
PROCESSES = max(1, joblib.cpu_count() - 1)


def main() -> None:
    """Draw the images, unless they are there, and measure one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("input", "steps", "trials"), default="input")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was measured.")
        return
    folder = user_cache_path("carmodels") / "bench_gpu"
    draw(folder)
    splits = open_dataset(folder, cache_dir=user_cache_path("carmodels"), max_size=SIZE)
    rows = {"input": inputs, "steps": steps, "trials": trials}[options.part](folder, splits)
    finish(f"bench_gpu_{options.part}", rows)


def draw(folder: Path) -> None:
    """Ten classes of smooth noise with some grain: about as many bytes as photographs."""
    if (folder / "drawn").exists():
        return
    with ProcessPoolExecutor(joblib.cpu_count()) as pool:
        list(pool.map(_draw, [folder] * IMAGES, range(IMAGES), chunksize=100))
    (folder / "drawn").touch()


def _draw(folder: Path, number: int) -> None:
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
    path = folder / "train" / f"{number % 10}" / f"{number}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), noisy, [cv2.IMWRITE_JPEG_QUALITY, 90])


def inputs(folder: Path, splits: Splits) -> list[Row]:
    """Images a second that arrive on the GPU."""
    rows = []
    for name in ("crop", "color", "strong"):
        loader = Loader(
            splits.images,
            splits.train,
            image_size=SIZE,
            batch_size=BATCH,
            augment=AUGMENTS[name],
            processes=PROCESSES,
            shuffle=True,
        )
        speeds = []
        for epoch in range(3):
            started = time.monotonic()
            for batch in loader.epoch(epoch):
                batch.images.to("cuda", non_blocking=True)
            torch.cuda.synchronize()
            speeds.append(len(splits.train) / (time.monotonic() - started))
        speed = float(np.median(speeds[1:]))  # the first epoch starts the processes
        rows.append(Row(f"{name}, {PROCESSES} processes", speed, "", "", "", 2, "images/s"))
    return rows


def steps(folder: Path, splits: Splits) -> list[Row]:
    """Steps a second with the loader, and with batches that lie in the GPU's memory."""
    rows = []
    for name in BACKBONES:
        config = TrialConfig(name, image_size=SIZE, epochs=4, batch_size=BATCH, augment="color", lr=1e-4)
        trainer = Trainer(
            Run(config),
            splits,
            weights=Weights("none"),
            device=torch.device("cuda"),
            processes=PROCESSES,
        )
        trainer.model.unfreeze_top(len(trainer.model.groups))
        trainer.model.train()
        held = [(x.cuda(), y.cuda()) for x, y in islice(trainer.train_batches(1), 8)]
        from_memory = rate(trainer, (held[n % len(held)] for n in range(STEPS)))
        from_loader = rate(trainer, islice(trainer.train_batches(2), STEPS))
        rows.append(Row(name, from_loader, from_memory, from_loader / from_memory, 0.95, 1, "steps/s"))
        del trainer, held
        torch.cuda.empty_cache()
    return rows


def rate(trainer: Trainer, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Steps a second after a few to warm up."""
    started, counted = 0.0, 0
    for number, (images, labels) in enumerate(batches):
        if number == WARM:
            torch.cuda.synchronize()
            started = time.monotonic()
        trainer.step(images, labels)
        counted += number >= WARM
    torch.cuda.synchronize()
    return counted / (time.monotonic() - started)


def trials(folder: Path, splits: Splits) -> list[Row]:
    """Trials an hour against the tutorial's, one after the other on one GPU, on a tenth of the images."""
    fewer = folder.with_name("bench_gpu_trials")
    if not fewer.exists():
        for path in sorted((folder / "train").rglob("*.jpg"))[:: IMAGES // 1500]:
            target = fewer / "train" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(path)
    return bench_trials.compare(
        bench_trials.Case(
            "gpu preset",
            "gpu",
            fewer,
            "none",
            (SIZE,),
            configs=8,
            runs=1,
            target=4.0,
            backbones=BACKBONES,
            gpus=1,
        ),
        causes=False,
    )


if __name__ == "__main__":
    as_in_a_worker()
    main()

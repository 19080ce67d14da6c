"""python tests/benchmarks/bench_input.py

Images a second on one core at 224 px from 640x480 JPEGs: the loader of this project, normalising in batch,
against the usual Dataset (cv2.imread, albumentations, Normalize, ToTensorV2) doing the same augmentation, in
turn. The cache is built first, which has a row of its own. Checked inside: both give the same mean.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch.utils.data import DataLoader, Dataset

from carmodels.catalog import AUGMENTS, Augment
from carmodels.data.dataset import Splits, open_dataset
from carmodels.data.loader import Loader
from carmodels.models.classifier import create_classifier
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig

from table import Row, as_in_a_worker, finish

SIZE, BATCH, IMAGES = 224, 32, 640
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TARGETS = {"crop": 8.0, "color": 5.0}  # rows of AUGMENTS: RandomResizedCrop and flip, and with ColorJitter


class Usual(Dataset[tuple[torch.Tensor, int]]):
    """What a tutorial would write: every image decoded afresh each time."""

    def __init__(self, paths: list[Path], augment: Augment) -> None:
        self.paths = [str(path) for path in paths]
        steps = [getattr(A, step.transform)(**step.arguments) for step in augment.steps]
        self.transform = A.Compose(
            [
                A.RandomResizedCrop((SIZE, SIZE), scale=augment.crop),
                *steps,
                A.Normalize(MEAN, STD),
                ToTensorV2(),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = cv2.cvtColor(cv2.imread(self.paths[index]), cv2.COLOR_BGR2RGB)
        return self.transform(image=image)["image"], 0


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="passes of each side, in turn")
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = draw(Path(folder) / "images")
        started = time.monotonic()
        splits = open_dataset(Path(folder) / "images", cache_dir=Path(folder) / "cache", max_size=SIZE)
        built = len(paths) / (time.monotonic() - started)
        for name, target in TARGETS.items():
            rows.append(compare(name, target, paths, splits, runs))
    rows.append(Row("building the cache, once, all cores", built, "", "", "", 1, "images/s"))
    finish("bench_input", rows)


def draw(folder: Path) -> list[Path]:
    """Smooth noise with some grain, as JPEGs: about as much detail, and as many bytes, as photographs."""
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        coarse = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC)
        grain = rng.normal(0, 12, image.shape)
        path = folder / "train" / f"{index % 4}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(
            str(path), np.clip(image + grain, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90]
        )
    return sorted(folder.rglob("*.jpg"))


def compare(name: str, target: float, paths: list[Path], splits: Splits, runs: int) -> Row:
    """Images a second of both sides, in turn: medians, and the median of the ratios."""
    augment = AUGMENTS[name]
    loader = Loader(
        splits.images, splits.train, image_size=SIZE, batch_size=BATCH, augment=augment, shuffle=True
    )
    usual = DataLoader(Usual(paths, augment), batch_size=BATCH, shuffle=True)
    model = create_classifier(
        TrialConfig("test_efficientnet", image_size=SIZE, epochs=1), classes=4, weights=Weights("none")
    )
    assert (model.backbone.pretrained_cfg["mean"], model.backbone.pretrained_cfg["std"]) == (MEAN, STD)

    def ours(epoch: int) -> Iterator[torch.Tensor]:
        return (model.normalise(batch.images) for batch in loader.epoch(epoch))

    pairs = [(rate(lambda e=e: ours(e)), rate(lambda: (images for images, _ in usual))) for e in range(runs)]
    speeds = np.array([[speed for speed, _ in pair] for pair in pairs])
    means = np.array([[mean for _, mean in pair] for pair in pairs])
    assert np.abs(means[:, 0] - means[:, 1]).max() < 0.1, "the two sides do not give alike images"
    ours_median, theirs_median = np.median(speeds, axis=0)
    ratio = float(np.median(speeds[:, 0] / speeds[:, 1]))
    return Row(name, float(ours_median), float(theirs_median), ratio, target, runs, "images/s")


def rate(batches: Callable[[], Iterator[torch.Tensor]]) -> tuple[float, float]:
    """Images a second over one pass, and the mean over some of the pixels."""
    started, count, total = time.monotonic(), 0, 0.0
    for images in batches():
        count += len(images)
        total += float(images[:, :, ::16, ::16].mean()) * len(images)
    return count / (time.monotonic() - started), total / count


if __name__ == "__main__":
    as_in_a_worker()
    main()

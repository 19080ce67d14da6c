"""Writes the built-in data set: drawn cars in the competition's folder layout."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np

from carmodels.demo.drawing import draw_vehicle
from carmodels.demo.shapes import CLASSES
from carmodels.files import csv_text

DEMO_WEIGHTS = Path(__file__).with_name("weights")  # pretrained on drawn vehicles of other shapes
_DRAWING_VERSION = 1  # raise it whenever the same arguments give different images


def draw_demo(folder: Path, *, seed: int = 0, train: int = 1000, test: int = 300) -> None:
    """Draws `train` labelled and `test` unlabelled JPEGs into `folder`, in balanced classes.

    Adds train.csv, sample-submission.csv and classes.txt as in the competition, and test-labels.csv, which
    a competition keeps secret. An earlier draw with the same arguments is reused. An interrupted draw leaves
    nothing in `folder`. ValueError if `folder` holds anything else.
    """
    if train < len(CLASSES) or test < len(CLASSES):
        raise ValueError(f"train={train} and test={test} must be {len(CLASSES)} or more, an image a class")
    marker = json.dumps({"version": _DRAWING_VERSION, "seed": seed, "train": train, "test": test})
    if _is_drawn(folder, marker):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        unfinished = Path(scratch) / "unfinished"
        _draw_files(unfinished, seed, train, test)
        (unfinished / "demo.json").write_text(marker)
        try:
            unfinished.rename(folder)
        except OSError:  # another process may have finished the same draw in the meantime
            if not _is_drawn(folder, marker):
                raise


def _is_drawn(folder: Path, marker: str) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    existing = folder / "demo.json"
    if existing.is_file() and existing.read_text() == marker:
        return True
    raise ValueError(f"{folder} is not the demo data set {marker}: delete it or name another folder")


def _draw_files(folder: Path, seed: int, train: int, test: int) -> None:
    rng = np.random.default_rng(seed)
    ids = [f"{number}.jpg" for number in 100_000 + rng.choice(100_000, train + test, replace=False)]
    labels = np.concatenate([rng.permutation(np.arange(count) % len(CLASSES)) for count in (train, test)])
    shapes = list(CLASSES.values())
    (folder / "test_upload").mkdir(parents=True)
    for label in range(len(CLASSES)):
        (folder / "train" / str(label)).mkdir(parents=True)
    for index, (name, label) in enumerate(zip(ids, labels, strict=True)):
        target = folder / "train" / str(label) if index < train else folder / "test_upload"
        image = draw_vehicle(np.random.default_rng([seed, index]), shapes[label])
        (target / name).write_bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    header = ("Id", "Category")
    for file, rows in {
        "train.csv": zip(ids[:train], labels[:train], strict=True),
        "test-labels.csv": zip(ids[train:], labels[train:], strict=True),
        "sample-submission.csv": ((name, 0) for name in ids[train:]),
    }.items():
        (folder / file).write_text(csv_text([header, *rows]))
    (folder / "classes.txt").write_text("".join(f"{label} {name}\n" for label, name in enumerate(CLASSES)))

"""Writes the built-in data set: drawn cars in the competition's folder layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np

from carmodels.demo.drawing import draw_vehicle
from carmodels.demo.shapes import CLASSES

DEMO_WEIGHTS = Path(__file__).with_name("weights")  # pretrained on drawn vehicles of other shapes
_VERSION = 1  # of the drawing: raise it whenever the same parameters give other images


def draw_demo(folder: Path, *, seed: int = 0, train: int = 1000, test: int = 300) -> None:
    """Leaves `train` labelled and `test` unlabelled JPEGs in `folder`, with train.csv, sample-submission.csv
    and classes.txt, as the competition hands them out; test-labels.csv holds what it would keep back.

    The classes are balanced. A finished draw of the same parameters is left as it is; an interrupted one
    leaves nothing in `folder`. Raises ValueError where `folder` already holds anything else.
    """
    if train < len(CLASSES) or test < len(CLASSES):
        raise ValueError(f"train={train} and test={test} must be {len(CLASSES)} or more, an image a class")
    marker = json.dumps({"version": _VERSION, "seed": seed, "train": train, "test": test})
    if _is_drawn(folder, marker):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        draft = Path(scratch) / "draft"
        _draw_files(draft, seed, train, test)
        (draft / "demo.json").write_text(marker)
        try:
            draft.rename(folder)
        except OSError:  # another process may have finished the same draw meanwhile
            if not _is_drawn(folder, marker):
                raise


def _is_drawn(folder: Path, marker: str) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    found = folder / "demo.json"
    if found.is_file() and found.read_text() == marker:
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
        place = folder / "train" / str(label) if index < train else folder / "test_upload"
        image = draw_vehicle(np.random.default_rng([seed, index]), shapes[label])
        (place / name).write_bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    _write_labels(folder / "train.csv", ids[:train], labels[:train])
    _write_labels(folder / "test-labels.csv", ids[train:], labels[train:])
    _write_labels(folder / "sample-submission.csv", ids[train:], [0] * test)
    (folder / "classes.txt").write_text("".join(f"{label} {name}\n" for label, name in enumerate(CLASSES)))


def _write_labels(path: Path, ids: Sequence[str], labels: Sequence[int] | np.ndarray) -> None:
    rows = (f"{name},{label}\n" for name, label in zip(ids, labels, strict=True))
    path.write_text("Id,Category\n" + "".join(rows))

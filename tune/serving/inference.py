"""Predictions of an ensemble, and the confidence below which it gives no answer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from carmodels.data.layout import image_names
from carmodels.ensembling.network import Ensemble, EnsembleSpec, load_image
from carmodels.evaluation.calibration import MIN_ANSWERED, confidence_threshold, selective_accuracy
from carmodels.evaluation.intervals import Interval
from carmodels.files import csv_text, write_atomic
from carmodels.study import Study

NOT_SURE = "not sure"
_BATCH = 64  # images in memory at a time


@dataclass(frozen=True)
class Given:
    """Answers on a split at a confidence threshold."""

    images: int
    unanswered: int
    accuracy: Interval | None  # of the answers; None without answers

    @property
    def right(self) -> str:
        """Accuracy of the answers, as text. Empty without answers."""
        if self.accuracy is None:
            return ""
        found = self.accuracy
        value, low, high = (f"{100 * share:.1f}" for share in (found.value, found.low, found.high))
        return f"{value} % are right ({low} to {high})"

    @property
    def sentence(self) -> str:
        """Unanswered images and accuracy, as text."""
        left = f"{self.unanswered} of {self.images} images are left unanswered"
        return f"{left}, of the others {self.right}" if self.right else left


@dataclass(frozen=True)
class Threshold:
    """The minimum confidence of an answer, chosen on val and tested on holdout."""

    wanted: float  # target accuracy of the answers
    confidence: float  # inf if no threshold reaches the target on val
    val: Given
    holdout: Given

    def sure(self, probs: np.ndarray) -> np.ndarray:
        """probs (N, C) -> (N,) whether each answer is given."""
        chosen: np.ndarray = probs.max(axis=1) >= self.confidence
        return chosen

    @property
    def sentence(self) -> str:
        """The threshold and what it gives, as text."""
        if math.isinf(self.confidence):
            images = self.val.images
            wrong = (
                f"not even of the {MIN_ANSWERED} most confident ones on val {self.wanted:.0%} are right"
                if images > MIN_ANSWERED
                else f"of the {images} on val fewer than {self.wanted:.0%} are right"
            )
            return f"No answer is sure: {wrong}; a lower --not-sure gives answers."
        if not self.confidence:
            return f"Every image is answered: on val {self.val.right}; on holdout {self.holdout.right}."
        return (
            f"Below a confidence of {self.confidence:.2f} the answer is {NOT_SURE!r}, so that of the others "
            f"{self.wanted:.0%} are right. On val {self.val.sentence}; on holdout {self.holdout.sentence}."
        )


def threshold(study: Study, wanted: float, answer: str = "ensemble") -> Threshold:
    """The smallest confidence at which the answers on val are at least `wanted` accurate.

    ValueError if `wanted` is not from 0 to 1, or predictions are missing or damaged.
    """
    if not 0 <= wanted <= 1:
        raise ValueError(f"--not-sure {wanted:g} must be from 0 (always answer) to 1")
    predicted = {split: _probs_and_labels(study, answer, split) for split in ("val", "holdout")}
    confidence = confidence_threshold(*predicted["val"], wanted)
    given = {
        split: Given(
            len(labels),
            int((probs.max(axis=1) < confidence).sum()),
            selective_accuracy(probs, labels, confidence, groups=study.groups(study.labels(split))),
        )
        for split, (probs, labels) in predicted.items()
    }
    return Threshold(wanted, confidence, **given)


def _probs_and_labels(study: Study, answer: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    file = study.predictions_file(answer, split)
    if not study.has_predictions(answer, split):
        script = "distil.py" if answer == "student" else "ensemble.py"
        raise ValueError(
            f"{file} is {'damaged' if file.is_file() else 'missing'}: copy the folder {file.parent.name} "
            f"from where the search ran, or make it anew with tune/{script} {study.folder}"
        )
    return study.probs_and_labels(answer, split)


@dataclass(frozen=True)
class Answer:
    """Prediction for one image."""

    image: str
    column: int  # of the most likely class
    sure: bool
    probs: np.ndarray  # (C,)

    @property
    def confidence(self) -> float:
        return float(self.probs[self.column])


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be read as an image."""

    image: str  # repr of its path, so that every character can be printed
    reason: str


def found_images(paths: Sequence[Path]) -> list[Path]:
    """The given files, and all images below the given folders. ValueError for a path without images."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist: give images or folders of images")
        inside = [path / name for name in image_names(path)] if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no images (JPEG, PNG, WebP or BMP)")
        found += inside
    return list(dict.fromkeys(found))


def answers(ensemble: Ensemble, paths: Sequence[Path], limit: Threshold) -> Iterator[Answer | Unreadable]:
    """One answer per image, in order. Images are read in batches."""
    for start in range(0, len(paths), _BATCH):
        part = paths[start : start + _BATCH]
        read = _read(part, ensemble.spec.max_size)
        good = [image for image in read if isinstance(image, np.ndarray)]
        probs = ensemble.probabilities(good) if good else np.empty((0, len(ensemble.spec.classes)))
        rows = iter(zip(probs, limit.sure(probs).tolist() if good else [], strict=True))
        for path, image in zip(part, read, strict=True):
            if isinstance(image, str):
                yield Unreadable(repr(str(path)), image)
            else:
                row, sure = next(rows)
                yield Answer(str(path), int(row.argmax()), sure, row)


def _read(paths: Sequence[Path], max_size: int) -> list[np.ndarray | str]:
    """Each image, or the reason why it cannot be read."""

    def one(path: Path) -> np.ndarray | str:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            return "its name is not UTF-8, as names must be here: rename it"
        try:
            return load_image(path, max_size)
        except ValueError as reason:
            return str(reason)

    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata
        return list(pool.map(one, paths))


def write_answers(found: Sequence[Answer], spec: EnsembleSpec, path: Path) -> None:
    """Write a CSV: image, class, name, confidence, sure, and a probability per class. The write is atomic."""
    header = ["image", "class", "name", "confidence", "sure", *(f"p_{name}" for name in spec.classes)]
    rows = [
        [
            answer.image,
            spec.classes[answer.column],
            spec.class_names[answer.column],
            f"{answer.confidence:.6f}",
            "yes" if answer.sure else "no",
            *(f"{p:.6f}" for p in answer.probs),
        ]
        for answer in found
    ]
    write_atomic(path, csv_text([header, *rows]))

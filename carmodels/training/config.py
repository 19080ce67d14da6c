"""Hyperparameters of a trial (`TrialConfig`) and the metrics of an epoch (`EpochMetrics`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from carmodels.catalog import AUGMENTS, HEADS, SCHEDULES, SIZES, UNFREEZE
from carmodels.models.facts import absolute_name, facts_of, short_name

OPTIMIZERS = ("adamw", "adam", "sgd")
METRIC_NAMES = ("accuracy", "log_loss", "macro_f1")
_FULL_SIZE_AT = 0.75  # share of the schedule after which progressive resizing has reached image_size
_START_STRENGTH = 1 / 3  # of the augmentation with it; EfficientNetV2's goes from 5 to 15
_SIZE_STEP = 16  # pixels


@dataclass(frozen=True)
class TrialConfig:
    """A trial's hyperparameters. Raises ValueError for a value out of range or one that does not fit."""

    backbone: str
    image_size: int  # side of training images, pixels
    epochs: int  # of the whole schedule
    head_depth: int = 0  # `head` blocks before the classifier, 0 to 3
    head: str = "relu256"
    dropout: float = 0.25  # in each head block
    unfreeze: str = "full"
    lr: float = 1e-3  # peak learning rate of the head
    lr_ratio: float = 1.0  # learning rate of the backbone's bottom layer group over the head's
    optimizer: str = "adamw"
    weight_decay: float = 0.02
    schedule: str = "cosine"
    batch_size: int = 32  # images
    augment: str = "crop"
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of the Beta distribution (Zhang et al., 2018); 0: off
    cutmix: float = 0.0  # alpha of the Beta distribution (Yun et al., 2019); 0: off
    ema: float = 0.0  # decay per step of the weights' exponential moving average; 0: off
    clip_norm: float = 1.0  # largest norm of the gradient; 0: off
    class_weights: bool = False  # weight the loss by inverse class frequency
    patience: int = 0  # epochs without a better metric before training ends; 0: off
    start_image_size: int = 0  # side in the first epoch, pixels, for progressive resizing; 0: image_size
    eval_image_size: int = 0  # side for evaluation, pixels; 0: image_size

    def __post_init__(self) -> None:
        for name, options in _OPTIONS.items():
            check_option(name, getattr(self, name), options)
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            whole = _TYPES[name] == "int"
            if not isinstance(value, int if whole else int | float) or not low <= value <= high:
                number = "whole number" if whole else "number"
                raise ValueError(f"{name}={value!r} must be a {number} from {low:g} to {high:g}")
        self._check_sizes()

    def _check_sizes(self) -> None:
        row = facts_of(self.backbone)
        if row.fit(self.image_size) != self.image_size:
            allowed = f"{row.only_size}" if row.only_size else f"a multiple of {row.multiple}"
            least = f", {row.smallest} or more," if self.image_size < row.smallest else ""
            raise ValueError(f"image_size={self.image_size} must be {allowed}{least} for {self.backbone}")
        for name in ("start_image_size", "eval_image_size"):
            size = getattr(self, name)
            if size and (row.fixed_size or row.only_size):
                raise ValueError(f"{name}={size}: {self.backbone} is built for one size; leave it out")
            if size and row.fit(size) != size:
                raise ValueError(
                    f"{name}={size} must be 0 or a size for {self.backbone}, {row.smallest} or more"
                )
        if self.start_image_size > self.image_size:
            raise ValueError(
                f"start_image_size={self.start_image_size} must be at most image_size={self.image_size}"
            )

    @property
    def eval_size(self) -> int:
        """Side of the images for evaluation, pixels."""
        return self.eval_image_size or self.image_size

    def train_image_size(self, epoch: int) -> int:
        """Side of the training images in an epoch, pixels; the first epoch is 1.

        Progressive resizing (Howard, 2018; Tan and Le, 2021, EfficientNetV2, section 4) in steps of 16 pixels
        or more, multiples of the backbone's.
        """
        progress = self._resize_progress(epoch)
        if progress == 1:
            return self.image_size
        multiple = facts_of(self.backbone).multiple
        step = multiple * math.ceil(_SIZE_STEP / multiple)
        size = self.start_image_size + progress * (self.image_size - self.start_image_size)
        return min(self.image_size, round(size / step) * step)

    def augment_strength(self, epoch: int) -> float:
        """Strength of the augmentation in an epoch, up to 1. Grows with the images, as in EfficientNetV2."""
        return _START_STRENGTH + self._resize_progress(epoch) * (1 - _START_STRENGTH)

    def _resize_progress(self, epoch: int) -> float:
        """0 at start_image_size, 1 at image_size."""
        if not self.start_image_size:
            return 1.0
        return min(1.0, (epoch - 1) / max(1.0, _FULL_SIZE_AT * self.epochs))

    @property
    def title(self) -> str:
        """Backbone, image size, head and unfreeze strategy, for display."""
        return f"{short_name(self.backbone)} {self.image_size}px head{self.head_depth} {self.unfreeze}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialConfig:
        """Raises ValueError for a key that is no field."""
        for name in values:
            check_option("configuration key", name, FIELDS)
        return cls(**values)


@dataclass(frozen=True)
class EpochMetrics:
    """The metrics of one epoch, as `on_epoch` gets them."""

    epoch: int  # the first is 1
    train_loss: float
    val_loss: float
    val_accuracy: float
    value: float  # the run's metric on val
    seconds: float  # training and validation
    ending: str = ""  # why this is the last epoch: schedule, patience, time or diverged
    microbatches: int = 1  # into which a batch was split, as memory did not hold it


FIELDS = tuple(f.name for f in fields(TrialConfig))

_OPTIONS: dict[str, tuple[str, ...]] = {
    "head": tuple(HEADS),
    "unfreeze": tuple(UNFREEZE),
    "schedule": tuple(SCHEDULES),
    "augment": tuple(AUGMENTS),
    "optimizer": OPTIMIZERS,
}

BOUNDS: dict[str, tuple[float, float]] = {
    "image_size": SIZES,
    "epochs": (1, 10_000),
    "head_depth": (0, 3),
    "dropout": (0.0, 0.95),
    "lr": (1e-8, 10.0),
    "lr_ratio": (1e-6, 1.0),
    "weight_decay": (0.0, 10.0),
    "batch_size": (2, 65_536),
    "label_smoothing": (0.0, 0.9),
    "mixup": (0.0, 10.0),
    "cutmix": (0.0, 10.0),
    "ema": (0.0, 0.99999),
    "clip_norm": (0.0, 1e6),
    "patience": (0, 10_000),
    "start_image_size": (0, SIZES[1]),
    "eval_image_size": (0, SIZES[1]),
}


_TYPES = {f.name: str(f.type) for f in fields(TrialConfig)}


def check_option(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name}={value!r} is not known; choose from {', '.join(options)}")


def parse_value(name: str, text: str) -> Any:
    """A field's value, of the field's type. Raises ValueError naming the field."""
    if name == "backbone":
        return absolute_name(text)
    type_name = _TYPES[name]
    try:
        if type_name == "bool":
            return {"true": True, "false": False}[text.lower()]
        value = {"int": int, "float": float}.get(type_name, str)(text)
    except (KeyError, ValueError):
        raise ValueError(f"--set {name}: {text!r} is no {type_name}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--set {name}: {text!r} must be finite")
    return value


def refuse_repeated(assignments: Sequence[str]) -> None:
    """Raises ValueError for two values of one NAME: the first would be ignored."""
    names = [text.partition("=")[0] for text in assignments]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--set {twice[0]} is given {names.count(twice[0])} times: leave out all but one")


def parse_assignment(text: str) -> tuple[str, Any]:
    """`NAME=V` -> a field of `TrialConfig` and its value. Raises ValueError naming what is wrong."""
    name, _, value = text.partition("=")
    if name not in FIELDS or not value:
        raise ValueError(f"--set {text}: expected NAME=V with NAME one of {', '.join(FIELDS)}")
    return name, parse_value(name, value)

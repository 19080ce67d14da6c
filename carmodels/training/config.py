"""Hyperparameters of a trial (`TrialConfig`) and the metrics of an epoch (`EpochMetrics`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from carmodels.catalog import AUGMENTS, BACKBONES, HEADS, SCHEDULES, UNFREEZE

OPTIMIZERS = ("adamw", "adam", "sgd")
METRIC_NAMES = ("accuracy", "log_loss", "macro_f1")
FULL_SIZE_AT = 0.75  # of the schedule, when images that grow have grown
FIRST_STRENGTH = 1 / 3  # of the augmentation, where images grow: that of EfficientNetV2 grows from 5 to 15
_SIZE_STEP = 16  # pixels


@dataclass(frozen=True)
class TrialConfig:
    """The hyperparameters of a trial, and nothing else. Checked when made (ValueError)."""

    backbone: str
    image_size: int  # side, pixels
    epochs: int  # whole schedule
    head_depth: int = 0  # blocks of the kind `head` before the classifier, 0 to 3
    head: str = "relu256"
    dropout: float = 0.25  # in each block of the head
    unfreeze: str = "full"
    lr: float = 1e-3  # peak rate, of the head; backbone groups have layer_decay times less, group by group
    layer_decay: float = 1.0
    optimizer: str = "adamw"
    weight_decay: float = 0.02
    schedule: str = "cosine"
    batch_size: int = 32  # images
    augment: str = "crop"
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of the Beta distribution, 0: off (Zhang et al., 2018)
    cutmix: float = 0.0  # likewise (Yun et al., 2019)
    ema: float = 0.0  # decay of the weights' moving average per step, 0: off
    clip_norm: float = 1.0  # largest norm of the gradient, 0: off
    class_weights: bool = False  # weigh the loss by inverse class frequency
    patience: int = 0  # epochs without a better metric before training ends, 0: off
    start_image_size: int = 0  # side in the first epoch, pixels, from where it grows; 0: image_size
    eval_image_size: int = 0  # side of the images it is evaluated on, pixels; 0: image_size

    def __post_init__(self) -> None:
        for name, known in _ROWS.items():
            check_member(name, getattr(self, name), known)
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            kinds = int if _TYPES[name] == "int" else int | float
            if not isinstance(value, kinds) or not low <= value <= high:
                what = "whole number" if kinds is int else "number"
                raise ValueError(f"{name}={value!r} must be a {what} from {low:g} to {high:g}")
        multiple = BACKBONES[self.backbone].multiple
        if self.image_size % multiple:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of {multiple} for {self.backbone}"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        row, smallest = BACKBONES[self.backbone], BOUNDS["image_size"][0]
        for name in ("start_image_size", "eval_image_size"):
            size = getattr(self, name)
            if size and row.sized:
                raise ValueError(f"{name}={size}: {self.backbone} is built for one size; leave it out")
            if size and (size < smallest or size % row.multiple):
                raise ValueError(
                    f"{name}={size} must be 0 or a size for {self.backbone}, {smallest:g} or more"
                )
        if self.start_image_size > self.image_size:
            raise ValueError(
                f"start_image_size={self.start_image_size} must be at most image_size={self.image_size}"
            )

    @property
    def eval_size(self) -> int:
        """Side of the images it is tested on, pixels."""
        return self.eval_image_size or self.image_size

    def grown(self, epoch: int) -> float:
        """How far images and augmentation have grown in an epoch (the first is 1): from 0 to 1."""
        if not self.start_image_size:
            return 1.0
        return min(1.0, (epoch - 1) / max(1.0, FULL_SIZE_AT * self.epochs))

    def shown_size(self, epoch: int) -> int:
        """Side of the training images in an epoch, pixels: it grows in steps of 16 or the backbone's own.

        Progressive resizing (Howard, 2018; Tan and Le, 2021, EfficientNetV2, section 4).
        """
        step = max(_SIZE_STEP, BACKBONES[self.backbone].multiple)
        size = self.start_image_size + self.grown(epoch) * (self.image_size - self.start_image_size)
        return self.image_size if self.grown(epoch) == 1 else min(self.image_size, round(size / step) * step)

    def strength(self, epoch: int) -> float:
        """Of the augmentation in an epoch, up to 1: small images bear less (likewise)."""
        return FIRST_STRENGTH + self.grown(epoch) * (1 - FIRST_STRENGTH)

    @property
    def title(self) -> str:
        """Short name for people: backbone, size, head and strategy."""
        return f"{self.backbone} {self.image_size}px head{self.head_depth} {self.unfreeze}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialConfig:
        """Raises ValueError for a key that is no field."""
        for name in values:
            check_member("configuration key", name, FIELDS)
        return cls(**values)


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch of training gives to whoever watches."""

    epoch: int  # the first is 1
    train_loss: float
    val_loss: float
    val_accuracy: float
    value: float  # the configuration's metric on val
    seconds: float  # training and validation
    ending: str = ""  # why this was the last epoch: schedule, patience, time or diverged


FIELDS = tuple(f.name for f in fields(TrialConfig))

_ROWS: dict[str, tuple[str, ...]] = {
    "backbone": tuple(BACKBONES),
    "head": tuple(HEADS),
    "unfreeze": tuple(UNFREEZE),
    "schedule": tuple(SCHEDULES),
    "augment": tuple(AUGMENTS),
    "optimizer": OPTIMIZERS,
}

BOUNDS: dict[str, tuple[float, float]] = {
    "image_size": (16, 2048),
    "epochs": (1, 10_000),
    "head_depth": (0, 3),
    "dropout": (0.0, 0.95),
    "lr": (1e-8, 10.0),
    "layer_decay": (0.01, 1.0),
    "weight_decay": (0.0, 10.0),
    "batch_size": (2, 65_536),
    "label_smoothing": (0.0, 0.9),
    "mixup": (0.0, 10.0),
    "cutmix": (0.0, 10.0),
    "ema": (0.0, 0.99999),
    "clip_norm": (0.0, 1e6),
    "patience": (0, 10_000),
    "start_image_size": (0, 2048),
    "eval_image_size": (0, 2048),
}


def check_member(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; choose from {', '.join(known)}")


NAMES = ", ".join(FIELDS)
_TYPES = {f.name: str(f.type) for f in fields(TrialConfig)}


def parse(name: str, text: str) -> Any:
    """A field's value from its text, by the field's type; ValueError names the field."""
    kind = _TYPES[name]
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        value = {"int": int, "float": float}.get(kind, str)(text)
    except (KeyError, ValueError):
        raise ValueError(f"--set {name}: {text!r} is no {kind}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--set {name}: {text!r} must be finite")
    return value


def setting(text: str) -> tuple[str, Any]:
    """A field of a configuration and its value from `NAME=V`; ValueError as for an override."""
    name, _, written = text.partition("=")
    if name not in FIELDS or not written:
        raise ValueError(f"--set {text}: expected NAME=V with NAME one of {NAMES}")
    return name, parse(name, written)

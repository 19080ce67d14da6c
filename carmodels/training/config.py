"""What a trial is made of (`TrialConfig`) and what an epoch gives (`EpochMetrics`)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from carmodels.catalog import AUGMENTS, BACKBONES, HEADS, SCHEDULES, UNFREEZE

OPTIMIZERS = ("adamw", "adam", "sgd")
METRIC_NAMES = ("accuracy", "log_loss", "macro_f1")
FULL_SIZE_AT = 0.75  # of the schedule, when images that grow have grown
FIRST_STRENGTH = 1 / 3  # of the augmentation, where images grow: that of EfficientNetV2 grows from 5 to 15
_SIZE_STEP = 16  # pixels


@dataclass(frozen=True)
class TrialConfig:
    """Everything that decides a trial's weights, and nothing else. Checked when made (ValueError)."""

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
    metric: str = "accuracy"  # chooses the epoch whose weights are kept
    seed: int = 0
    data: str = ""  # fingerprint of the data set
    split: str = ""  # hash of the split
    fold: int | None = None  # of `folds`, which one is held out; None: the models of all of them together
    head_seed: int | None = None  # of the head's initial weights; None: `seed`
    folds: int = 0  # into which train and val together are cut, by `seed`; 0: the study's own train and val
    fold_in: bool = False  # learns from all labelled images, holdout too, so that none is left to score it
    start_image_size: int = (
        0  # side in the first epoch, pixels, from where it grows; 0: image_size, as stored outputs
    )
    eval_image_size: int = 0  # side of the images it is tested on, pixels; 0: image_size
    continues: str = (
        ""  # trial_id of the run whose weights it starts from; empty: pretrained ones, a new head
    )

    def __post_init__(self) -> None:
        for name, known in _ROWS.items():
            _check_member(name, getattr(self, name), known)
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            kinds = int if _TYPES[name] == "int" else int | float
            if not isinstance(value, kinds) or not low <= value <= high:
                what = "whole number" if kinds is int else "number"
                raise ValueError(f"{name}={value!r} must be a {what} from {low:g} to {high:g}")
        if not (self.head_seed is None or (isinstance(self.head_seed, int) and self.head_seed >= 0)):
            raise ValueError(f"head_seed={self.head_seed!r} must be None or a whole number from 0")
        multiple = BACKBONES[self.backbone].multiple
        if self.image_size % multiple:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of {multiple} for {self.backbone}"
            )
        self._check_sizes()
        self._check_held_out()

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

    def _check_held_out(self) -> None:
        if self.folds == 1 or self.fold not in (None, *range(self.folds)):
            raise ValueError(
                f"fold={self.fold} of folds={self.folds}: there must be 2 folds or more, the first is fold 0"
            )
        if self.folds and self.fold_in:
            raise ValueError(f"folds={self.folds}: with fold_in nothing is held out; leave one of them out")
        if self.blind and self.continues:
            raise ValueError(
                f"continues={self.continues!r}: that run has learnt from what is held out here, or had it to "
                "be chosen by; leave it out with folds and fold_in"
            )
        if self.blind and self.patience:
            raise ValueError(
                f"patience={self.patience}: what is held out must not end training; leave it out with folds"
            )

    @property
    def blind(self) -> bool:
        """Whether what is held out has no say in training: the last epoch is kept, whatever it scores."""
        return self.folds > 0 or self.fold_in

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
    def init_seed(self) -> int:
        """The seed of the head's initial weights."""
        return self.seed if self.head_seed is None else self.head_seed

    @property
    def id(self) -> str:
        """12 hex digits of the content: equal for equal draws, and the name of every file a trial leaves.

        A field of `_LATER` is left out where it has its default: studies made before it keep their ids.
        """
        said = {n: v for n, v in asdict(self).items() if n not in _LATER or v != _LATER[n]}
        content = json.dumps(said, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """Short name for people: backbone, size, head and strategy."""
        return f"{self.backbone} {self.image_size}px head{self.head_depth} {self.unfreeze}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialConfig:
        """Raises ValueError for a key that is no field."""
        for name in values:
            _check_member("configuration key", name, _FIELDS)
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


_FIELDS = tuple(f.name for f in fields(TrialConfig))

_LATER: dict[str, object] = {  # fields that came after the first studies, with their defaults
    "head_seed": None,
    "folds": 0,
    "fold_in": False,
    "start_image_size": 0,
    "eval_image_size": 0,
    "continues": "",
}

_ROWS: dict[str, tuple[str, ...]] = {
    "backbone": tuple(BACKBONES),
    "head": tuple(HEADS),
    "unfreeze": tuple(UNFREEZE),
    "schedule": tuple(SCHEDULES),
    "augment": tuple(AUGMENTS),
    "optimizer": OPTIMIZERS,
    "metric": METRIC_NAMES,
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
    "seed": (0, 2**31 - 1),
    "folds": (0, 100),
    "start_image_size": (0, 2048),
    "eval_image_size": (0, 2048),
}


def _check_member(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; choose from {', '.join(known)}")


# set by the search itself
OWNED = ("seed", "data", "split", "fold", "head_seed", "folds", "fold_in", "metric")
SETTABLE = tuple(name for name in _FIELDS if name not in (*OWNED, "continues"))
NAMES = ", ".join(SETTABLE)
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
    if name not in SETTABLE or not written:
        raise ValueError(f"--set {text}: expected NAME=V with NAME one of {NAMES}")
    return name, parse(name, written)

"""What a trial is made of (`TrialConfig`), what an epoch gives (`EpochMetrics`), what is searched (`Space`).

This is the one place to edit a space; `--set NAME=...` overrides a range or a fixed value for one search.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from carmodels.catalog import AUGMENTS, BACKBONES, HEADS, SCHEDULES, UNFREEZE

OPTIMIZERS = ("adamw", "adam", "sgd")
METRIC_NAMES = ("accuracy", "log_loss", "macro_f1")
FULL_SIZE_AT = 0.75  # of the schedule, when pictures that grow have grown
FIRST_STRENGTH = 1 / 3  # of the augmentation, where pictures grow: that of EfficientNetV2 grows from 5 to 15
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
    batch_size: int = 32  # pictures
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
    fold_in: bool = False  # learns from all labelled pictures, audit too, so that none is left to score it
    start_size: int = (
        0  # side in the first epoch, pixels, from where it grows; 0: image_size, as stored outputs
    )
    test_size: int = 0  # side of the pictures it is tested on, pixels; 0: image_size
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
        for name in ("start_size", "test_size"):
            size = getattr(self, name)
            if size and row.sized:
                raise ValueError(f"{name}={size}: {self.backbone} is built for one size; leave it out")
            if size and (size < smallest or size % row.multiple):
                raise ValueError(
                    f"{name}={size} must be 0 or a size for {self.backbone}, {smallest:g} or more"
                )
        if self.start_size > self.image_size:
            raise ValueError(f"start_size={self.start_size} must be at most image_size={self.image_size}")

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
    def tested_size(self) -> int:
        """Side of the pictures it is tested on, pixels."""
        return self.test_size or self.image_size

    def grown(self, epoch: int) -> float:
        """How far pictures and augmentation have grown in an epoch (the first is 1): from 0 to 1."""
        if not self.start_size:
            return 1.0
        return min(1.0, (epoch - 1) / max(1.0, FULL_SIZE_AT * self.epochs))

    def shown_size(self, epoch: int) -> int:
        """Side of the training pictures in an epoch, pixels: it grows in steps of 16 or the backbone's own.

        Progressive resizing (Howard, 2018; Tan and Le, 2021, EfficientNetV2, section 4).
        """
        step = max(_SIZE_STEP, BACKBONES[self.backbone].multiple)
        size = self.start_size + self.grown(epoch) * (self.image_size - self.start_size)
        return self.image_size if self.grown(epoch) == 1 else min(self.image_size, round(size / step) * step)

    def strength(self, epoch: int) -> float:
        """Of the augmentation in an epoch, up to 1: small pictures bear less (likewise)."""
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
    "start_size": 0,
    "test_size": 0,
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
    "start_size": (0, 2048),
    "test_size": (0, 2048),
}


def _check_member(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; choose from {', '.join(known)}")


@dataclass(frozen=True)
class Choice:
    """A dimension with a few values, drawn only where `when` = (other dimension, its values) holds."""

    options: tuple[Any, ...]
    when: tuple[str, tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class Range:
    """A dimension of real numbers from low to high, drawn only where `when` holds."""

    low: float
    high: float
    log: bool = False
    when: tuple[str, tuple[Any, ...]] | None = None


Dimension = Choice | Range


@dataclass(frozen=True)
class Space:
    """Dimensions in the order they are drawn, and the fields of `TrialConfig` that every trial shares."""

    dimensions: Mapping[str, Dimension]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    trials: int | None = None  # configurations of a search without --data, --trials and --hours

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Space:
        """The space that study.json describes; ValueError where this version knows none like it."""
        try:
            dimensions = {name: _dimension(found) for name, found in values["dimensions"].items()}
            return cls(dimensions, dict(values["fixed"]))._checked("the space of study.json")
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the space of study.json: {error!r}") from error

    @property
    def backbones(self) -> tuple[str, ...]:
        """The backbones a trial can draw."""
        return self._values("backbone")

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The sizes a trial can draw, pixels."""
        return self._values("image_size")

    @property
    def largest_size(self) -> int:
        """The largest that a trial can ask of a picture, pixels."""
        tested = self._values("test_size") if "test_size" in {*self.dimensions, *self.fixed} else ()
        return max((*self.image_sizes, *tested))

    def _values(self, name: str) -> tuple[Any, ...]:
        dimension = self.dimensions.get(name)
        return dimension.options if isinstance(dimension, Choice) else (self.fixed[name],)

    def drawn(self, values: Mapping[str, Any]) -> dict[str, Dimension]:
        """The dimensions that a configuration with these values has drawn; conditions leave some out."""
        return {
            n: d for n, d in self.dimensions.items() if d.when is None or values.get(d.when[0]) in d.when[1]
        }

    def params(self, config: TrialConfig) -> dict[str, Any] | None:
        """What a draw of this space was that gave a configuration; None where it cannot have drawn it."""
        values = vars(config)
        params = {name: values[name] for name in self.drawn(values)}
        owned = {name: values[name] for name in _OWNED}
        within = all(_holds(self.dimensions[name], value) for name, value in params.items())
        return params if within and config == TrialConfig(**{**self.fixed, **params, **owned}) else None

    def with_backbones(self, keep: tuple[str, ...]) -> Space:
        """The space with only these backbones, in the catalog's order. Raises ValueError if none is left."""
        options = tuple(b for b in self.backbones if b in keep)
        if not options:
            raise ValueError(f"no backbone of the space is left of {', '.join(self.backbones)}")
        return replace(self, dimensions={**self.dimensions, "backbone": Choice(options)})

    def with_override(self, text: str) -> Space:
        """The space with `NAME=V`, `NAME=V1,V2,...` or `NAME=LOW:HIGH` in place of what it says of NAME.

        Raises ValueError for an unknown name, a value of the wrong type or one that no configuration accepts.
        """
        name, _, written = text.partition("=")
        if name not in _SETTABLE or not written:
            raise ValueError(
                f"--set {text}: expected NAME=V, NAME=V1,V2 or NAME=LOW:HIGH with NAME one of {_NAMES}"
            )
        if name == "epochs" and not written.isdecimal():
            raise ValueError(f"--set {text}: epochs must be one number, the same schedule for every trial")
        old = self.dimensions.get(name)
        when = old.when if old else _WHEN.get(name)
        if not old and when and when[0] not in self.dimensions:
            when = None
        others = {n: d for n, d in self.dimensions.items() if n != name}
        fixed = {n: v for n, v in self.fixed.items() if n != name}
        if ":" in written:
            low, high = (_parse(name, part) for part in written.split(":", 1))
            if not (isinstance(low, float) and isinstance(high, float) and low < high):
                raise ValueError(f"--set {text}: LOW:HIGH is for a real number, with LOW below HIGH")
            log = old.log if isinstance(old, Range) else low > 0 and high / low >= 10
            new: Dimension = Range(low, high, log, when)
        else:
            options = tuple(_parse(name, part) for part in written.split(","))
            if len(options) == 1:
                return replace(self, dimensions=others, fixed={**fixed, name: options[0]})._checked(
                    f"--set {text}"
                )
            if doubles := [v for n, v in enumerate(options) if v in options[:n]]:
                raise ValueError(f"--set {text}: {doubles[0]!r} is there more than once")
            new = Choice(options, when)
        dimensions: dict[str, Dimension] = {}
        for n, d in self.dimensions.items():
            if d.when and d.when[0] == name:  # what is drawn under a condition comes after it
                dimensions.setdefault(name, new)
            dimensions[n] = new if n == name else d
        return replace(self, dimensions=dimensions | {name: new}, fixed=fixed)._checked(f"--set {text}")

    def _checked(self, source: str) -> Space:
        """Itself, once every value makes a configuration; ValueError naming its source otherwise."""
        for name, dimension in self.dimensions.items():
            values = dimension.options if isinstance(dimension, Choice) else (dimension.low, dimension.high)
            for value in values if name not in _SIZES else ():
                _try_value(self, name, value, source)
        sizes = {name: self._values(name) for name in _SIZES if name in self.dimensions or name in self.fixed}
        for size in self.image_sizes:
            for backbone in self.backbones:
                shown = replace(self, fixed={**self.fixed, "backbone": backbone, "image_size": size})
                for name, options in sizes.items():
                    for value in options if name != "image_size" else (size,):
                        _try_value(shown, name, value, source)
        return self


_SIZES = ("image_size", "start_size", "test_size")  # what one may be hangs on the others and on the backbone


def _holds(dimension: Dimension, value: Any) -> bool:
    if isinstance(dimension, Choice):
        return value in dimension.options
    return dimension.low <= value <= dimension.high


def _dimension(values: Mapping[str, Any]) -> Dimension:
    when = (values["when"][0], tuple(values["when"][1])) if values["when"] else None
    if values["kind"] == "Choice":
        return Choice(tuple(values["options"]), when)
    return Range(values["low"], values["high"], values["log"], when)


def _try_value(space: Space, name: str, value: Any, source: str) -> None:
    start = {"backbone": space.backbones[0], "image_size": max(space.image_sizes), "epochs": 1}
    try:
        TrialConfig.from_dict({**start, **space.fixed, name: value})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


# set by the search itself
_OWNED = ("seed", "data", "split", "fold", "head_seed", "folds", "fold_in", "metric")
_SETTABLE = tuple(name for name in _FIELDS if name not in (*_OWNED, "continues"))
_NAMES = ", ".join(_SETTABLE)
_TYPES = {f.name: str(f.type) for f in fields(TrialConfig)}


def _parse(name: str, text: str) -> Any:
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
    if name not in _SETTABLE or not written:
        raise ValueError(f"--set {text}: expected NAME=V with NAME one of {_NAMES}")
    return name, _parse(name, written)


class Draws(Protocol):
    """The part of an Optuna trial that a draw needs."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


def suggest(trial: Draws, space: Space) -> dict[str, Any]:
    """Draw a configuration's fields; a dimension whose condition does not hold is not drawn.

    Returns the fixed values; with Ray's OptunaSearch the drawn ones are added by it.
    """
    values: dict[str, Any] = dict(space.fixed)
    for name, dimension in space.dimensions.items():
        if dimension.when is not None and values.get(dimension.when[0]) not in dimension.when[1]:
            continue
        if isinstance(dimension, Choice):
            values[name] = trial.suggest_categorical(name, dimension.options)
        else:
            values[name] = trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
    return values


def baseline(space: Space) -> TrialConfig:
    """The competitor's own recipe, as near as the space can come to it.

    Xception (else the largest backbone of the space) at 224 px (else the nearest size), pooled features into
    one hidden layer with BatchNorm and dropout, Adam at 1e-3, head first and then everything at once, the
    rate reduced on a plateau, flips and small shifts.
    """
    backbones = space.backbones
    xception = [b for b in ("legacy_xception", "xception41") if b in backbones]
    backbone = xception[0] if xception else max(backbones, key=lambda b: BACKBONES[b].millions)
    return TrialConfig.from_dict(
        {
            **space.fixed,
            "backbone": backbone,
            "image_size": min(space.image_sizes, key=lambda size: (abs(size - 224), size)),
            "head": "relu256",
            "head_depth": 1,
            "dropout": 0.25,
            "optimizer": "adam",
            "lr": 1e-3,
            "weight_decay": 0.0,
            "layer_decay": 1.0,
            "unfreeze": "once",
            "schedule": "plateau",
            "augment": "shift",
            "label_smoothing": 0.0,
            "mixup": 0.0,
            "cutmix": 0.0,
            "ema": 0.0,
            "clip_norm": 0.0,
            "patience": 0,
            "start_size": 0,
            "test_size": 0,
        }
    )


_OPEN = ("full", "once", "gradual")
_HEADED = (1, 2, 3)
_WHEN = {  # where a dimension makes a difference, for one that its space does not have
    "head": ("head_depth", _HEADED),
    "dropout": ("head_depth", _HEADED),
    "layer_decay": ("unfreeze", _OPEN),
    "start_size": ("unfreeze", _OPEN),
}

SPACES: dict[str, Space] = {
    "demo": Space(
        dimensions={
            "backbone": Choice(("test_efficientnet", "test_resnet")),
            "image_size": Choice((32, 48, 64, 96)),
            "unfreeze": Choice(("frozen", "full", "once", "gradual")),
            "lr": Range(2e-4, 2e-2, log=True),
            "head_depth": Choice((0, 1, 2)),
            "dropout": Range(0.0, 0.5, when=("head_depth", _HEADED)),
            "layer_decay": Range(0.6, 1.0, when=("unfreeze", _OPEN)),
            "augment": Choice(("shift", "crop", "color")),
        },
        fixed={"epochs": 8, "batch_size": 32},
        trials=24,
    ),
    "cpu": Space(
        dimensions={
            "backbone": Choice(
                (
                    "mobilenetv2_035",
                    "mobilenetv2_100",
                    "mobilenetv1_100",
                    "mobilenetv3_small_100",
                    "mobilenetv3_large_100",
                    "lcnet_050",
                    "lcnet_100",
                    "efficientnet_b0",
                )
            ),
            "image_size": Choice((64, 96, 128, 160, 192)),
            "unfreeze": Choice(("frozen", "full", "once", "gradual")),
            "lr": Range(3e-4, 2e-2, log=True),
            "head_depth": Choice((0, 1, 2)),
            "dropout": Range(0.0, 0.5, when=("head_depth", _HEADED)),
            "layer_decay": Range(0.35, 1.0, when=("unfreeze", _OPEN)),
            "augment": Choice(("shift", "crop", "color")),
            "label_smoothing": Choice((0.0, 0.1)),
        },
        fixed={"epochs": 8, "batch_size": 32},
    ),
    "gpu": Space(
        dimensions={
            "backbone": Choice(
                (
                    "legacy_xception",
                    "efficientnet_b0",
                    "efficientnet_b2",
                    "efficientnet_b3",
                    "efficientnet_b4",
                    "tf_efficientnetv2_s",
                    "convnext_nano",
                    "convnext_tiny",
                    "convnext_small",
                    "swin_tiny_patch4_window7_224",
                    "swin_base_patch4_window7_224",
                    "vit_small_patch16_224",
                    "resnet50",
                )
            ),
            "image_size": Choice((224, 288, 352, 416)),
            "unfreeze": Choice(("frozen", "full", "once", "gradual")),
            "lr": Range(3e-5, 3e-3, log=True),
            "head_depth": Choice((0, 1, 2)),
            "dropout": Range(0.0, 0.5, when=("head_depth", _HEADED)),
            "layer_decay": Range(0.5, 1.0, when=("unfreeze", _OPEN)),
            "augment": Choice(("crop", "color", "strong")),
            "label_smoothing": Choice((0.0, 0.1)),
            "mixup": Choice((0.0, 0.2)),
            "ema": Choice((0.0, 0.998), when=("unfreeze", _OPEN)),
        },
        fixed={"epochs": 12, "batch_size": 32},
    ),
}

"""Every choice a configuration can name, as rows of data. Adding a row is all it takes to add a choice.

The tests run over all rows, so a new row is tested by existing; `space.py` says which ones a search draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Backbone:
    """A network of timm's, by its timm name (the key in `BACKBONES`)."""

    millions: float  # parameters without a classifier, for the table and for ordering by size
    multiple: int = 1  # image_size must be a multiple of this
    sized: bool = False  # True: built for one image size, which timm is told at creation


BACKBONES: dict[str, Backbone] = {
    "xception41": Backbone(24.9),  # the competitor's family (Chollet, 2017)
    "legacy_xception": Backbone(20.8),  # the competitor's own network, Keras weights
    "efficientnet_b0": Backbone(4.0),  # Tan and Le, 2019
    "efficientnet_b1": Backbone(6.5),
    "efficientnet_b2": Backbone(7.7),
    "efficientnet_b3": Backbone(10.7),
    "efficientnet_b4": Backbone(17.5),
    "tf_efficientnetv2_s": Backbone(20.2),  # Tan and Le, 2021
    "convnext_atto": Backbone(3.4),  # Liu et al., 2022
    "convnext_femto": Backbone(4.8),
    "convnext_pico": Backbone(8.5),
    "convnext_nano": Backbone(15.0),
    "convnext_tiny": Backbone(27.8),
    "convnext_small": Backbone(49.5),
    "swin_tiny_patch4_window7_224": Backbone(27.5, multiple=32, sized=True),  # Liu et al., 2021
    "swin_base_patch4_window7_224": Backbone(86.7, multiple=32, sized=True),
    "vit_small_patch16_224": Backbone(21.7, multiple=16, sized=True),  # Dosovitskiy et al., 2021
    "resnet50": Backbone(23.5),  # He et al., 2016
    "test_efficientnet": Backbone(0.1),  # timm's smallest; the demo's
    "test_resnet": Backbone(0.4),  # likewise
    "mobilenetv1_100": Backbone(3.2),  # Howard et al., 2017
    "mobilenetv2_035": Backbone(0.4),  # Sandler et al., 2018
    "mobilenetv2_100": Backbone(2.2),
    "mobilenetv3_small_050": Backbone(0.6),  # Howard et al., 2019
    "mobilenetv3_small_100": Backbone(1.5),
    "mobilenetv3_large_100": Backbone(4.2),
    "lcnet_035": Backbone(0.4),  # Cui et al., 2021
    "lcnet_050": Backbone(0.6),
    "lcnet_100": Backbone(1.7),
}


@dataclass(frozen=True)
class Head:
    """The block that is repeated `head_depth` times between pooled features and the classifier.

    A block is linear, BatchNorm, activation, dropout; depth 0 is a plain linear classifier.
    """

    width: int  # features a block puts out
    activation: str  # a class of torch.nn


HEADS: dict[str, Head] = {
    "relu256": Head(width=256, activation="ReLU"),
    "gelu512": Head(width=512, activation="GELU"),
}


@dataclass(frozen=True)
class Unfreeze:
    """When the backbone's layer groups start to learn; the head always does."""

    head_only_epochs: int | None  # epochs before any group opens; None: never
    all_open_at: float = 0.0  # share of the schedule by which all groups are open, one by one from the top


UNFREEZE: dict[str, Unfreeze] = {
    "frozen": Unfreeze(head_only_epochs=None),
    "full": Unfreeze(head_only_epochs=0),
    "head_first": Unfreeze(head_only_epochs=2),  # LP-FT (Kumar et al., 2022), with heads of any depth
    "gradual": Unfreeze(head_only_epochs=1, all_open_at=0.5),
}


@dataclass(frozen=True)
class Step:
    """One albumentations transform on 8-bit images, by class name and arguments."""

    transform: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Augment:
    """How a training image is varied: a crop (or all of it) brought to image_size, then the steps."""

    crop: tuple[float, float] | None  # share of the area a random crop keeps; None: the whole image
    steps: tuple[Step, ...] = ()


_FLIP = Step("HorizontalFlip", {"p": 0.5})

AUGMENTS: dict[str, Augment] = {
    "none": Augment(crop=None),
    "shift": Augment(  # the competitor's: flips and small shifts
        crop=None,
        steps=(_FLIP, Step("Affine", {"translate_percent": (-0.1, 0.1), "border_mode": 4, "p": 1.0})),
    ),
    "crop": Augment(crop=(0.6, 1.0), steps=(_FLIP,)),
    "color": Augment(
        crop=(0.6, 1.0),
        steps=(
            _FLIP,
            Step(
                "ColorJitter", {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05, "p": 0.8}
            ),
        ),
    ),
    "strong": Augment(
        crop=(0.35, 1.0),
        steps=(
            _FLIP,
            Step(
                "ColorJitter", {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05, "p": 0.8}
            ),
            Step("ToGray", {"p": 0.1}),
            Step(
                "CoarseDropout",
                {
                    "num_holes_range": (1, 1),
                    "hole_height_range": (0.1, 0.35),
                    "hole_width_range": (0.1, 0.35),
                    "p": 0.5,
                },
            ),
        ),
    ),
}


@dataclass(frozen=True)
class View:
    """One way to show an image to a trained model; test-time augmentation averages over views."""

    flip: bool = False  # left and right change places
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # left, top, right, bottom of what is shown
    scale: float = 1.0  # image_size is multiplied by this (backbones built for one size keep theirs)
    brightness: float = 1.0  # pixels are multiplied by this, after ...
    contrast: float = 1.0  # ... their distance to mid-grey was multiplied by this


VIEWS: dict[str, View] = {
    "plain": View(),
    "flip": View(flip=True),
    "larger": View(scale=1.25),
    "larger_flip": View(flip=True, scale=1.25),
    "smaller": View(scale=0.8),
    "smaller_flip": View(flip=True, scale=0.8),
    "centre": View(box=(0.06, 0.06, 0.94, 0.94)),  # this and the corners: five crops of 77 % of the area
    "top_left": View(box=(0.0, 0.0, 0.88, 0.88)),
    "top_right": View(box=(0.12, 0.0, 1.0, 0.88)),
    "bottom_left": View(box=(0.0, 0.12, 0.88, 1.0)),
    "bottom_right": View(box=(0.12, 0.12, 1.0, 1.0)),
    "brighter": View(brightness=1.15),
    "darker": View(brightness=0.87),
    "more_contrast": View(contrast=1.2),
    "less_contrast": View(contrast=0.8),
}


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves."""

    kind: str  # "cosine", "plateau" or "constant"
    warmup: float = 0.0  # share of the schedule over which the rate rises from zero, but for plateau
    factor: float = 1.0  # plateau: the rate is multiplied by this ...
    patience: int = 0  # ... after more than so many epochs in a row without a better val loss

    def __post_init__(self) -> None:
        """Raises ValueError for a row that would not do what it says."""
        if self.kind not in ("cosine", "plateau", "constant"):
            raise ValueError(f"a schedule's kind {self.kind!r} must be cosine, plateau or constant")
        if self.kind == "plateau" and self.warmup:
            raise ValueError(f"a plateau schedule has no warmup={self.warmup:g}")


SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule("cosine", warmup=0.1),
    "plateau": Schedule("plateau", factor=0.25, patience=2),
    "constant": Schedule("constant"),
}

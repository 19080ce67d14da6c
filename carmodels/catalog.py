"""Everything a configuration can name, as rows of data. A new choice is a new row.

The tests run over all rows. `presets.py` says which ones a search draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SIZES = (16, 2048)  # smallest and largest side of an image, pixels


@dataclass(frozen=True)
class Backbone:
    """What has to be known of a timm network. `facts_of` in carmodels/models/facts.py has it for any name."""

    millions: float  # parameters without the classifier
    multiple: int = 1  # image_size must be a multiple of this
    fixed_size: bool = False  # built for one image size, as `img_size` of timm.create_model
    dynamic: bool = False  # likewise, but takes other sizes, too: `dynamic_img_size` of timm.create_model
    smallest: int = SIZES[0]  # side of an image, pixels
    only_size: int = 0  # the one side that its weights are for, pixels; 0: any
    top1: float = 0.0  # accuracy on ImageNet, per cent, of timm's default weights; 0: not known
    saved: dict[str, Any] | None = None  # architecture and arguments, where the name is no timm name

    def fit(self, size: float) -> int:
        """The side nearest to `size` that the network takes, pixels."""
        if self.only_size:
            return self.only_size
        steps = max(round(size / self.multiple), math.ceil(self.smallest / self.multiple))
        return self.multiple * min(steps, SIZES[1] // self.multiple)


BACKBONES: dict[str, Backbone] = {
    "xception41": Backbone(24.9, top1=78.5),  # the baseline's family (Chollet, 2017)
    "legacy_xception": Backbone(20.8, top1=79.1),  # the baseline, with Keras weights
    "efficientnet_b0": Backbone(4.0, top1=77.7),  # Tan and Le, 2019
    "efficientnet_b1": Backbone(6.5, top1=80.4),
    "efficientnet_b2": Backbone(7.7, top1=79.3),
    "efficientnet_b3": Backbone(10.7, top1=81.5),
    "efficientnet_b4": Backbone(17.5, top1=82.7),
    "tf_efficientnet_lite0": Backbone(3.4, top1=74.8),  # without squeeze-and-excitation
    "tf_efficientnet_lite1": Backbone(4.1, top1=76.7),
    "tf_efficientnet_lite2": Backbone(4.8, top1=77.5),
    "tf_efficientnetv2_s": Backbone(20.2, top1=83.3),  # Tan and Le, 2021
    "convnext_atto": Backbone(3.4, top1=75.7),  # Liu et al., 2022
    "convnext_femto": Backbone(4.8, top1=77.5),
    "convnext_pico": Backbone(8.5, top1=79.5),
    "convnext_nano": Backbone(15.0, top1=82.3),
    "convnext_tiny": Backbone(27.8, top1=84.2),
    "convnext_small": Backbone(49.5, top1=85.2),
    # Liu et al., 2021
    "swin_tiny_patch4_window7_224": Backbone(27.5, multiple=32, fixed_size=True, top1=81.4),
    "swin_base_patch4_window7_224": Backbone(86.7, multiple=32, fixed_size=True, top1=85.3),
    # Dosovitskiy et al., 2021
    "vit_small_patch16_224": Backbone(21.7, multiple=16, fixed_size=True, top1=81.4),
    "resnet50": Backbone(23.5, top1=80.4),  # He et al., 2016
    "test_efficientnet": Backbone(0.1),  # timm's smallest networks, for demo and tests
    "test_resnet": Backbone(0.4),
    "mobilenetv1_100": Backbone(3.2, top1=75.4),  # Howard et al., 2017
    "mobilenetv2_035": Backbone(0.4),  # Sandler et al., 2018
    "mobilenetv2_100": Backbone(2.2, top1=72.9),
    "mobilenetv3_small_050": Backbone(0.6, top1=57.9),  # Howard et al., 2019
    "mobilenetv3_small_100": Backbone(1.5, top1=67.6),
    "mobilenetv3_large_100": Backbone(4.2, top1=75.8),
    "lcnet_035": Backbone(0.4),  # Cui et al., 2021
    "lcnet_050": Backbone(0.6, top1=63.1),
    "lcnet_100": Backbone(1.7, top1=72.1),
}


@dataclass(frozen=True)
class Head:
    """A block of linear, BatchNorm, activation and dropout. `head_depth` of them precede the classifier."""

    width: int  # output features
    activation: str  # class name in torch.nn


HEADS: dict[str, Head] = {
    "relu256": Head(width=256, activation="ReLU"),
    "gelu512": Head(width=512, activation="GELU"),
}


@dataclass(frozen=True)
class Unfreeze:
    """When the backbone's layer groups are unfrozen, from the top down. The head always trains."""

    head_only_epochs: int | None  # epochs before the first group is unfrozen; None: the backbone stays frozen
    all_unfrozen_at: float = 0.0  # share of the schedule after which all groups are unfrozen


UNFREEZE: dict[str, Unfreeze] = {
    "frozen": Unfreeze(head_only_epochs=None),
    "full": Unfreeze(head_only_epochs=0),
    "head_first": Unfreeze(head_only_epochs=2),  # LP-FT (Kumar et al., 2022), for heads of any depth
    "gradual": Unfreeze(head_only_epochs=1, all_unfrozen_at=0.5),
}


@dataclass(frozen=True)
class Step:
    """One albumentations transform of 8-bit images."""

    transform: str  # class name in albumentations
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Augment:
    """Augmentation of a training image: a random crop, resized to image_size, then the steps."""

    crop: tuple[float, float] | None  # range of the crop's share of the area; None: the whole image
    steps: tuple[Step, ...] = ()


def _color_jitter(strength: float) -> Step:
    levels = dict.fromkeys(("brightness", "contrast", "saturation"), strength)
    return Step("ColorJitter", {**levels, "hue": 0.05, "p": 0.8})


_FLIP = Step("HorizontalFlip", {"p": 0.5})

AUGMENTS: dict[str, Augment] = {
    "none": Augment(crop=None),
    "shift": Augment(  # the baseline's
        crop=None,
        steps=(_FLIP, Step("Affine", {"translate_percent": (-0.1, 0.1), "border_mode": 4, "p": 1.0})),
    ),
    "crop": Augment(crop=(0.6, 1.0), steps=(_FLIP,)),
    "color": Augment(crop=(0.6, 1.0), steps=(_FLIP, _color_jitter(0.2))),
    "strong": Augment(
        crop=(0.35, 1.0),
        steps=(
            _FLIP,
            _color_jitter(0.3),
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
    """A deterministic variant of an image. Test-time augmentation averages over views."""

    flip: bool = False  # horizontally
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # crop: left, top, right, bottom
    scale: float = 1.0  # factor for image_size; backbones with a fixed size ignore it
    brightness: float = 1.0  # factor for the pixels, applied after ...
    contrast: float = 1.0  # ... this factor for their distance to mid-grey


VIEWS: dict[str, View] = {
    "plain": View(),
    "flip": View(flip=True),
    "larger": View(scale=1.25),
    "larger_flip": View(flip=True, scale=1.25),
    "smaller": View(scale=0.8),
    "smaller_flip": View(flip=True, scale=0.8),
    "centre": View(box=(0.06, 0.06, 0.94, 0.94)),  # five-crop, with the corners: 77 % of the area each
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
    """A learning rate schedule."""

    kind: str  # "cosine", "plateau" or "constant"
    warmup: float = 0.0  # share of the schedule for a linear warm-up; not for plateau
    factor: float = 1.0  # plateau: factor for the rate ...
    patience: int = 0  # ... after more than this many epochs without a better val loss

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "plateau", "constant"):
            raise ValueError(f"a schedule's kind {self.kind!r} must be cosine, plateau or constant")
        if self.kind == "plateau" and self.warmup:
            raise ValueError(f"a plateau schedule has no warmup={self.warmup:g}")


SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule("cosine", warmup=0.1),
    "plateau": Schedule("plateau", factor=0.25, patience=2),
    "constant": Schedule("constant"),
}

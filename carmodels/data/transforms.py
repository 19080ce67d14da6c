"""What is done to an image before a network sees it: crops, augmentation, views, resizing."""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Sequence
from typing import Any

import albumentations
import cv2
import numpy as np

from carmodels.catalog import Step, View
from carmodels.formatting import one_line

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network when imported otherwise
_BILINEAR_SHRINKS = 2.0  # by so much every pixel still counts
_SHARP, _SHARP_SHRINKS = 192, 2.4  # from this size on, pixels, a little more does no harm


class LazyGenerator:
    """numpy.random.default_rng of some numbers, made at its first use: few transforms use it, in 20 us."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._made = self.__dict__.get("_made") or np.random.default_rng(self._numbers)
        return getattr(self._made, name)


def seen(image: np.ndarray, view: View, size: int) -> np.ndarray:
    """(H, W, 3) -> (size, size, 3), as the view shows it (its scale is in `size`)."""
    height, width = image.shape[:2]
    left, top, right, bottom = (
        round(share * side) for share, side in zip(view.box, (width, height) * 2, strict=True)
    )
    shown = resize(image[top : max(bottom, top + 1), left : max(right, left + 1)], size)
    if view.flip:
        shown = shown[:, ::-1]
    if view.contrast == view.brightness == 1:
        return shown
    levels = ((np.arange(256) - 127.5) * view.contrast + 127.5) * view.brightness
    return levels.round().clip(0, 255).astype(np.uint8)[shown]


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) -> (size, size, 3): area average along a side that shrinks, bilinear along one that grows."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (min(width, size), min(height, size)), interpolation=cv2.INTER_AREA)
    if min(height, width) >= size:
        return small
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_LINEAR)


def resize_fast(image: np.ndarray, size: int, place: np.ndarray) -> np.ndarray:
    """`resize` into `place`, in less than half its time: bilinear, of four samples where one skips pixels.

    For training. Against `resize` of the decoded photograph, over random crops of sixty of cars9: median 39
    dB at 64 px, 43 at 128 px, 43 at 224 px; one bilinear sample of the whole file, as is usual, has 28, 34
    and 43 dB.
    """
    sides = image.shape[:2]
    shrinks = max(sides) / size if size < _SHARP else math.sqrt(sides[0] * sides[1]) / size
    if shrinks <= (_BILINEAR_SHRINKS if size < _SHARP else _SHARP_SHRINKS):
        return cv2.resize(image, (size, size), place, interpolation=cv2.INTER_LINEAR)
    double = cv2.resize(image, (2 * size, 2 * size), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(double, (size, size), place, interpolation=cv2.INTER_AREA)


def random_crop(image: np.ndarray, shares: tuple[float, float], draw: random.Random) -> np.ndarray:
    """A view of a random part with the given share of the area, as RandomResizedCrop (Szegedy et al., 2015).

    The aspect ratio, 3/4 to 4/3, is relative to the image's own, since the whole is squashed to a square as
    well: a crop of absolute ratio would always cut the ends off a wide car.
    """
    height, width = image.shape[:2]
    area = draw.uniform(*shares)
    limit = -math.log(max(area, 3 / 4))  # beyond 1 / area a side would be longer than the image's
    stretch = math.exp(draw.uniform(-limit, limit))
    crop_height = max(1, round(height * math.sqrt(area / stretch)))
    crop_width = max(1, round(width * math.sqrt(area * stretch)))
    top = int(draw.random() * (height - crop_height + 1))
    left = int(draw.random() * (width - crop_width + 1))
    return image[top : top + crop_height, left : left + crop_width]


def apply_transforms(
    transforms: Sequence[albumentations.BasicTransform],
    image: np.ndarray,
    rng: LazyGenerator,
    draw: random.Random,
) -> np.ndarray:
    """One pair of generators for all transforms.

    Compose.set_random_seed gives every transform the same seed, so that all decide by the same number whether
    they are applied (a flipped image would always be jittered), and takes 25 to 75 microseconds an image.
    """
    for transform in transforms:
        transform.set_random_state(rng, draw)
        image = transform(image=image)["image"]
    return image


def make_transform(step: Step) -> albumentations.BasicTransform:
    kind = getattr(albumentations, step.transform, None)
    if not (isinstance(kind, type) and issubclass(kind, albumentations.BasicTransform)):
        raise ValueError(f"albumentations {albumentations.__version__} has no transform {step.transform!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # all that it does about an argument it does not know
        try:
            return kind(**step.arguments)
        except (UserWarning, ValueError, TypeError) as error:
            raise ValueError(f"albumentations refuses {step}: {one_line(error)}") from None

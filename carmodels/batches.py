"""Loaders: the pictures of a split, varied or shown through a view, as batches of 8-bit tensors."""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from carmodels.archives import one_line
from carmodels.catalog import Augment, Step, View
from carmodels.data import Split
from carmodels.images import ImageCache

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network when imported otherwise
import albumentations

PATIENCE = (
    900.0  # seconds for a batch, after which a loader process counts as hung and a RuntimeError says so
)
_BILINEAR_SHRINKS = 2.0  # by so much every pixel still counts
_SHARP, _SHARP_SHRINKS = 192, 2.4  # from this size on, pixels, a little more does no harm

Pictures = ImageCache | Sequence[np.ndarray]  # (H, W, 3) uint8 each, by row


class Batch(NamedTuple):
    """What a step of training or prediction needs."""

    images: torch.Tensor  # (B, 3, S, S) uint8, channels_last
    labels: torch.Tensor  # (B,) int64, -1 where unknown
    rows: np.ndarray  # (B,) int64, positions in the split


class _Plan(NamedTuple):
    """A batch to be made."""

    epoch: int
    positions: np.ndarray  # in the split
    size: int  # side, pixels
    strength: float  # of the augmentation, 0 to 1


class Loader:
    """Batches of a split, epoch by epoch.

    A picture is varied by `augment`, or shown as `view` says (whose scale is the caller's matter: it sets
    image_size), or neither: the whole picture squashed to a square of image_size pixels. What it looks like
    depends on seed, epoch and its position in the split alone; the order, if `shuffle`, on seed and epoch.
    processes=0 works in the calling process; more start with the first epoch and live as long as the loader.
    """

    def __init__(
        self,
        images: Pictures,
        split: Split,
        *,
        image_size: int,
        batch_size: int,
        augment: Augment | None = None,
        view: View | None = None,
        seed: int = 0,
        processes: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
    ) -> None:
        if augment is not None and view is not None:
            raise ValueError("a loader takes augment or view, not both")
        if drop_last and batch_size > len(split):
            raise ValueError(
                f"batch_size={batch_size} is more than the {len(split)} pictures of {split.name}, "
                f"and drop_last leaves none: take a smaller one"
            )
        self._pictures, self._batch_size, self._seed = len(split), batch_size, seed
        self._shuffle, self._drop_last = shuffle, drop_last
        self._size = image_size
        self._batches = _Batches(images, split, augment, view, seed)
        self._plan: list[_Plan] = []
        self._workers = _start_workers(self._batches, self._plan, processes) if processes else None

    def __len__(self) -> int:
        """Batches of an epoch."""
        spare = 0 if self._drop_last else self._batch_size - 1
        return (self._pictures + spare) // self._batch_size

    def orders(self, number: int) -> list[np.ndarray]:
        """Positions in the split, batch by batch, in epoch `number`, 0 or more."""
        order = np.arange(self._pictures)
        if self._shuffle:
            order = np.random.default_rng((self._seed, number)).permutation(order)
        return [order[n * self._batch_size : (n + 1) * self._batch_size] for n in range(len(self))]

    def epoch(
        self, number: int, *, like: int | None = None, size: int | None = None, strength: float = 1.0
    ) -> Iterator[Batch]:
        """The batches of epoch `number`, 0 or more; with `like`, of pictures as they are in that epoch.

        `size` in pixels is another one than the loader's. With a strength below 1 crops cut off that much
        less, and that share of the steps is taken.
        """
        shown, size = number if like is None else like, size or self._size
        plan = [_Plan(shown, order, size, strength) for order in self.orders(number)]
        if self._workers is None:
            return map(self._batches.__getitem__, plan)
        self._plan[:] = plan
        return iter(self._workers)


class _Batches(Dataset[Batch]):
    """Assembles the batch of an epoch and positions in the split; nothing is carried from one to the next."""

    def __init__(
        self,
        images: Pictures,
        split: Split,
        augment: Augment | None,
        view: View | None,
        seed: int,
    ) -> None:
        self._images, self._rows, self._seed = images, split.rows, seed
        self._labels = np.full(len(split), -1, np.int64) if split.labels is None else split.labels
        self._augment, self._view = augment, view or View()
        self._steps = [_transform(step) for step in augment.steps] if augment else []

    def __getitem__(self, plan: _Plan) -> Batch:
        pixels = np.empty((len(plan.positions), plan.size, plan.size, 3), np.uint8)
        for place, position in zip(pixels, plan.positions.tolist(), strict=True):
            picture = self._picture(plan, position, place)
            if picture is not place:
                place[:] = picture
        labels = torch.from_numpy(self._labels[plan.positions])
        return Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, plan.positions)

    def _picture(self, plan: _Plan, position: int, place: np.ndarray) -> np.ndarray:
        """(size, size, 3), in `place` or elsewhere."""
        picture = self._images[self._rows[position]]
        if self._augment is None:
            return seen(picture, self._view, plan.size)
        rng = _Generator(self._seed, plan.epoch, position)
        draw = random.Random((self._seed << 64) + (plan.epoch << 32) + position)
        crop = picture
        if self._augment.crop:
            least, most = (1 - plan.strength * (1 - share) for share in self._augment.crop)
            crop = _random_crop(picture, (least, most), draw)
        steps = self._steps
        if plan.strength < 1:
            steps = [step for step in steps if draw.random() < plan.strength]
        return _apply(steps, _squash_fast(crop, plan.size, place), rng, draw)


class _Generator:
    """numpy.random.default_rng of some numbers, made at its first use: few transforms use it, in 20 us."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._made = self.__dict__.get("_made") or np.random.default_rng(self._numbers)
        return getattr(self._made, name)


def _start_workers(batches: _Batches, plan: list[_Plan], processes: int) -> DataLoader[Batch]:
    return DataLoader(
        batches,
        batch_size=None,  # an item of the plan is a whole batch
        sampler=plan,
        num_workers=processes,
        timeout=PATIENCE,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=True,
        generator=torch.Generator(),  # an epoch draws from the global one otherwise
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def seen(picture: np.ndarray, view: View, size: int) -> np.ndarray:
    """(H, W, 3) -> (size, size, 3), as the view shows it (its scale is in `size`)."""
    height, width = picture.shape[:2]
    left, top, right, bottom = (
        round(share * side) for share, side in zip(view.box, (width, height) * 2, strict=True)
    )
    shown = squash(picture[top : max(bottom, top + 1), left : max(right, left + 1)], size)
    if view.flip:
        shown = shown[:, ::-1]
    if view.contrast == view.brightness == 1:
        return shown
    levels = ((np.arange(256) - 127.5) * view.contrast + 127.5) * view.brightness
    return levels.round().clip(0, 255).astype(np.uint8)[shown]


def squash(picture: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) -> (size, size, 3): area average along a side that shrinks, bilinear along one that grows."""
    height, width = picture.shape[:2]
    small = cv2.resize(picture, (min(width, size), min(height, size)), interpolation=cv2.INTER_AREA)
    if min(height, width) >= size:
        return small
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_LINEAR)


def _squash_fast(picture: np.ndarray, size: int, place: np.ndarray) -> np.ndarray:
    """`squash` into `place`, in less than half its time: bilinear, of four samples where one skips pixels.

    For training. Against `squash` of the decoded photograph, over random crops of sixty of cars9: median 39
    dB at 64 px, 43 at 128 px, 43 at 224 px; one bilinear sample of the whole file, as is usual, has 28, 34
    and 43 dB.
    """
    sides = picture.shape[:2]
    shrinks = max(sides) / size if size < _SHARP else math.sqrt(sides[0] * sides[1]) / size
    if shrinks <= (_BILINEAR_SHRINKS if size < _SHARP else _SHARP_SHRINKS):
        return cv2.resize(picture, (size, size), place, interpolation=cv2.INTER_LINEAR)
    double = cv2.resize(picture, (2 * size, 2 * size), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(double, (size, size), place, interpolation=cv2.INTER_AREA)


def _random_crop(picture: np.ndarray, shares: tuple[float, float], draw: random.Random) -> np.ndarray:
    """A view of a random part with the given share of the area, as RandomResizedCrop (Szegedy et al., 2015).

    The aspect ratio, 3/4 to 4/3, is relative to the picture's own, since the whole is squashed to a square as
    well: a crop of absolute ratio would always cut the ends off a wide car.
    """
    height, width = picture.shape[:2]
    area = draw.uniform(*shares)
    limit = -math.log(max(area, 3 / 4))  # beyond 1 / area a side would be longer than the picture's
    stretch = math.exp(draw.uniform(-limit, limit))
    crop_height = max(1, round(height * math.sqrt(area / stretch)))
    crop_width = max(1, round(width * math.sqrt(area * stretch)))
    top = int(draw.random() * (height - crop_height + 1))
    left = int(draw.random() * (width - crop_width + 1))
    return picture[top : top + crop_height, left : left + crop_width]


def _apply(
    transforms: Sequence[albumentations.BasicTransform],
    picture: np.ndarray,
    rng: _Generator,
    draw: random.Random,
) -> np.ndarray:
    """One pair of generators for all transforms.

    Compose.set_random_seed gives every transform the same seed, so that all decide by the same number whether
    they are applied (a flipped picture would always be jittered), and takes 25 to 75 microseconds a picture.
    """
    for transform in transforms:
        transform.set_random_state(rng, draw)
        picture = transform(image=picture)["image"]
    return picture


def _transform(step: Step) -> albumentations.BasicTransform:
    kind = getattr(albumentations, step.transform, None)
    if not (isinstance(kind, type) and issubclass(kind, albumentations.BasicTransform)):
        raise ValueError(f"albumentations {albumentations.__version__} has no transform {step.transform!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # all that it does about an argument it does not know
        try:
            return kind(**step.arguments)
        except (UserWarning, ValueError, TypeError) as error:
            raise ValueError(f"albumentations refuses {step}: {one_line(error)}") from None

"""Loaders: the images of a split, varied or shown through a view, as batches of 8-bit tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from carmodels.catalog import Augment, View
from carmodels.data.cache import ImageCache
from carmodels.data.splits import Split
from carmodels.data.transforms import (
    LazyGenerator,
    apply_transforms,
    make_transform,
    random_crop,
    resize_fast,
    seen,
)

PATIENCE = (
    900.0  # seconds for a batch, after which a loader process counts as hung and a RuntimeError says so
)

Images = ImageCache | Sequence[np.ndarray]  # (H, W, 3) uint8 each, by row


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

    An image is varied by `augment`, or shown as `view` says (whose scale is the caller's matter: it sets
    image_size), or neither: the whole image squashed to a square of image_size pixels. What it looks like
    depends on seed, epoch and its position in the split alone; the order, if `shuffle`, on seed and epoch.
    processes=0 works in the calling process; more start with the first epoch and live as long as the loader.
    """

    def __init__(
        self,
        images: Images,
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
                f"batch_size={batch_size} is more than the {len(split)} images of {split.name}, "
                f"and drop_last leaves none: take a smaller one"
            )
        self._images, self._batch_size, self._seed = len(split), batch_size, seed
        self._shuffle, self._drop_last = shuffle, drop_last
        self._size = image_size
        self._batches = _Batches(images, split, augment, view, seed)
        self._plan: list[_Plan] = []
        self._workers = _start_workers(self._batches, self._plan, processes) if processes else None

    def __len__(self) -> int:
        """Batches of an epoch."""
        spare = 0 if self._drop_last else self._batch_size - 1
        return (self._images + spare) // self._batch_size

    def orders(self, number: int) -> list[np.ndarray]:
        """Positions in the split, batch by batch, in epoch `number`, 0 or more."""
        order = np.arange(self._images)
        if self._shuffle:
            order = np.random.default_rng((self._seed, number)).permutation(order)
        return [order[n * self._batch_size : (n + 1) * self._batch_size] for n in range(len(self))]

    def epoch(
        self, number: int, *, like: int | None = None, size: int | None = None, strength: float = 1.0
    ) -> Iterator[Batch]:
        """The batches of epoch `number`, 0 or more; with `like`, of images as they are in that epoch.

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
        images: Images,
        split: Split,
        augment: Augment | None,
        view: View | None,
        seed: int,
    ) -> None:
        self._images, self._rows, self._seed = images, split.rows, seed
        self._labels = np.full(len(split), -1, np.int64) if split.labels is None else split.labels
        self._augment, self._view = augment, view or View()
        self._steps = [make_transform(step) for step in augment.steps] if augment else []

    def __getitem__(self, plan: _Plan) -> Batch:
        pixels = np.empty((len(plan.positions), plan.size, plan.size, 3), np.uint8)
        for place, position in zip(pixels, plan.positions.tolist(), strict=True):
            image = self._image(plan, position, place)
            if image is not place:
                place[:] = image
        labels = torch.from_numpy(self._labels[plan.positions])
        return Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, plan.positions)

    def _image(self, plan: _Plan, position: int, place: np.ndarray) -> np.ndarray:
        """(size, size, 3), in `place` or elsewhere."""
        image = self._images[self._rows[position]]
        if self._augment is None:
            return seen(image, self._view, plan.size)
        rng = LazyGenerator(self._seed, plan.epoch, position)
        draw = random.Random((self._seed << 64) + (plan.epoch << 32) + position)
        crop = image
        if self._augment.crop:
            least, most = (1 - plan.strength * (1 - share) for share in self._augment.crop)
            crop = random_crop(image, (least, most), draw)
        steps = self._steps
        if plan.strength < 1:
            steps = [step for step in steps if draw.random() < plan.strength]
        return apply_transforms(steps, resize_fast(crop, plan.size, place), rng, draw)


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

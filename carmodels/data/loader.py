"""Loads the images of a split, augmented or through a view, as batches of 8-bit tensors."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from carmodels.catalog import Augment, View
from carmodels.data.cache import ImageCache
from carmodels.data.splits import Split
from carmodels.data.transforms import (
    LazyGenerator,
    apply_transforms,
    apply_view,
    make_transform,
    random_crop,
    resize_fast,
)

LOADER_TIMEOUT = 900.0  # seconds for one batch; then the loader counts as hung
PREFETCHED = 2  # batches that each loader process has ready
_CHECK_SECONDS = 2.0  # between two looks at whether the processes live

ImageSource = ImageCache | Sequence[np.ndarray]  # (H, W, 3) uint8 each, by row


class LoaderLostError(RuntimeError):
    """A loader process died or hangs. Says nothing about the configuration: the machine is at fault."""


class Batch(NamedTuple):
    """Input of one step of training or prediction."""

    images: torch.Tensor  # (B, 3, S, S) uint8, channels_last
    labels: torch.Tensor  # (B,) int64, -1 where unknown
    positions: np.ndarray  # (B,) int64, in the split


class _BatchSpec(NamedTuple):
    """What a loader process needs to assemble one batch."""

    epoch: int
    positions: np.ndarray  # (B,) int64, in the split
    size: int  # side, pixels
    strength: float  # of the augmentation, 0 to 1


class Loader:
    """Batches of a split, epoch by epoch.

    Images are augmented by `augment`, or shown through `view`, or plain; each is resized to a square of
    image_size pixels. A view's scale is ignored here: the caller sets image_size by it. An image depends on
    seed, epoch and its position in the split alone, the order with `shuffle` on seed and epoch.

    processes=0 loads in the calling process. More start with the first epoch and live as long as the loader.
    Waiting for a batch raises LoaderLostError seconds after one of them died, or after LOADER_TIMEOUT.
    """

    def __init__(
        self,
        images: ImageSource,
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
        self._image_size = image_size
        self._batches = _Batches(images, split, augment, view, seed)
        self._specs: list[_BatchSpec] = []
        self._workers = _start_workers(self._batches, self._specs, processes) if processes else None

    def __len__(self) -> int:
        """Batches of an epoch."""
        spare = 0 if self._drop_last else self._batch_size - 1
        return (self._images + spare) // self._batch_size

    def batch_positions(self, epoch: int) -> list[np.ndarray]:
        """Positions in the split, one array a batch, in epoch 0 or later."""
        order = np.arange(self._images)
        if self._shuffle:
            order = np.random.default_rng((self._seed, epoch)).permutation(order)
        return [order[n * self._batch_size : (n + 1) * self._batch_size] for n in range(len(self))]

    def epoch(
        self, number: int, *, augment_epoch: int | None = None, size: int | None = None, strength: float = 1.0
    ) -> Iterator[Batch]:
        """The batches of epoch `number`, 0 or later, in its order.

        With `augment_epoch` the images are augmented as in that epoch. `size`, in pixels, replaces
        image_size. A strength below 1 scales down what crops cut off, and is the probability of each
        further augmentation step.
        """
        augment_epoch, size = number if augment_epoch is None else augment_epoch, size or self._image_size
        specs = [
            _BatchSpec(augment_epoch, positions, size, strength) for positions in self.batch_positions(number)
        ]
        if self._workers is None:
            return map(self._batches.__getitem__, specs)
        self._specs[:] = specs
        return iter(self._workers)


class _Batches(Dataset[Batch]):
    """Assembles a batch from its specification. Keeps no state between batches."""

    def __init__(
        self,
        images: ImageSource,
        split: Split,
        augment: Augment | None,
        view: View | None,
        seed: int,
    ) -> None:
        self._images, self._rows, self._seed = images, split.rows, seed
        self._labels = np.full(len(split), -1, np.int64) if split.labels is None else split.labels
        self._augment, self._view = augment, view or View()
        self._steps = [make_transform(step) for step in augment.steps] if augment else []

    def __getitem__(self, spec: _BatchSpec) -> Batch:
        pixels = np.empty((len(spec.positions), spec.size, spec.size, 3), np.uint8)
        for out, position in zip(pixels, spec.positions.tolist(), strict=True):
            image = self._image(spec, position, out)
            if image is not out:
                out[:] = image
        labels = torch.from_numpy(self._labels[spec.positions])
        return Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, spec.positions)

    def _image(self, spec: _BatchSpec, position: int, out: np.ndarray) -> np.ndarray:
        """(size, size, 3), which may or may not be `out`."""
        image = self._images[self._rows[position]]
        if self._augment is None:
            return apply_view(image, self._view, spec.size)
        rng = LazyGenerator(self._seed, spec.epoch, position)
        py_random = random.Random((self._seed << 64) + (spec.epoch << 32) + position)
        if self._augment.crop:
            smallest, largest = (1 - spec.strength * (1 - share) for share in self._augment.crop)
            image = random_crop(image, (smallest, largest), py_random)
        steps = self._steps
        if spec.strength < 1:
            steps = [step for step in steps if py_random.random() < spec.strength]
        return apply_transforms(steps, resize_fast(image, spec.size, out), rng, py_random)


def _start_workers(batches: _Batches, specs: list[_BatchSpec], processes: int) -> DataLoader[Batch]:
    return _Workers(
        batches,
        batch_size=None,  # each item is a whole batch already
        sampler=specs,
        num_workers=processes,
        prefetch_factor=PREFETCHED,
        timeout=LOADER_TIMEOUT,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=True,
        generator=torch.Generator(),  # otherwise an epoch draws from the global one
    )


class _Workers(DataLoader[Batch]):
    """A DataLoader with a time-out that notices dead processes at once."""

    def _get_iterator(self) -> _CheckedIterator:
        return _CheckedIterator(self)


class _CheckedIterator(_MultiProcessingDataLoaderIter):
    """Waits for a batch in short steps: after each, torch looks whether the processes live.

    With a time-out torch looks only when that is over. Its signal handler works in the main thread alone, and
    Ray trains in another.
    """

    def _try_get_data(self, timeout: float = LOADER_TIMEOUT) -> tuple[bool, Any]:
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            try:
                arrived, batch = super()._try_get_data(min(_CHECK_SECONDS, left))
            except (RuntimeError, OSError, EOFError) as error:  # what a dead process leaves of its batch
                raise LoaderLostError(f"a loader process was lost: {error!r}") from error
            if arrived:
                return True, batch
        raise LoaderLostError(f"DataLoader timed out after {timeout:g} seconds: a loader process hangs")


def _identity(batch: Any) -> Any:
    return batch

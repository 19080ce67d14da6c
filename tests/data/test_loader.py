"""A loader process that dies or hangs ends the wait for a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch

from carmodels.data import loader as loaders
from carmodels.data.loader import Batch, Loader, LoaderLostError
from carmodels.data.splits import Split

IMAGES = [np.zeros((40, 40, 3), np.uint8)] * 64
SPLIT = Split("val", tuple(map(str, range(64))), None, np.arange(64))


class Broken(list):
    """Images of which one cannot be read."""

    def __getitem__(self, row: int) -> np.ndarray:
        if int(row) == 3:
            raise RuntimeError("DataLoader timed out, says the image")
        image: np.ndarray = super().__getitem__(int(row))
        return image


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "_CHECK_SECONDS", 0.2)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # the wait for its end


def kill_one(before: set[psutil.Process]) -> None:
    started = set(psutil.Process().children()) - before
    min(started, key=lambda process: process.pid).kill()


def seconds_to_notice(batches: Callable[[], Iterator[Batch]]) -> float:
    started = time.monotonic()
    with pytest.raises(LoaderLostError, match="a loader process was lost"):
        list(batches())
    return time.monotonic() - started


@pytest.mark.parametrize("between_epochs", [False, True])
def test_a_dead_process_is_noticed_within_seconds_in_any_thread(between_epochs: bool) -> None:
    """Ray trains in a thread where torch's signal handler does not work."""

    def lose_one() -> float:
        before = set(psutil.Process().children())
        loader = Loader(IMAGES, SPLIT, image_size=32, batch_size=2, processes=2)
        batches = loader.epoch(0)
        next(batches)
        if between_epochs:
            list(batches)
        kill_one(before)
        return seconds_to_notice(lambda: loader.epoch(1) if between_epochs else batches)

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(lose_one).result(timeout=60) < 10


def test_what_goes_wrong_with_an_image_keeps_its_own_error() -> None:
    loader = Loader(Broken(IMAGES), SPLIT, image_size=32, batch_size=2, processes=1)
    with pytest.raises(RuntimeError, match="says the image") as caught:
        list(loader.epoch(0))
    assert not isinstance(caught.value, LoaderLostError)

"""The image cache: every image decoded once to upright 8-bit RGB, shrunk, in one memory-mapped file.

All workers of a node share the file through the page cache, so another worker costs no memory.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from filelock import FileLock

from carmodels.data.decode import OVERSIZE_FACTOR, BrokenImage, decode_slot, header_size, read_image, shrink
from carmodels.data.digests import DamagedCache, read_checksummed, write_checksummed
from carmodels.data.duplicates import near_duplicate_groups, perceptual_hash

CACHE_VERSION = 3  # raise it whenever the cached bytes would differ
CACHE_LIMIT_BYTES = 100 * 2**30  # of all caches in a folder
RESERVED_DISK_BYTES = 2**30  # left free on the disk after a cache is built
_CHUNK = 64  # images decoded before they are written, which bounds memory
_SAMPLED_HEADERS = 256  # images read for an estimate of the size
_UNUSED_SECONDS = 7 * 86400  # since it was last opened, before a cache may be evicted
DecodeProgress = Callable[[int, int], None]  # images done, images in all


class ImageCache:
    """Read-only images in a folder that `open_images` made. Pickles as its path and reopens there.

    `rows` (P,) is the row of each source path, -1 for a broken image. `broken` is the reason by position in
    those paths. `hashes` (N,) and `groups` (N,) are as in `near_duplicate_groups`.

    Raises DamagedCache. Checksums are verified only if the pixel file changed since it was built or last
    verified, as in a copy with another modification time.
    """

    def __init__(self, path: Path) -> None:
        index = read_checksummed(path / "index.json")
        self.path = path
        self.broken: dict[int, str] = dict(index["broken"])
        self.hashes = np.array(index["hashes"], dtype=np.uint64)
        self.groups = np.array(index["groups"], dtype=np.int64)
        self._shapes: list[tuple[int, int]] = [(height, width) for height, width in index["shapes"]]
        self._ends = np.cumsum([0] + [height * width * 3 for height, width in self._shapes]).tolist()
        self._pixels = _map_pixels(path / "pixels.bin", self._ends[-1])
        written = (path / "pixels.bin").stat().st_mtime_ns
        if written != index["written"]:
            self._verify(index["checksums"])
            with contextlib.suppress(OSError):  # as below
                write_checksummed(path / "index.json", {**index, "written": written})
        with contextlib.suppress(OSError):  # in a folder that is not ours to write to
            os.utime(path / "index.json")  # `_evict_unused` reads it
        intact = np.array(
            [position not in self.broken for position in range(len(self) + len(self.broken))], bool
        )
        self.rows = np.where(intact, np.cumsum(intact) - 1, -1)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8, a view of the file."""
        start, end = self._ends[row], self._ends[row + 1]
        return self._pixels[start:end].reshape(*self._shapes[row], 3)

    def __reduce__(self) -> tuple[type[ImageCache], tuple[Path]]:
        return ImageCache, (self.path,)

    def _verify(self, checksums: list[int]) -> None:
        for row, checksum in enumerate(checksums):
            if zlib.crc32(self[row].data) != checksum:
                raise DamagedCache(f"{str(self.path)!r} is damaged: open the data set again to rebuild it")


def _map_pixels(path: Path, size: int) -> np.ndarray:
    actual = path.stat().st_size if path.is_file() else -1
    if actual != size:
        raise DamagedCache(
            f"{str(path)!r} holds {actual} bytes, not {size}: open the data set again to rebuild it"
        )
    if size == 0:
        return np.empty(0, np.uint8)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, np.uint8, mode="r"))  # a plain array is faster to slice than a memmap


def open_images(
    paths: Sequence[Path],
    folder: Path,
    max_size: int,
    on_progress: DecodeProgress | None,
    *,
    on_estimate: Callable[[int], None] | None = None,
    on_damage: Callable[[str], None] | None = None,
    limit: int = CACHE_LIMIT_BYTES,
) -> ImageCache:
    """The cache of `paths` at `folder`, built if it is missing or damaged. One process builds, others wait.

    `folder` must name the content of the files and `max_size`: an intact cache is used as it is.
    `on_damage(reason)` is called before a damaged cache is rebuilt, `on_estimate(size)` with the bytes that a
    new cache will take.

    Caches beside `folder` that were not opened for a week are evicted, oldest first, until the new one fits
    into `limit` bytes and onto the disk. ValueError if it still does not fit.
    """
    with contextlib.suppress(DamagedCache):
        return ImageCache(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        try:
            return ImageCache(folder)
        except DamagedCache as error:
            if on_damage is not None and folder.exists():
                on_damage(str(error))
        unfinished = folder.with_name(f"{folder.name}.tmp")
        for leftover in (unfinished, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        with FileLock(folder.parent / ".room.lock"):  # two processes must not evict at once
            estimate = estimate_cache_bytes(paths, max_size)
            if on_estimate is not None:
                on_estimate(estimate)
            _evict_unused(folder, max_size, estimate, limit)
        unfinished.mkdir()
        try:
            _build(paths, unfinished, max_size, on_progress or (lambda done, total: None))
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return ImageCache(folder)


def estimate_cache_bytes(paths: Sequence[Path], max_size: int) -> int:
    """About the size of the cache of `paths`, from a sample of the image headers."""
    sample = paths[:: max(1, len(paths) // _SAMPLED_HEADERS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = [size for size in map(header_size, sample) if size]
    scales = [min(1.0, OVERSIZE_FACTOR * max_size / min(size)) for size in sizes]
    areas = [scale**2 * width * height for scale, (width, height) in zip(scales, sizes, strict=True)]
    return round(3 * float(np.mean(areas)) * len(paths)) if areas else 0


def _evict_unused(folder: Path, max_size: int, estimate: int, limit: int) -> None:
    """Delete unused caches beside `folder` until one of `estimate` bytes fits. ValueError if it cannot."""
    others = {index.parent: _last_used(index) for index in folder.parent.glob("*/index.json")}
    sizes = {cache: size for cache, (_, size) in others.items()}
    free = shutil.disk_usage(folder.parent).free - RESERVED_DISK_BYTES
    for cache, (used, _) in sorted(others.items(), key=lambda item: item[1]):
        if estimate <= min(limit - sum(sizes.values()), free):
            return
        if time.time() - used > _UNUSED_SECONDS:
            shutil.rmtree(cache, ignore_errors=True)
            free += sizes.pop(cache)
    room = min(limit - sum(sizes.values()), free)
    if estimate > room:
        raise ValueError(
            f"the images at up to {max_size} px would take {estimate / 1e9:.1f} GB in "
            f"{str(folder.parent)!r}, where there is room for {max(0, room) / 1e9:.1f} GB: give --cache DIR "
            f"on a larger disk, a larger --cache-limit, or smaller sizes with --set image_size=..."
        )


def _last_used(index: Path) -> tuple[float, int]:
    """A cache's time of last use and its bytes. Infinity and 0 while another process renames it."""
    try:
        return index.stat().st_mtime, sum(file.stat().st_size for file in index.parent.iterdir())
    except FileNotFoundError:
        return math.inf, 0


def _build(paths: Sequence[Path], folder: Path, max_size: int, on_progress: DecodeProgress) -> None:
    shapes, hashes, checksums, broken = [], [], [], []
    with (folder / "pixels.bin").open("wb") as file:
        for position, decoded in enumerate(_decode_all(paths, max_size)):
            if isinstance(decoded, BrokenImage):
                broken.append((position, str(decoded)))
            else:
                pixels, code = decoded
                shapes.append(pixels.shape[:2])
                hashes.append(code)
                checksums.append(zlib.crc32(pixels.data))
                file.write(pixels.data)
            on_progress(position + 1, len(paths))
        file.flush()
        os.fsync(file.fileno())
    groups = near_duplicate_groups(np.array(hashes, dtype=np.uint64)).tolist()
    write_checksummed(
        folder / "index.json",
        {
            "shapes": shapes,
            "hashes": hashes,
            "groups": groups,
            "broken": broken,
            "checksums": checksums,
            "written": (folder / "pixels.bin").stat().st_mtime_ns,
        },
    )


def _decode_all(paths: Sequence[Path], max_size: int) -> Iterator[tuple[np.ndarray, int] | BrokenImage]:
    """Each image's pixels, (H, W, 3) uint8, and perceptual hash, or the reason why it is broken."""

    def decode(path: Path) -> tuple[np.ndarray, int] | BrokenImage:
        try:
            with decode_slot(path):
                image = read_image(path)
                return shrink(image, max_size), perceptual_hash(image)
        except BrokenImage as reason:
            return reason

    # Threads are enough: Pillow decodes without the GIL.
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata, and about images over half the bomb limit
        for start in range(0, len(paths), _CHUNK):
            yield from pool.map(decode, paths[start : start + _CHUNK])

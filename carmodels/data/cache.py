"""Images decoded once: files of any kind to upright RGB, kept shrunk and 8-bit in one memory-mapped file.

Every worker of a node reads the same file through the page cache, so a further worker costs no memory.
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

from carmodels.data.decode import SPARE, BrokenImage, header_size, read_image, room_for, shrink
from carmodels.data.digests import DamagedCache, read_checked, write_checked
from carmodels.data.duplicates import near_duplicate_groups, perceptual_hash

CACHE_VERSION = 3  # raise it whenever the bytes in the cache would come out differently
_CHUNK = 64  # images decoded before they are written out, which bounds memory
LIMIT = 100 * 2**30  # bytes of all caches in a folder
SPARE_DISK = 2**30  # bytes that building a cache leaves on the disk
_SAMPLE = 256  # images whose headers are read for an estimate
_UNUSED_SECONDS = 7 * 86400  # since it was last opened, before a cache may make room for another
Progress = Callable[[int, int], None]  # images done, images in all
Estimate = Callable[[int], None]  # bytes that a cache will take on disk
Damage = Callable[[str], None]  # what is wrong with a cache that is rebuilt


class ImageCache:
    """Read-only images in a folder that `open_images` made; pickles as its path and re-opens there.

    `rows` (P,) gives the row of each path the cache was made from, -1 for a broken one; `broken` the reason,
    by position; `hashes` (N,) and `groups` (N,) are as in `near_duplicate_groups`. Raises DamagedCache: the
    pixels are held against their checksums where the file was written to since it was made.
    """

    def __init__(self, path: Path) -> None:
        index = read_checked(path / "index.json")
        self.path = path
        self.broken: dict[int, str] = dict(index["broken"])
        self.hashes = np.array(index["hashes"], dtype=np.uint64)
        self.groups = np.array(index["groups"], dtype=np.int64)
        self._shapes: list[tuple[int, int]] = [(height, width) for height, width in index["shapes"]]
        self._ends = np.cumsum([0] + [height * width * 3 for height, width in self._shapes]).tolist()
        self._pixels = _map_pixels(path / "pixels.bin", self._ends[-1])
        if (path / "pixels.bin").stat().st_mtime_ns != index["written"]:
            self._check(index["checksums"])
        with contextlib.suppress(OSError):  # of a folder that is not ours to write to
            os.utime(path / "index.json")  # for `_make_room`
        good = np.array(
            [position not in self.broken for position in range(len(self) + len(self.broken))], bool
        )
        self.rows = np.where(good, np.cumsum(good) - 1, -1)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8, a view of the file."""
        start, end = self._ends[row], self._ends[row + 1]
        return self._pixels[start:end].reshape(*self._shapes[row], 3)

    def __reduce__(self) -> tuple[type[ImageCache], tuple[Path]]:
        return ImageCache, (self.path,)

    def _check(self, checksums: list[int]) -> None:
        for row, checksum in enumerate(checksums):
            if zlib.crc32(self[row].data) != checksum:
                raise DamagedCache(f"{str(self.path)!r} is damaged: open the data set again to rebuild it")


def _map_pixels(path: Path, size: int) -> np.ndarray:
    found = path.stat().st_size if path.is_file() else -1
    if found != size:
        raise DamagedCache(
            f"{str(path)!r} holds {found} bytes, not {size}: open the data set again to rebuild it"
        )
    if size == 0:
        return np.empty(0, np.uint8)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, np.uint8, mode="r"))  # slicing a plain array is faster than a memmap


def open_images(
    paths: Sequence[Path],
    folder: Path,
    max_size: int,
    on_progress: Progress | None,
    *,
    on_estimate: Estimate | None = None,
    on_damage: Damage | None = None,
    limit: int = LIMIT,
) -> ImageCache:
    """The cache of `paths` at `folder`, built if it is missing or damaged; one process builds, others wait.

    `folder` must name the content of the files and `max_size`, since an intact cache is taken as it is.
    Before one is built `on_estimate` is told its size, and caches beside it that were not opened for a week
    make room for it, the oldest first; ValueError where it would not fit into `limit` bytes, or onto the
    disk. `on_damage` is told what is wrong with one that is there and rebuilt.
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
        with FileLock(folder.parent / ".room.lock"):  # what one has seen another must not delete meanwhile
            _make_room(folder, max_size, estimated_bytes(paths, max_size, on_estimate), limit)
        unfinished.mkdir()
        try:
            _build(paths, unfinished, max_size, on_progress or (lambda done, total: None))
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return ImageCache(folder)


def estimated_bytes(paths: Sequence[Path], max_size: int, on_estimate: Estimate | None = None) -> int:
    """About what the cache of `paths` will take, from the headers of some of them."""
    chosen = paths[:: max(1, len(paths) // _SAMPLE)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = [size for size in map(header_size, chosen) if size]
    shares = [min(1.0, SPARE * max_size / min(size)) ** 2 for size in sizes]
    areas = [share * width * height for share, (width, height) in zip(shares, sizes, strict=True)]
    estimate = round(3 * float(np.mean(areas)) * len(paths)) if areas else 0
    if on_estimate is not None:
        on_estimate(estimate)
    return estimate


def _make_room(folder: Path, max_size: int, estimate: int, limit: int) -> None:
    """Delete what was not used lately until the cache fits beside the others; ValueError where it cannot."""
    others = {index.parent: _used(index) for index in folder.parent.glob("*/index.json")}
    sizes = {cache: size for cache, (_, size) in others.items()}
    free = shutil.disk_usage(folder.parent).free - SPARE_DISK
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


def _used(index: Path) -> tuple[float, int]:
    """When a cache was used last, and its bytes; one that another process moves just now is new and empty."""
    try:
        return index.stat().st_mtime, sum(file.stat().st_size for file in index.parent.iterdir())
    except FileNotFoundError:
        return math.inf, 0


def _build(paths: Sequence[Path], folder: Path, max_size: int, on_progress: Progress) -> None:
    shapes, hashes, checksums, broken = [], [], [], []
    with (folder / "pixels.bin").open("wb") as file:
        for position, found in enumerate(_decode_all(paths, max_size)):
            if isinstance(found, BrokenImage):
                broken.append((position, str(found)))
            else:
                pixels, code = found
                shapes.append(pixels.shape[:2])
                hashes.append(code)
                checksums.append(zlib.crc32(pixels.data))
                file.write(pixels.data)
            on_progress(position + 1, len(paths))
        file.flush()
        os.fsync(file.fileno())
    groups = near_duplicate_groups(np.array(hashes, dtype=np.uint64)).tolist()
    write_checked(
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
    def decode(path: Path) -> tuple[np.ndarray, int] | BrokenImage:
        try:
            with room_for(path):
                image = read_image(path)
                return shrink(image, max_size), perceptual_hash(image)
        except BrokenImage as reason:
            return reason

    with (
        ThreadPoolExecutor() as pool,
        warnings.catch_warnings(),
    ):  # threads do: Pillow decodes without the GIL
        warnings.simplefilter(
            "ignore"
        )  # odd metadata, and sizes between half and the whole of the bomb limit
        for start in range(0, len(paths), _CHUNK):
            yield from pool.map(decode, paths[start : start + _CHUNK])

"""Pictures decoded once: files of any kind to upright RGB, kept shrunk and 8-bit in one memory-mapped file.

Every worker of a node reads the same file through the page cache, so a further worker costs no memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import imagehash
import numpy as np
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from carmodels.files import write_whole

cv2.setNumThreads(0)  # OpenCV takes every core of the machine otherwise, in each worker that imports this

CACHE_VERSION = 3  # raise it whenever the bytes in the cache would come out differently
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # by content, whatever the file is called
# The cache's shorter side over the largest image size. On 150 photographs of cars9 every one came out within
# 40 dB of decoding afresh, at 96 to 224 px as largest size; at 1.75 one did not, at 1.5 twelve, at 1.25 half
# of them.
SPARE = 2.0
DUPLICATE_BITS = 6  # of 64; on cars9 all three pairs up to 6 are the same photograph, at 8 it is one in five
MOST_ALIKE = 0.01  # of all pictures that near-duplicates of one may be
LARGE = 30e6  # pixels from which on pictures are decoded one at a time: they take 4 bytes each
# what Pillow lets out on damaged files, as found by trying some thousands
_PARSER_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, struct.error)
_CHUNK = 64  # pictures decoded before they are written out, which bounds memory

LIMIT = 100 * 2**30  # bytes of all caches in a folder
SPARE_DISK = 2**30  # bytes that building a cache leaves on the disk
_SAMPLE = 256  # pictures whose headers are read for an estimate
_UNUSED_SECONDS = 7 * 86400  # since it was last opened, before a cache may make room for another

Progress = Callable[[int, int], None]  # pictures done, pictures in all
Estimate = Callable[[int], None]  # bytes that a cache will take on disk
Damage = Callable[[str], None]  # what is wrong with a cache that is rebuilt


class BrokenPicture(ValueError):
    """The file is missing, empty, of another kind or damaged; the message is the reason alone."""


class DamagedCache(ValueError):
    """The cache folder is missing, incomplete or altered."""


def read_picture(path: Path) -> Image.Image:
    """The picture at `path` as upright 8-bit RGB, transparent parts on white (as shops show cut-out cars).

    Raises BrokenPicture, or ValueError for a picture of more than 178 megapixels (Pillow's bomb limit).
    """
    try:
        if not path.is_file():  # a named pipe would be waited for, for ever
            raise BrokenPicture(_no_file(path))
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            _turn_upright(image)
            return _as_rgb(image)
    except BrokenPicture:
        raise
    except UnidentifiedImageError:
        raise BrokenPicture(_unknown_kind(path)) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{str(path)!r} is too large: {error}; remove or shrink it") from None
    except _PARSER_ERRORS as error:
        _raise_machine_trouble(error)
        raise BrokenPicture(f"it cannot be decoded: {error}") from None


def _turn_upright(image: Image.Image) -> None:
    """As EXIF says; as it is stored where EXIF is damaged, as viewers show it."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except _PARSER_ERRORS as error:
        _raise_machine_trouble(error)


_one_large = threading.Lock()


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """While a picture is decoded: of large ones, by their headers, one at a time in this process."""
    size = _header_size(path)
    with _one_large if size and size[0] * size[1] > LARGE else contextlib.nullcontext():
        yield


def _raise_machine_trouble(error: Exception) -> None:
    """Too few file handles or too little memory say nothing about the file that was being read."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error


def _no_file(path: Path) -> str:
    if path.exists():
        return "it is a folder or a device, no file"
    return "the link leads to no file" if path.is_symlink() else "the file is missing"


def _unknown_kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    return f"not a JPEG, PNG, WebP or BMP picture: it begins with {start!r}" if start else "the file is empty"


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def shrink(image: Image.Image, max_size: int) -> np.ndarray:
    """(H, W, 3) uint8 whose shorter side is 2 * max_size pixels, or less where the picture is smaller.

    Lanczos, since resizing again to what a trial asks for is then closest to resizing the original: 3 dB
    better than an area average at max_size.
    """
    scale = min(1.0, SPARE * max_size / min(image.size))
    if scale < 1.0:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(image)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that near-duplicates nearly share (`imagehash.phash`); the cache's max_size plays no part."""
    return int(str(imagehash.phash(image.resize((64, 64), Image.Resampling.BOX))), 16)


def near_duplicate_groups(hashes: np.ndarray) -> np.ndarray:
    """hashes (N,) uint64 -> (N,) int64: the first row of the group that each row belongs to.

    Rows are linked where at most `DUPLICATE_BITS` bits differ; a group is what hangs together by links. Many
    pictures of little detail hang together though they are no copies: groups of more than `MOST_ALIKE` of
    all, and of 20, are cut by ever stricter links.
    """
    distinct, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    group, most = np.zeros(len(distinct), np.int64), max(20, MOST_ALIKE * len(hashes))
    for bits in range(DUPLICATE_BITS, -1, -1):
        rows = np.bincount(group, weights=counts)
        for large in np.flatnonzero(rows > most) if bits < DUPLICATE_BITS else [0]:
            members = np.flatnonzero(group == large)
            group[members] = group.max(initial=0) + 1 + _linked(distinct[members], bits)
    _, first, inverse = np.unique(group[inverse], return_index=True, return_inverse=True)
    return first[inverse]


def _linked(hashes: np.ndarray, bits: int) -> np.ndarray:
    """hashes (N,) -> (N,) number of the group, by links where at most so many bits differ."""
    pairs = np.concatenate([np.empty((0, 2), np.int64), *_close_pairs(hashes, bits)])
    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(len(hashes),) * 2)
    found: np.ndarray = connected_components(links, directed=False)[1]
    return found


def _close_pairs(hashes: np.ndarray, bits: int, block: int = 256) -> Iterator[np.ndarray]:
    for start in range(0, len(hashes), block):
        distance = np.bitwise_count(hashes[start : start + block, None] ^ hashes[None, start:])
        yield np.argwhere(distance <= bits) + start


class ImageCache:
    """Read-only pictures in a folder that `open_images` made; pickles as its path and re-opens there.

    `rows` (P,) gives the row of each path the cache was made from, -1 for a broken one; `broken` the reason,
    by position; `hashes` (N,) and `groups` (N,) are as in `near_duplicate_groups`. Raises DamagedCache: the
    pixels are held against their checksums where the file was written to since it was made.
    """

    def __init__(self, path: Path) -> None:
        index = _read_checked(path / "index.json")
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
        sizes = [size for size in map(_header_size, chosen) if size]
    shares = [min(1.0, SPARE * max_size / min(size)) ** 2 for size in sizes]
    areas = [share * width * height for share, (width, height) in zip(shares, sizes, strict=True)]
    estimate = round(3 * float(np.mean(areas)) * len(paths)) if areas else 0
    if on_estimate is not None:
        on_estimate(estimate)
    return estimate


def _header_size(path: Path) -> tuple[int, int] | None:
    try:
        if not path.is_file():
            return None
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except (*_PARSER_ERRORS, Image.DecompressionBombError):
        return None  # reading it whole will tell


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
            f"the pictures at up to {max_size} px would take {estimate / 1e9:.1f} GB in "
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
            if isinstance(found, BrokenPicture):
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
    _write_checked(
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


def _decode_all(paths: Sequence[Path], max_size: int) -> Iterator[tuple[np.ndarray, int] | BrokenPicture]:
    def decode(path: Path) -> tuple[np.ndarray, int] | BrokenPicture:
        try:
            with room_for(path):
                image = read_picture(path)
                return shrink(image, max_size), perceptual_hash(image)
        except BrokenPicture as reason:
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


def file_digests(paths: Sequence[Path], manifest: Path) -> list[str]:
    """SHA-256 of each file's bytes in hex, "" for one that cannot be read.

    `manifest` remembers digests by path, size and modification time, so that unchanged files are not read.
    """
    known: dict[str, list[Any]] = {}
    with contextlib.suppress(DamagedCache):
        known = _read_checked(manifest)

    def entry(path: Path) -> list[Any]:
        try:
            if not path.is_file():
                return [None, None, ""]
            stat = path.stat()
            old = known.get(str(path), [None, None, ""])
            if old[:2] == [stat.st_size, stat.st_mtime_ns]:
                return old
            with path.open("rb") as file:
                return [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            _raise_machine_trouble(error)
            return [None, None, ""]

    with ThreadPoolExecutor() as pool:
        entries = dict(zip(map(str, paths), pool.map(entry, paths), strict=True))
    if entries != known:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        _write_checked(manifest, entries)
    return [entries[str(path)][2] for path in paths]


def _write_checked(path: Path, value: Any) -> None:
    """Write JSON below a line that holds its SHA-256; whole or not at all."""
    body = json.dumps(value).encode()
    write_whole(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _read_checked(path: Path) -> Any:
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCache(f"{str(path)!r} is missing: open the data set again to rebuild it") from None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedCache(f"{str(path)!r} is damaged: open the data set again to rebuild it")
    return json.loads(body)

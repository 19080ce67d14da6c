"""Image files of any kind to upright 8-bit RGB."""

from __future__ import annotations

import contextlib
import errno
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

cv2.setNumThreads(0)  # OpenCV takes every core of the machine otherwise, in each worker that imports this
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # by content, whatever the file is called

# The cache's shorter side over the largest image size. On 150 photographs of cars9 every one came out within
# 40 dB of decoding afresh, at 96 to 224 px as largest size; at 1.75 one did not, at 1.5 twelve, at 1.25 half
# of them.
SPARE = 2.0
LARGE = 30e6  # pixels from which on images are decoded one at a time: they take 4 bytes each

# what Pillow lets out on damaged files, as found by trying some thousands
_PARSER_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, struct.error)


class BrokenImage(ValueError):
    """The file is missing, empty, of another kind or damaged; the message is the reason alone."""


def read_image(path: Path) -> Image.Image:
    """The image at `path` as upright 8-bit RGB, transparent parts on white (as shops show cut-out cars).

    Raises BrokenImage, or ValueError for an image of more than 178 megapixels (Pillow's bomb limit).
    """
    try:
        if not path.is_file():  # a named pipe would be waited for, for ever
            raise BrokenImage(_no_file(path))
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            _turn_upright(image)
            return _as_rgb(image)
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        raise BrokenImage(_unknown_kind(path)) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{str(path)!r} is too large: {error}; remove or shrink it") from None
    except _PARSER_ERRORS as error:
        raise_machine_trouble(error)
        raise BrokenImage(f"it cannot be decoded: {error}") from None


def _turn_upright(image: Image.Image) -> None:
    """As EXIF says; as it is stored where EXIF is damaged, as viewers show it."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except _PARSER_ERRORS as error:
        raise_machine_trouble(error)


_one_large = threading.Lock()


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """While an image is decoded: of large ones, by their headers, one at a time in this process."""
    size = header_size(path)
    with _one_large if size and size[0] * size[1] > LARGE else contextlib.nullcontext():
        yield


def raise_machine_trouble(error: Exception) -> None:
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
    return f"not a JPEG, PNG, WebP or BMP image: it begins with {start!r}" if start else "the file is empty"


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def shrink(image: Image.Image, max_size: int) -> np.ndarray:
    """(H, W, 3) uint8 whose shorter side is 2 * max_size pixels, or less where the image is smaller.

    Lanczos, since resizing again to what a trial asks for is then closest to resizing the original: 3 dB
    better than an area average at max_size.
    """
    scale = min(1.0, SPARE * max_size / min(image.size))
    if scale < 1.0:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(image)


def header_size(path: Path) -> tuple[int, int] | None:
    try:
        if not path.is_file():
            return None
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except (*_PARSER_ERRORS, Image.DecompressionBombError):
        return None  # reading it whole will tell

"""Decodes image files to upright 8-bit RGB and shrinks them for the cache."""

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

cv2.setNumThreads(0)  # otherwise OpenCV takes every core, in each worker that imports this
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # recognised by content, not by the file's name

# The shorter side of a cached image over the largest image size that trials use. Measured on 150 photographs
# of cars9, with 96 to 224 px as largest size, against resizing the decoded file: with 2.0 all reach 40 dB,
# with 1.75 all but one, with 1.5 all but twelve, with 1.25 half of them.
OVERSIZE_FACTOR = 2.0
LARGE_PIXELS = 30e6  # larger images are decoded one at a time: decoding takes 4 bytes a pixel

# What Pillow raises on damaged files, found by trying some thousands.
_PARSER_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, struct.error)


class BrokenImage(ValueError):
    """The file is missing, empty, of another kind or damaged; the message is the reason alone."""


def read_image(path: Path) -> Image.Image:
    """The image at `path` as upright 8-bit RGB. Transparent parts become white, as in shop photographs.

    Raises BrokenImage, or ValueError for an image of more than 178 megapixels (Pillow's bomb limit).
    """
    try:
        if not path.is_file():  # opening a named pipe would block for ever
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
        reraise_resource_error(error)
        raise BrokenImage(f"it cannot be decoded: {error}") from None


def _turn_upright(image: Image.Image) -> None:
    """Rotate in place as EXIF says. Damaged EXIF is ignored, as image viewers do."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except _PARSER_ERRORS as error:
        reraise_resource_error(error)


_large_image_lock = threading.Lock()


@contextlib.contextmanager
def decode_slot(path: Path) -> Iterator[None]:
    """Hold this while decoding. Large images, judged by their headers, take turns within the process."""
    size = header_size(path)
    with _large_image_lock if size and size[0] * size[1] > LARGE_PIXELS else contextlib.nullcontext():
        yield


def reraise_resource_error(error: Exception) -> None:
    """Raise an error that is the machine's (no file handles, no memory) and not the file's; ignore others."""
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
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it to white
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def shrink(image: Image.Image, max_size: int) -> np.ndarray:
    """(H, W, 3) uint8 with a shorter side of 2 * max_size pixels. Smaller images keep their size.

    Uses Lanczos: a second resize to a trial's image size then comes closest to resizing the original, 3 dB
    closer at max_size than with an area average.
    """
    scale = min(1.0, OVERSIZE_FACTOR * max_size / min(image.size))
    if scale < 1.0:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(image)


def header_size(path: Path) -> tuple[int, int] | None:
    """Width and height by the file's header, pixels. None if it cannot be read."""
    try:
        if not path.is_file():
            return None
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except (*_PARSER_ERRORS, Image.DecompressionBombError):
        return None  # `read_image` will give the reason

"""Thumbnails of an ensemble's worst mistakes, with occlusion maps of the answer."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from carmodels.data.dataset import Splits
from carmodels.ensembling.network import Ensemble
from carmodels.ensembling.occlusion import OCCLUSIONS, occlusion_map
from carmodels.files import write_json
from carmodels.records import FOLD
from carmodels.study import Study
from tune.reporting.mistakes import found_mistakes

SIDE = 240  # pixels, longer side of a thumbnail; 5 to 15 KB each
SECONDS = 120.0  # budget of all occlusion maps
_FOR, _AGAINST = (230, 97, 1), (0, 114, 178)  # RGB, safe for colour-blind readers
_MAX_ALPHA = 190  # of 255, at a map's largest value
_TIMED_IMAGES = 7  # batch to time; single images take much longer each
_FULL_ALPHA_FROM = 0.01  # probability; a map of smaller values stays faint


def write_thumbnails(study: Study, ensemble: Ensemble, splits: Splits, *, seconds: float = SECONDS) -> None:
    """Write thumbnails and occlusion maps of the worst mistakes, for the report.

    Maps are made while `seconds` last. An ensemble of folds gets none: all but one of its models trained on
    the image.
    """
    if any(member["stage"] == FOLD for member in study.results()["members"]):
        seconds = 0.0
    found = found_mistakes(study)
    worst = found.worst if found else ()
    row_of = dict(zip(splits.val.ids, splits.val.rows.tolist(), strict=True))
    images = [splits.images[row_of[mistake.image]] for mistake in worst]
    maps = _maps(ensemble, images, [mistake.column for mistake in worst], seconds)
    write_json(
        study.thumbnails_file,
        {
            mistake.image: {"image": thumbnail(image), "map": None if falls is None else overlay(falls)}
            for mistake, image, falls in zip(worst, images, maps, strict=True)
        },
    )


def _maps(
    ensemble: Ensemble, images: Sequence[np.ndarray], columns: Sequence[int], seconds: float
) -> list[np.ndarray | None]:
    """One map per image. None where there is no time left for it."""
    end = time.monotonic() + seconds
    if not images or seconds <= 0:
        return [None for _ in images]
    expected = _expected(ensemble, images[0])
    maps: list[np.ndarray | None] = []
    for image, column in zip(images, columns, strict=True):
        started = time.monotonic()
        if started + expected > end:
            maps.append(None)
            continue
        maps.append(occlusion_map(ensemble, image, column))
        expected = time.monotonic() - started
    return maps


def _expected(ensemble: Ensemble, image: np.ndarray) -> float:
    """Estimated seconds per map, from one timed batch. The first call is slower and not timed."""
    ensemble.probabilities([image])
    started = time.monotonic()
    ensemble.probabilities([image] * _TIMED_IMAGES)
    return OCCLUSIONS / _TIMED_IMAGES * (time.monotonic() - started)


def thumbnail(image: np.ndarray) -> str:
    """(H, W, 3) uint8 -> a JPEG whose longer side is at most `SIDE`, as a data URL."""
    small = Image.fromarray(image)
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return _data_url(small, "jpeg", quality=80)


def overlay(falls: np.ndarray) -> str:
    """Map of `occlusion_map` -> PNG with one pixel per cell, to lay over the image, as a data URL.

    Orange parts support the answer, blue parts oppose it. Larger values are more opaque.
    """
    strength = np.abs(falls) / max(float(np.abs(falls).max()), _FULL_ALPHA_FROM)
    colours = np.where((falls > 0)[..., None], _FOR, _AGAINST)
    pixels = np.concatenate([colours, _MAX_ALPHA * strength[..., None]], axis=-1)
    return _data_url(Image.fromarray(pixels.round().astype(np.uint8), "RGBA"), "png")


def _data_url(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

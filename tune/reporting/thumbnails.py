"""Small images of an ensemble's worst mistakes, each with a map of what spoke for the answer."""

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
from carmodels.files import read_json, write_json
from carmodels.records import FOLD
from carmodels.study import Study
from tune.reporting.mistakes import found_mistakes

SIDE = 240  # pixels, the longer side of a thumbnail: 5 to 15 KB each
SECONDS = 120.0  # that attribution maps may take
_FOR, _AGAINST = (230, 97, 1), (0, 114, 178)  # told apart with any kind of colour vision
_OPAQUE = 190  # of 255, where most spoke for the answer
_ROW = 7  # looks at once, to measure by: one by one they would take much longer
_LEAST = 0.01  # of probability, below which a map stays faint


def write_thumbnails(study: Study, ensemble: Ensemble, splits: Splits, *, seconds: float = SECONDS) -> None:
    """Small images of the worst mistakes, each with a map of what spoke for the answer, for the report.

    There are maps as far as `seconds` reach, but none of an ensemble of folds: all but one of its models have
    learnt the image, and would be asked, too.
    """
    if any(member["stage"] == FOLD for member in read_json(study.ensemble_file)["members"]):
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
    """A map for each image; None for those that the time does not hold."""
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
    """Seconds that a map takes, from a row of its looks; the first look is slower and does not count."""
    ensemble.probabilities([image])
    started = time.monotonic()
    ensemble.probabilities([image] * _ROW)
    return OCCLUSIONS / _ROW * (time.monotonic() - started)


def thumbnail(image: np.ndarray) -> str:
    """(H, W, 3) uint8 -> a JPEG whose longer side is at most `SIDE`, as a data URL."""
    small = Image.fromarray(image)
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return _data_url(small, "jpeg", quality=80)


def overlay(falls: np.ndarray) -> str:
    """A map as `occlusion` gives it -> a PNG of a pixel a cell, to lie over the image, as a data URL.

    Orange spoke for the answer, blue against it; the more, the less transparent.
    """
    strength = np.abs(falls) / max(float(np.abs(falls).max()), _LEAST)
    colours = np.where((falls > 0)[..., None], _FOR, _AGAINST)
    pixels = np.concatenate([colours, _OPAQUE * strength[..., None]], axis=-1)
    return _data_url(Image.fromarray(pixels.round().astype(np.uint8), "RGBA"), "png")


def _data_url(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

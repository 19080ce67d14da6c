"""The report's images of mistakes: small, with a map of what spoke for the answer, within their time."""

from __future__ import annotations

import base64
import io
import time
from typing import cast

import numpy as np
from PIL import Image

from carmodels.ensembling.network import Ensemble
from tune.reporting import thumbnails
from tune.reporting.thumbnails import overlay, thumbnail


def decoded(url: str, kind: str) -> Image.Image:
    head, content = url.split(",")
    assert head == f"data:image/{kind};base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_a_thumbnail_is_small_and_keeps_its_shape() -> None:
    image = np.full((600, 900, 3), (200, 40, 90), np.uint8)
    small = decoded(thumbnail(image), "jpeg")
    assert small.size == (240, 160)
    assert np.abs(np.asarray(image, int) - (200, 40, 90)).max() < 6
    assert decoded(thumbnail(image[:40, :60]), "jpeg").size == (60, 40)


def test_a_map_is_orange_where_hiding_takes_from_the_answer_and_blue_where_it_adds() -> None:
    falls = np.array([[0.4, -0.2], [0.0, 0.1]])
    pixels = np.asarray(decoded(overlay(falls), "png"))
    assert pixels.shape == (2, 2, 4)
    assert pixels[0, 0].tolist() == [230, 97, 1, 190]
    assert pixels[0, 1].tolist() == [0, 114, 178, 95]
    assert pixels[1, 0, 3] == 0
    faint = np.asarray(decoded(overlay(falls / 1000), "png"))
    assert faint[..., 3].max() < 10  # what hardly matters is not blown up


class Slow:
    """In the place of an ensemble: counts the images it is shown, and takes a while for each."""

    def __init__(self) -> None:
        self.seen = 0

    def probabilities(self, images: list[np.ndarray]) -> np.ndarray:
        self.seen += len(images)
        time.sleep(0.001 * len(images))
        return np.full((len(images), 2), 0.5)


def test_maps_are_made_as_far_as_the_time_reaches() -> None:
    images, columns = [np.zeros((16, 16, 3), np.uint8)] * 3, [0, 1, 0]
    model = Slow()
    maps = thumbnails._maps(cast(Ensemble, model), images, columns, 60)
    assert [found is not None for found in maps] == [True, True, True]
    assert model.seen == 1 + 7 + 3 * (1 + 49)
    for seconds, seen in ((0.0, 0), (0.001, 1 + 7)):
        model = Slow()
        assert thumbnails._maps(cast(Ensemble, model), images, columns, seconds) == [None, None, None]
        assert model.seen == seen

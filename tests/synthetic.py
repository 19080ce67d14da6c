"""Images that tests draw, and folders of them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def draw(seed: int, width: int = 64, height: int = 48, noise: float = 4.0) -> Image.Image:
    """Smooth patches and a little noise, as in a photograph."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return Image.fromarray((smooth + rng.normal(0, noise, smooth.shape)).clip(0, 255).astype(np.uint8))


def save_many(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{n}.png" for n in range(count)]
    for n, path in enumerate(paths):
        draw(n).save(path)
    return paths

"""Occlusion maps: which parts of an image speak for a class (Zeiler and Fergus, 2014)."""

from __future__ import annotations

import numpy as np

from carmodels.ensembling.network import Ensemble

GRID_SIZE = 8  # cells per side of a map
OCCLUSIONS = (GRID_SIZE - 1) ** 2  # occluded copies of an image for one map


def occlusion_map(ensemble: Ensemble, image: np.ndarray, column: int) -> np.ndarray:
    """Image (H, W, 3) -> (GRID_SIZE, GRID_SIZE): how much hiding a cell lowers the probability in `column`.

    A square of two by two cells in the image's mean colour slides over the grid. A cell's value is the mean
    over the squares that cover it. > 0: the cell speaks for the class.
    """
    ys, xs = (np.linspace(0, side, GRID_SIZE + 1).round().astype(int) for side in image.shape[:2])
    corners = [(top, left) for top in range(GRID_SIZE - 1) for left in range(GRID_SIZE - 1)]
    occluded = np.repeat(image[None], len(corners), axis=0)
    for copy, (top, left) in zip(occluded, corners, strict=True):
        copy[ys[top] : ys[top + 2], xs[left] : xs[left + 2]] = image.mean(axis=(0, 1))
    before = ensemble.probabilities([image])[0, column]
    drops = before - ensemble.probabilities(list(occluded))[:, column]
    totals, counts = np.zeros((GRID_SIZE, GRID_SIZE)), np.zeros((GRID_SIZE, GRID_SIZE))
    for drop, (top, left) in zip(drops, corners, strict=True):
        totals[top : top + 2, left : left + 2] += drop
        counts[top : top + 2, left : left + 2] += 1
    means: np.ndarray = totals / counts
    return means

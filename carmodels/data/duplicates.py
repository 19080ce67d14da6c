"""Near-duplicate images: perceptual hashes and the groups they form."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

DUPLICATE_BITS = 6  # of 64; on cars9 all three pairs up to 6 are the same photograph, at 8 it is one in five
MOST_ALIKE = 0.01  # of all images that near-duplicates of one may be


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that near-duplicates nearly share (`imagehash.phash`); the cache's max_size plays no part."""
    import imagehash  # here, as every worker would pay for it at its start, and none decodes images

    return int(str(imagehash.phash(image.resize((64, 64), Image.Resampling.BOX))), 16)


def near_duplicate_groups(hashes: np.ndarray) -> np.ndarray:
    """hashes (N,) uint64 -> (N,) int64: the first row of the group that each row belongs to.

    Rows are linked where at most `DUPLICATE_BITS` bits differ; a group is what hangs together by links. Many
    images of little detail hang together though they are no copies: groups of more than `MOST_ALIKE` of
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
    from scipy.sparse import coo_array  # here, likewise
    from scipy.sparse.csgraph import connected_components

    pairs = np.concatenate([np.empty((0, 2), np.int64), *_close_pairs(hashes, bits)])
    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(len(hashes),) * 2)
    found: np.ndarray = connected_components(links, directed=False)[1]
    return found


def _close_pairs(hashes: np.ndarray, bits: int, block: int = 256) -> Iterator[np.ndarray]:
    for start in range(0, len(hashes), block):
        distance = np.bitwise_count(hashes[start : start + block, None] ^ hashes[None, start:])
        yield np.argwhere(distance <= bits) + start

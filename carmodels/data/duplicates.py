"""Near-duplicate images: perceptual hashes, and groups of images with close hashes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

DUPLICATE_BITS = 6  # of 64; on cars9 all three pairs within 6 show the same photograph, within 8 one in five
_MAX_GROUP_SHARE = 0.01  # of all images
_ALWAYS_ALLOWED = 20  # images; a group of this size is never cut


def perceptual_hash(image: Image.Image) -> int:
    """64 bits, nearly the same for near-duplicates (`imagehash.phash`). Does not depend on max_size."""
    import imagehash  # here, since workers never hash an image

    return int(str(imagehash.phash(image.resize((64, 64), Image.Resampling.BOX))), 16)


def near_duplicate_groups(hashes: np.ndarray) -> np.ndarray:
    """hashes (N,) uint64 -> (N,) int64, the first row of each row's group.

    Two rows are linked if their hashes differ in at most `DUPLICATE_BITS` bits. Groups are the connected
    components. Images of little detail form long chains of links without being copies, so groups that are too
    large are split again with fewer and fewer bits.
    """
    distinct, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    group = np.zeros(len(distinct), np.int64)
    max_size = max(_ALWAYS_ALLOWED, _MAX_GROUP_SHARE * len(hashes))
    for bits in range(DUPLICATE_BITS, -1, -1):
        sizes = np.bincount(group, weights=counts)
        for large in np.flatnonzero(sizes > max_size) if bits < DUPLICATE_BITS else [0]:
            members = np.flatnonzero(group == large)
            group[members] = group.max(initial=0) + 1 + _components(distinct[members], bits)
    _, first, inverse = np.unique(group[inverse], return_index=True, return_inverse=True)
    return first[inverse]


def _components(hashes: np.ndarray, bits: int) -> np.ndarray:
    """hashes (N,) -> (N,) number of the connected component; links join hashes within `bits` bits."""
    from scipy.sparse import coo_array  # here, for the same reason
    from scipy.sparse.csgraph import connected_components

    pairs = np.concatenate([np.empty((0, 2), np.int64), *_close_pairs(hashes, bits)])
    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(len(hashes),) * 2)
    components: np.ndarray = connected_components(links, directed=False)[1]
    return components


def _close_pairs(hashes: np.ndarray, bits: int, block: int = 256) -> Iterator[np.ndarray]:
    """Arrays (K, 2) of rows within `bits` bits, a block of rows at a time to bound memory."""
    for start in range(0, len(hashes), block):
        distance = np.bitwise_count(hashes[start : start + block, None] ^ hashes[None, start:])
        yield np.argwhere(distance <= bits) + start

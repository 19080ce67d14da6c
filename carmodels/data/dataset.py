"""A data set on disk to four splits of decoded images."""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from carmodels.data.cache import CACHE_VERSION, LIMIT, Damage, Estimate, ImageCache, Progress, open_images
from carmodels.data.digests import DamagedCache, file_digests
from carmodels.data.layout import ListedImage, Listing, data_roots, list_images
from carmodels.data.splits import SHARES, Split, assign_splits, hash_split, part_of, short_hash

FEWEST_PER_CLASS = 4
MOST_EXCLUDED = 0.01  # of the labelled images


@dataclass(frozen=True)
class Excluded:
    """A labelled image that was left out."""

    id: str
    path: str
    reason: str


@dataclass(frozen=True)
class Opening:
    """How a data set was opened: enough to open it again, on another machine, too."""

    path: Path
    cache_dir: Path
    max_size: int  # pixels
    seed: int
    cache_limit: int  # bytes


@dataclass(frozen=True)
class Splits:
    """A data set ready to learn from.

    Pickled, it takes the images along as the path of their cache. Where that is missing or damaged, as on
    another machine, it is built from the data set, by one process of a machine while others wait; ValueError
    where that is not the same data set.
    """

    classes: tuple[str, ...]  # category values as the data set writes them, numbers in numeric order
    class_names: tuple[str, ...]  # for display
    train: Split
    val: Split
    holdout: Split
    test: Split  # may be empty
    images: ImageCache
    fingerprint: str  # 12 hex digits of ids, labels and file contents; neither path nor machine changes it
    split_hash: str  # 12 hex digits of ids and labels in each split
    excluded: tuple[Excluded, ...]
    test_duplicates: tuple[tuple[str, str], ...]  # (test id, id of the nearest labelled near-duplicate)
    sample_file: Path | None  # absolute path of the competition's sample submission
    opening: Opening

    def __reduce__(self) -> tuple[Callable[..., Splits], tuple[dict[str, Any], object]]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "images"}
        kept = self.images.path if isinstance(self.images, ImageCache) else self.images
        return _unpickled, (values, kept)


def _unpickled(values: dict[str, Any], kept: object) -> Splits:
    """The splits, with the images of the folder `kept` (or with `kept` itself, which is images)."""
    if not isinstance(kept, Path):
        return Splits(images=kept, **values)  # type: ignore[arg-type]
    try:
        return Splits(images=ImageCache(kept), **values)
    except DamagedCache:
        return _opened_here(values["opening"], values["fingerprint"], values["split_hash"])


def _opened_here(opening: Opening, fingerprint: str, split_hash: str) -> Splits:
    found = open_dataset(
        opening.path,
        cache_dir=opening.cache_dir,
        max_size=opening.max_size,
        seed=opening.seed,
        cache_limit=opening.cache_limit,
    )
    if (found.fingerprint, found.split_hash) != (fingerprint, split_hash):
        raise ValueError(
            f"{str(opening.path)!r} on {platform.node()} is not the data set that was opened first: give a "
            "folder that all machines share, or the same copy on each"
        )
    return found


def open_dataset(
    path: Path,
    *,
    cache_dir: Path,
    max_size: int,
    seed: int = 0,
    on_progress: Progress | None = None,
    on_estimate: Estimate | None = None,
    on_damage: Damage | None = None,
    cache_limit: int = LIMIT,
) -> Splits:
    """The data set at `path` (folder or zip), its images decoded into `cache_dir` unless they are there.

    max_size: the largest image_size in pixels that will be asked for. The split depends on content and `seed`
    alone. Before the cache is built `on_estimate` is called with its size in bytes, and for each image
    `on_progress(done, total)`; `on_damage` is told of a cache that is rebuilt. Raises ValueError with one
    line for a data set that cannot be used, or whose images take more than `cache_limit` bytes; broken
    training images are excluded, up to 1 %.
    """
    if max_size < 1:
        raise ValueError(f"max_size={max_size} must be at least 1 pixel")
    path, cache_dir = Path(path).absolute(), Path(cache_dir).absolute()
    listing = list_images(data_roots(path, cache_dir), path)
    _check_classes(listing.labelled)
    listed = listing.labelled + sorted(listing.test, key=lambda item: item.id)
    paths = [item.path for item in listed]
    digests = file_digests(paths, cache_dir / "digests" / f"{short_hash(str(path))}.json")
    fingerprint = short_hash(
        [[item.category, item.id, digest] for item, digest in zip(listed, digests, strict=True)]
    )
    folder = cache_dir / "images" / f"{fingerprint}-{max_size}px-v{CACHE_VERSION}"
    images = open_images(
        paths,
        folder,
        max_size,
        on_progress,
        on_estimate=on_estimate,
        on_damage=on_damage,
        limit=cache_limit,
    )
    opening = Opening(path, cache_dir, max_size, seed, cache_limit)
    return _assemble(listing, listed, images, fingerprint, opening)


def _assemble(
    listing: Listing, listed: list[ListedImage], images: ImageCache, fingerprint: str, opening: Opening
) -> Splits:
    _check_tests(listed, images)
    labelled, excluded = _usable(listing.labelled, images)
    classes = _check_classes(labelled)
    labels = np.array([classes.index(item.category) for item in labelled], dtype=np.int64)
    first_test = len(listing.labelled)
    rows = images.rows[:first_test][images.rows[:first_test] >= 0]
    sides = assign_splits(labels, images.groups[rows], opening.seed)
    train, val, holdout = (
        part_of(name, labelled, labels, rows, sides == number) for number, (name, _) in enumerate(SHARES)
    )
    test_rows = {item.id: row for item, row in zip(listed, images.rows, strict=True) if not item.category}
    test_ids = tuple(item.id for item in listing.test)
    test = Split("test", test_ids, None, np.array([test_rows[i] for i in test_ids], dtype=np.int64))
    return Splits(
        classes=classes,
        class_names=_display_names(classes, listing.names),
        train=train,
        val=val,
        holdout=holdout,
        test=test,
        images=images,
        fingerprint=fingerprint,
        split_hash=hash_split(train, val, holdout, test),
        excluded=excluded,
        test_duplicates=_test_duplicates((train, val, holdout), test, images),
        sample_file=listing.sample_file,
        opening=opening,
    )


def _check_tests(listed: list[ListedImage], images: ImageCache) -> None:
    broken = [(listed[n], reason) for n, reason in images.broken.items() if not listed[n].category]
    if broken:
        found = "; ".join(f"{str(item.path)!r}: {reason}" for item, reason in broken[:3])
        raise ValueError(f"{len(broken)} test images cannot be read: {found}; fetch them again")


def _usable(
    labelled: list[ListedImage], images: ImageCache
) -> tuple[list[ListedImage], tuple[Excluded, ...]]:
    """The labelled images without the broken ones, and those; they lead in `images`, in the same order."""
    excluded = tuple(
        Excluded(item.id, str(item.path), images.broken[n])
        for n, item in enumerate(labelled)
        if n in images.broken
    )
    if len(excluded) > MOST_EXCLUDED * len(labelled):
        found = "; ".join(f"{item.path!r}: {item.reason}" for item in excluded[:3])
        raise ValueError(
            f"{len(excluded)} of {len(labelled)} labelled images cannot be read, more than "
            f"{MOST_EXCLUDED:.0%}: {found}; fetch them again or take them out"
        )
    return [item for n, item in enumerate(labelled) if n not in images.broken], excluded


def _check_classes(labelled: list[ListedImage]) -> tuple[str, ...]:
    """The categories in order; raises where there are too few, or too few images of one."""
    counts = Counter(item.category for item in labelled)
    if len(counts) == 1:
        raise ValueError(
            f"all images are of the class {next(iter(counts))!r}: two classes are needed at least"
        )
    for category, count in sorted(counts.items()):
        if count < FEWEST_PER_CLASS:
            raise ValueError(
                f"the class {category!r} has {count} readable images, but {FEWEST_PER_CLASS} are needed: "
                f"add some or take the class out"
            )
    numbers = all(category.isascii() and category.isdecimal() for category in counts)
    return tuple(sorted(counts, key=lambda category: (int(category) if numbers else 0, category)))


def _display_names(classes: tuple[str, ...], names: dict[str, str]) -> tuple[str, ...]:
    missing = [category for category in classes if names and category not in names]
    if missing:
        raise ValueError(f"classes.txt has no line for the class {missing[0]!r}: add one or remove the file")
    found = [names.get(category, category) for category in classes]
    return tuple(
        f"{name} ({category})" if found.count(name) > 1 else name
        for name, category in zip(found, classes, strict=True)
    )


def _test_duplicates(
    labelled: Sequence[Split], test: Split, images: ImageCache
) -> tuple[tuple[str, str], ...]:
    known: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for part in labelled:
        for row, image_id in zip(part.rows, part.ids, strict=True):
            known[images.groups[row]].append((row, image_id))

    def nearest(row: int) -> str:
        others = known[images.groups[row]]
        return min(((images.hashes[row] ^ images.hashes[r]).bit_count(), name) for r, name in others)[1]

    doubles = [
        (name, row) for name, row in zip(test.ids, test.rows, strict=True) if images.groups[row] in known
    ]
    return tuple((name, nearest(row)) for name, row in doubles)

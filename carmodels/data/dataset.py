"""Opens a data set on disk as four splits of decoded images."""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from carmodels.data.cache import (
    CACHE_LIMIT_BYTES,
    CACHE_VERSION,
    DecodeProgress,
    ImageCache,
    open_images,
)
from carmodels.data.digests import DamagedCache, file_digests
from carmodels.data.layout import ListedImage, Listing, data_roots, list_images
from carmodels.data.splits import SPLIT_SHARES, Split, assign_splits, hash_split, short_hash

_MIN_PER_CLASS = 4  # readable images
_MAX_BROKEN_SHARE = 0.01  # of the labelled images


@dataclass(frozen=True)
class Excluded:
    """A labelled image that is left out because it is broken."""

    id: str
    path: str
    reason: str


@dataclass(frozen=True)
class OpenArguments:
    """Arguments of `open_dataset`: enough to open the data set again, even on another machine."""

    path: Path
    cache_dir: Path
    max_size: int  # pixels
    seed: int
    cache_limit: int  # bytes


@dataclass(frozen=True)
class Splits:
    """A data set ready to train on.

    Pickles with the path of the image cache instead of the images. If that cache is missing or damaged where
    it is unpickled, as on another machine, it is rebuilt there from the data set, by one process while others
    wait. ValueError if the data set differs.
    """

    classes: tuple[str, ...]  # category values as the data set writes them, numbers in numeric order
    class_names: tuple[str, ...]  # for display
    train: Split
    val: Split
    holdout: Split
    test: Split  # may be empty
    images: ImageCache
    fingerprint: str  # 12 hex digits of ids, labels and file contents, the same at any path
    split_hash: str  # 12 hex digits of ids and labels in each split
    excluded: tuple[Excluded, ...]
    test_duplicates: tuple[tuple[str, str], ...]  # (test id, id of the nearest labelled near-duplicate)
    sample_file: Path | None  # absolute path of the competition's sample submission
    open_arguments: OpenArguments

    def __reduce__(self) -> tuple[Callable[..., Splits], tuple[dict[str, Any], object]]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "images"}
        source = self.images.path if isinstance(self.images, ImageCache) else self.images
        return _unpickle, (values, source)


def _unpickle(values: dict[str, Any], source: object) -> Splits:
    """The splits, with the images of the cache folder `source`, or with `source` itself as images."""
    if not isinstance(source, Path):
        return Splits(images=source, **values)  # type: ignore[arg-type]
    try:
        return Splits(images=ImageCache(source), **values)
    except DamagedCache:
        return _reopen(values["open_arguments"], values["fingerprint"], values["split_hash"])


def _reopen(arguments: OpenArguments, fingerprint: str, split_hash: str) -> Splits:
    splits = open_dataset(**vars(arguments))
    if (splits.fingerprint, splits.split_hash) != (fingerprint, split_hash):
        raise ValueError(
            f"{str(arguments.path)!r} on {platform.node()} is not the data set that was opened first: give a "
            "folder that all machines share, or the same copy on each"
        )
    return splits


def open_dataset(
    path: Path,
    *,
    cache_dir: Path,
    max_size: int,
    seed: int = 0,
    on_progress: DecodeProgress | None = None,
    on_estimate: Callable[[int], None] | None = None,
    on_damage: Callable[[str], None] | None = None,
    cache_limit: int = CACHE_LIMIT_BYTES,
) -> Splits:
    """Opens the data set at `path`, a folder or zip, with its images decoded into a cache in `cache_dir`.

    `max_size` is the largest image_size, in pixels, that trials will use. The split depends on content and
    `seed` alone. Broken labelled images are excluded, up to 1 %.

    If the cache has to be built, `on_estimate(size)` gets its bytes first, then `on_progress(done, total)` is
    called for each image. `on_damage(reason)` is called if it replaces a damaged one.

    Raises a one-line ValueError for a data set that cannot be used, or a cache larger than `cache_limit`.
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
    arguments = OpenArguments(path, cache_dir, max_size, seed, cache_limit)
    return _assemble(listing, listed, images, fingerprint, arguments)


def _assemble(
    listing: Listing,
    listed: list[ListedImage],
    images: ImageCache,
    fingerprint: str,
    arguments: OpenArguments,
) -> Splits:
    """The splits. `listed` are the labelled images and then the test images, in the cache's order."""
    _refuse_broken_tests(listed, images)
    labelled, excluded = _without_broken(listing.labelled, images)
    classes = _check_classes(labelled)
    labels = np.array([classes.index(item.category) for item in labelled], dtype=np.int64)
    labelled_rows = images.rows[: len(listing.labelled)]
    pool = Split("labelled", tuple(item.id for item in labelled), labels, labelled_rows[labelled_rows >= 0])
    assigned = assign_splits(labels, images.groups[pool.rows], arguments.seed)
    train, val, holdout = (
        pool.subset(assigned == number, name) for number, (name, _) in enumerate(SPLIT_SHARES)
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
        open_arguments=arguments,
    )


def _refuse_broken_tests(listed: list[ListedImage], images: ImageCache) -> None:
    broken = [(listed[n], reason) for n, reason in images.broken.items() if not listed[n].category]
    if broken:
        examples = "; ".join(f"{str(item.path)!r}: {reason}" for item, reason in broken[:3])
        raise ValueError(f"{len(broken)} test images cannot be read: {examples}; fetch them again")


def _without_broken(
    labelled: list[ListedImage], images: ImageCache
) -> tuple[list[ListedImage], tuple[Excluded, ...]]:
    """The labelled images that can be read, and those that cannot. `labelled` come first in `images`."""
    excluded = tuple(
        Excluded(item.id, str(item.path), images.broken[n])
        for n, item in enumerate(labelled)
        if n in images.broken
    )
    if len(excluded) > _MAX_BROKEN_SHARE * len(labelled):
        examples = "; ".join(f"{item.path!r}: {item.reason}" for item in excluded[:3])
        raise ValueError(
            f"{len(excluded)} of {len(labelled)} labelled images cannot be read, more than "
            f"{_MAX_BROKEN_SHARE:.0%}: {examples}; fetch them again or take them out"
        )
    return [item for n, item in enumerate(labelled) if n not in images.broken], excluded


def _check_classes(labelled: list[ListedImage]) -> tuple[str, ...]:
    """The categories in order. ValueError for one class alone, or a class with too few images."""
    counts = Counter(item.category for item in labelled)
    if len(counts) == 1:
        raise ValueError(
            f"all images are of the class {next(iter(counts))!r}: two classes are needed at least"
        )
    for category, count in sorted(counts.items()):
        if count < _MIN_PER_CLASS:
            raise ValueError(
                f"the class {category!r} has {count} readable images, but {_MIN_PER_CLASS} are needed: "
                f"add some or take the class out"
            )
    numbers = all(category.isascii() and category.isdecimal() for category in counts)
    return tuple(sorted(counts, key=lambda category: (int(category) if numbers else 0, category)))


def _display_names(classes: tuple[str, ...], names: dict[str, str]) -> tuple[str, ...]:
    """Names from classes.txt, else the categories. A name that two classes share gets its category added."""
    missing = [category for category in classes if names and category not in names]
    if missing:
        raise ValueError(f"classes.txt has no line for the class {missing[0]!r}: add one or remove the file")
    display = [names.get(category, category) for category in classes]
    return tuple(
        f"{name} ({category})" if display.count(name) > 1 else name
        for name, category in zip(display, classes, strict=True)
    )


def _test_duplicates(
    labelled: Sequence[Split], test: Split, images: ImageCache
) -> tuple[tuple[str, str], ...]:
    """(test id, id of the nearest labelled near-duplicate) for each test image that has one."""
    labelled_by_group: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for part in labelled:
        for row, image_id in zip(part.rows, part.ids, strict=True):
            labelled_by_group[images.groups[row]].append((row, image_id))

    def nearest(row: int) -> str:
        candidates = labelled_by_group[images.groups[row]]
        return min(((images.hashes[row] ^ images.hashes[r]).bit_count(), name) for r, name in candidates)[1]

    return tuple(
        (name, nearest(row))
        for name, row in zip(test.ids, test.rows, strict=True)
        if images.groups[row] in labelled_by_group
    )

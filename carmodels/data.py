"""A data set on disk to four splits of decoded pictures.

`open_dataset` takes a folder or a zip of it. The first of these that applies says where the pictures are:

    train.csv with path,label     anywhere below the folder of the CSV
    train.csv with Id,Category    train/<Category>/<Id>, as in the competition
    train/                        train/<class>/
    anything else                 <class>/

Test pictures are those of a test.csv with path; else those in `test_upload` or `test`, in the order of the
first column of a sample submission, if there is one; else there are none. `classes.txt` ("<category> <name>"
a line) gives names for display. A train.csv is complete: pictures that it does not name are not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from carmodels.archives import one_line, unpacked
from carmodels.images import (
    CACHE_VERSION,
    LIMIT,
    Damage,
    DamagedCache,
    Estimate,
    ImageCache,
    Progress,
    file_digests,
    open_images,
)
from carmodels.submission import read_sample

SHARES = (("train", 0.70), ("val", 0.15), ("audit", 0.15))
FEWEST_PER_CLASS = 4
MOST_EXCLUDED = 0.01  # of the labelled pictures
_SAMPLE_FILES = ("sample-submission.csv", "sample_submission.csv")
_TEST_FOLDERS = ("test_upload", "test")
_PATH_COLUMNS = ("path", "file", "filename", "image")
_LABEL_COLUMNS = ("label", "class", "category")
_PICTURE_SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
}  # some only to be refused


@dataclass(frozen=True)
class Split:
    """A part of the data set; ids, labels and rows are in the same order."""

    name: str  # "train", "val", "audit" or "test"; "oof" is a fold that was held out
    ids: tuple[
        str, ...
    ]  # as in the CSV or sample file, else the path below the folder of the classes or tests
    labels: np.ndarray | None  # (N,) int64, index into classes; None: unknown (test)
    rows: np.ndarray  # (N,) int64, row of each picture in images

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, mine: np.ndarray, name: str = "") -> Split:
        """The pictures, (N,), that are marked as mine, under the same or another name."""
        ids = tuple(self.ids[n] for n in np.flatnonzero(mine))
        return Split(
            name or self.name, ids, None if self.labels is None else self.labels[mine], self.rows[mine]
        )


@dataclass(frozen=True)
class Excluded:
    """A labelled picture that was left out."""

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

    Pickled, it takes the pictures along as the path of their cache. Where that is missing or damaged, as on
    another machine, it is built from the data set, by one process of a machine while others wait; ValueError
    where that is not the same data set.
    """

    classes: tuple[str, ...]  # category values as the data set writes them, numbers in numeric order
    class_names: tuple[str, ...]  # for display
    train: Split
    val: Split
    audit: Split
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
    """The splits, with the pictures of the folder `kept` (or with `kept` itself, which is pictures)."""
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


@dataclass(frozen=True)
class _Picture:
    id: str
    path: Path
    category: str = ""  # empty for test


@dataclass(frozen=True)
class _Listing:
    """What a data set says it holds, before a picture is opened."""

    labelled: list[_Picture]  # sorted by id
    test: list[_Picture]  # in the order of the sample file or test.csv, else sorted by id
    names: dict[str, str]  # category -> name, from classes.txt
    sample_file: Path | None


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
    """The data set at `path` (folder or zip), its pictures decoded into `cache_dir` unless they are there.

    max_size: the largest image_size in pixels that will be asked for. The split depends on content and `seed`
    alone. Before the cache is built `on_estimate` is called with its size in bytes, and for each picture
    `on_progress(done, total)`; `on_damage` is told of a cache that is rebuilt. Raises ValueError with one
    line for a data set that cannot be used, or whose pictures take more than `cache_limit` bytes; broken
    training pictures are excluded, up to 1 %.
    """
    if max_size < 1:
        raise ValueError(f"max_size={max_size} must be at least 1 pixel")
    path, cache_dir = Path(path).absolute(), Path(cache_dir).absolute()
    listing = _list(_roots(path, cache_dir), path)
    _check_classes(listing.labelled)
    pictures = listing.labelled + sorted(listing.test, key=lambda picture: picture.id)
    paths = [picture.path for picture in pictures]
    digests = file_digests(paths, cache_dir / "digests" / f"{_hash(str(path))}.json")
    fingerprint = _hash(
        [[picture.category, picture.id, digest] for picture, digest in zip(pictures, digests, strict=True)]
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
    return _assemble(listing, pictures, images, fingerprint, opening)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _assemble(
    listing: _Listing, pictures: list[_Picture], images: ImageCache, fingerprint: str, opening: Opening
) -> Splits:
    _check_tests(pictures, images)
    labelled, excluded = _usable(listing.labelled, images)
    classes = _check_classes(labelled)
    labels = np.array([classes.index(picture.category) for picture in labelled], dtype=np.int64)
    first_test = len(listing.labelled)
    rows = images.rows[:first_test][images.rows[:first_test] >= 0]
    sides = assign_splits(labels, images.groups[rows], opening.seed)
    train, val, audit = (
        _part(name, labelled, labels, rows, sides == number) for number, (name, _) in enumerate(SHARES)
    )
    test_rows = {
        picture.id: row for picture, row in zip(pictures, images.rows, strict=True) if not picture.category
    }
    test_ids = tuple(picture.id for picture in listing.test)
    test = Split("test", test_ids, None, np.array([test_rows[i] for i in test_ids], dtype=np.int64))
    return Splits(
        classes=classes,
        class_names=_display_names(classes, listing.names),
        train=train,
        val=val,
        audit=audit,
        test=test,
        images=images,
        fingerprint=fingerprint,
        split_hash=_split_hash(train, val, audit, test),
        excluded=excluded,
        test_duplicates=_test_duplicates((train, val, audit), test, images),
        sample_file=listing.sample_file,
        opening=opening,
    )


def _check_tests(pictures: list[_Picture], images: ImageCache) -> None:
    broken = [(pictures[n], reason) for n, reason in images.broken.items() if not pictures[n].category]
    if broken:
        found = "; ".join(f"{str(picture.path)!r}: {reason}" for picture, reason in broken[:3])
        raise ValueError(f"{len(broken)} test pictures cannot be read: {found}; fetch them again")


def _usable(labelled: list[_Picture], images: ImageCache) -> tuple[list[_Picture], tuple[Excluded, ...]]:
    """The labelled pictures without the broken ones, and those; they lead in `images`, in the same order."""
    excluded = tuple(
        Excluded(picture.id, str(picture.path), images.broken[n])
        for n, picture in enumerate(labelled)
        if n in images.broken
    )
    if len(excluded) > MOST_EXCLUDED * len(labelled):
        found = "; ".join(f"{item.path!r}: {item.reason}" for item in excluded[:3])
        raise ValueError(
            f"{len(excluded)} of {len(labelled)} labelled pictures cannot be read, more than "
            f"{MOST_EXCLUDED:.0%}: {found}; fetch them again or take them out"
        )
    return [picture for n, picture in enumerate(labelled) if n not in images.broken], excluded


def _check_classes(labelled: list[_Picture]) -> tuple[str, ...]:
    """The categories in order; raises where there are too few, or too few pictures of one."""
    counts = Counter(picture.category for picture in labelled)
    if len(counts) == 1:
        raise ValueError(
            f"all pictures are of the class {next(iter(counts))!r}: two classes are needed at least"
        )
    for category, count in sorted(counts.items()):
        if count < FEWEST_PER_CLASS:
            raise ValueError(
                f"the class {category!r} has {count} readable pictures, but {FEWEST_PER_CLASS} are needed: "
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


def assign_splits(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """labels (N,), groups (N,) -> (N,) index into `SHARES`: stratified by class, groups kept whole.

    A group counts for the class of its first picture. Larger groups are placed first, each where its class
    lacks most, so that no group overshoots a small split. Raises ValueError where a split stays empty.
    """
    sides = _assigned(labels, groups, seed, lambda label, count: _shares_of(count))
    for number, (name, _) in enumerate(SHARES):
        if number not in sides:
            raise ValueError(
                f"no picture is left for {name}: the {len(labels)} labelled pictures are near-duplicates of "
                f"{len(np.unique(groups))}, which stay together; add different ones"
            )
    return sides


def assign_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """labels (N,), groups (N,) -> (N,) fold of each picture, as in `assign_splits`, all folds alike in size.

    Raises ValueError where a fold stays empty.
    """

    def shares(label: int, count: int) -> np.ndarray:
        return (count + (np.arange(folds) + label) % folds) // folds  # what is over goes to another each time

    sides = _assigned(labels, groups, seed, shares)
    if missing := set(range(folds)) - set(sides.tolist()):
        raise ValueError(
            f"folds={folds}: no picture is left for {len(missing)} of them, {len(labels)} pictures that are "
            f"near-duplicates of {len(np.unique(groups))} stay together; take fewer folds"
        )
    return sides


def _assigned(
    labels: np.ndarray, groups: np.ndarray, seed: int, shares: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """(N,) side of each picture; `shares(class, pictures)` says how many of a class each side gets."""
    _, first, member = np.unique(groups, return_index=True, return_inverse=True)
    sizes = np.bincount(member)
    sides = np.zeros(len(first), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for label in range(labels.max() + 1):
        shuffled = rng.permutation(np.flatnonzero(labels[first] == label))
        lacking = shares(label, int(sizes[shuffled].sum()))
        for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
            sides[group] = np.argmax(lacking)
            lacking[sides[group]] -= sizes[group]
    return sides[member]


def _shares_of(count: int) -> np.ndarray:
    """(3,) pictures of a class for each split, at least one each where there are three."""
    held_out = [max(int(count >= 3), round(share * count)) for _, share in SHARES[1:]]
    return np.array([count - sum(held_out), *held_out])


def with_fold(splits: Splits, *, folds: int, fold: int, seed: int) -> Splits:
    """One fold of train and val together becomes `val`, which is called "oof" then, the others `train`."""
    both = _together("both", (splits.train, splits.val))
    assert both.labels is not None
    held_out = assign_folds(both.labels, splits.images.groups[both.rows], folds, seed) == fold
    return _parted(splits, both.part(~held_out, "train"), both.part(held_out, "oof"), splits.audit)


def with_everything(splits: Splits) -> Splits:
    """All labelled pictures become `train`; `val` and `audit` are empty."""
    everything = _together("train", (splits.train, splits.val, splits.audit))
    val, audit = (everything.part(np.zeros(len(everything), bool), name) for name in ("val", "audit"))
    return _parted(splits, everything, val, audit)


def _together(name: str, parts: Sequence[Split]) -> Split:
    """Labelled parts as one."""
    labels = [part.labels for part in parts if part.labels is not None]
    ids = tuple(i for part in parts for i in part.ids)
    return Split(name, ids, np.concatenate(labels), np.concatenate([part.rows for part in parts]))


def _parted(splits: Splits, train: Split, val: Split, audit: Split) -> Splits:
    digest = _split_hash(train, val, audit, splits.test)
    return replace(splits, train=train, val=val, audit=audit, split_hash=digest)


def _part(
    name: str, labelled: list[_Picture], labels: np.ndarray, rows: np.ndarray, mine: np.ndarray
) -> Split:
    return Split(name, tuple(labelled[n].id for n in np.flatnonzero(mine)), labels[mine], rows[mine])


def _split_hash(*parts: Split) -> str:
    return _hash(
        [[part.name, part.ids, None if part.labels is None else part.labels.tolist()] for part in parts]
    )


def _test_duplicates(
    labelled: Sequence[Split], test: Split, images: ImageCache
) -> tuple[tuple[str, str], ...]:
    known: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for part in labelled:
        for row, picture_id in zip(part.rows, part.ids, strict=True):
            known[images.groups[row]].append((row, picture_id))

    def nearest(row: int) -> str:
        others = known[images.groups[row]]
        return min(((images.hashes[row] ^ images.hashes[r]).bit_count(), name) for r, name in others)[1]

    doubles = [
        (name, row) for name, row in zip(test.ids, test.rows, strict=True) if images.groups[row] in known
    ]
    return tuple((name, nearest(row)) for name, row in doubles)


# ---- what the folders hold

_INNER_ARCHIVES = {"train.zip": ("train",), "test.zip": _TEST_FOLDERS, "test_upload.zip": _TEST_FOLDERS}


def _roots(path: Path, cache_dir: Path) -> tuple[Path, ...]:
    """The folders in which to look for the parts of the data set: `path` and what was unpacked for it."""
    if path.is_dir():
        archives = [
            path / name
            for name, folders in _INNER_ARCHIVES.items()
            if (path / name).is_file() and not any((path / folder).is_dir() for folder in folders)
        ]
        return path, *(unpacked(archive, cache_dir) for archive in archives)
    if not path.exists():
        raise ValueError(f"the data {str(path)!r} does not exist: give a folder or a zip")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"the data {str(path)!r} is neither a folder nor an intact zip")
    folder = unpacked(path, cache_dir)
    inside = [path for path in folder.iterdir() if path.name[0] != "."]
    return (inside[0],) if len(inside) == 1 and _is_whole(inside[0]) else (folder,)


def _is_whole(folder: Path) -> bool:
    """Whether the only thing in a zip is a folder that holds the whole data set."""
    if _find([folder], "train.csv", "train"):
        return True
    if not folder.is_dir() or folder.name in ("train", *_TEST_FOLDERS):
        return False
    inside = list(folder.iterdir())
    pictures = (path.suffix.lower() in _PICTURE_SUFFIXES for path in inside if path.is_file())
    return any(path.is_dir() for path in inside) and not any(pictures)


def _list(roots: Sequence[Path], path: Path) -> _Listing:
    """`roots` are looked through in order; `path` is what the user gave, for messages."""
    table, sample = _find(roots, "train.csv"), _find(roots, *_SAMPLE_FILES)
    labelled = _from_folders(roots) if table is None else _from_table(table, roots)
    if not labelled:
        raise ValueError(
            f"no pictures in {str(path)!r}: it needs train.csv, or a folder for each class in it or train/"
        )
    test = _tests(roots, sample)
    for pictures in (labelled, test):
        _refuse_twice(pictures)
        _refuse_undecodable(pictures)
    labelled.sort(key=lambda picture: picture.id)
    return _Listing(labelled, test, _read_names(_find(roots, "classes.txt")), sample)


def _find(roots: Sequence[Path], *names: str) -> Path | None:
    return next((root / name for root in roots for name in names if (root / name).exists()), None)


def _from_table(table: Path, roots: Sequence[Path]) -> list[_Picture]:
    frame = _read_table(table)
    path, label = _first(frame, _PATH_COLUMNS), _first(frame, _LABEL_COLUMNS)
    if path and label:
        rows = list(zip(frame[path], frame[label], strict=True))
        return [_Picture(_inside(i, table), table.parent / i, _label(label, table)) for i, label in rows]
    if not {"id", "category"} <= set(frame.columns):
        raise ValueError(
            f"{str(table)!r} has the columns {list(frame)}; needed are Id,Category or path,label"
        )
    train = _find(roots, "train")
    if train is None:
        raise ValueError(f"there is no train folder (or train.zip) beside {str(table)!r}")
    for category in sorted(set(frame["category"])):
        if not (train / _inside(category, table)).is_dir():
            raise ValueError(f"the class {category!r} of {str(table)!r} has no folder in {str(train)!r}")
    rows = list(zip(frame["id"], frame["category"], strict=True))
    return [_Picture(_inside(i, table), train / category / i, category) for i, category in rows]


def _from_folders(roots: Sequence[Path]) -> list[_Picture]:
    train = _find(roots, "train")
    apart = () if train else _TEST_FOLDERS
    base = train or roots[0]
    folders = [folder for folder in sorted(base.iterdir()) if folder.is_dir()]
    labelled = []
    for folder in folders:
        if folder.name in apart or folder.name.startswith("."):
            continue
        if base.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"the class folder {str(folder)!r} is a link to what holds it: remove the link")
        names = picture_names(folder)
        if not names:
            raise ValueError(f"the class folder {str(folder)!r} holds no pictures: fill or remove it")
        labelled += [_Picture(f"{folder.name}/{name}", folder / name, folder.name) for name in names]
    return labelled


def _tests(roots: Sequence[Path], sample: Path | None) -> list[_Picture]:
    table, folder = _find(roots, "test.csv"), _find(roots, *_TEST_FOLDERS)
    ids = [] if sample is None else [_inside(i, sample) for i in read_sample(sample).iloc[:, 0]]
    if table is not None:
        frame = _read_table(table)
        path = _first(frame, _PATH_COLUMNS)
        if path is None:
            raise ValueError(f"{str(table)!r} has the columns {list(frame)}; needed is path")
        names = [_inside(i, table) for i in frame[path]]
        if sample is not None and (odd := sorted(set(names) ^ set(ids))):
            raise ValueError(
                f"{str(table)!r} and {str(sample)!r} do not list the same pictures, only one of them names "
                f"{odd[0]!r}: correct one, or take one away"
            )
        return [_Picture(name, table.parent / name) for name in names]
    if folder is None and sample is not None:
        raise ValueError(f"{str(sample)!r} lists test pictures, but there is no test_upload or test folder")
    if folder is None:
        return []
    names = picture_names(folder)
    if sample is not None:
        unlisted = sorted(set(names) - set(ids))
        if unlisted:
            raise ValueError(
                f"{len(unlisted)} pictures of {str(folder)!r} are not in {str(sample)!r}, "
                f"the first is {unlisted[0]!r}: add or remove them"
            )
        names = ids
    return [_Picture(name, folder / name) for name in names]


def picture_names(folder: Path) -> list[str]:
    """Paths of the pictures at any depth below `folder`, relative to it, sorted.

    Without hidden files and folders; links to folders are followed, but to none that leads back.
    """
    found: list[Path] = []
    top, seen = folder.resolve(), set[Path]()
    for parent, folders, files in os.walk(folder, followlinks=True):
        here = Path(parent).resolve()
        if here in seen or (here != top and top.is_relative_to(here)):
            folders.clear()
            continue
        seen.add(here)
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(parent, name).relative_to(folder) for name in files if name[0] != "."]
    return sorted(p.as_posix() for p in found if p.suffix.lower() in _PICTURE_SUFFIXES)


def _read_table(table: Path) -> pd.DataFrame:
    """All columns as text, column names in lower case."""
    try:
        # header=None: with one, pandas drops what a longer row has more, and renames columns of the same name
        rows = pd.read_csv(table, header=None, dtype=str, na_filter=False, encoding="utf-8-sig").fillna("")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{str(table)!r} cannot be read as CSV: {one_line(error)}; needed is UTF-8 text with commas"
        ) from None
    columns = [name.strip().lower() for name in rows.iloc[0]]
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise ValueError(f"{str(table)!r} has more than one column {twice[0]!r}: keep one")
    return pd.DataFrame(rows.iloc[1:].to_numpy(), columns=columns)


def _first(frame: pd.DataFrame, columns: Sequence[str]) -> str | None:
    return next((column for column in columns if column in frame), None)


def _inside(name: str, source: Path) -> str:
    """`name` if it is a relative path that stays below its folder; `source` says where it was found."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(
            f"{str(source)!r} names {name!r}, which is not a path inside its folder: correct the row"
        )
    return name


def _label(name: str, source: Path) -> str:
    """`name` if it can be that of a class; `source` says where it was found."""
    if not name.strip() or "\0" in name:
        raise ValueError(f"{str(source)!r} has the label {name!r}, which names no class: correct the row")
    return name


def _refuse_twice(pictures: list[_Picture]) -> None:
    name, count = next(iter(Counter(picture.id for picture in pictures).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"the id {name!r} is there {count} times: ids must be unique")


def _refuse_undecodable(pictures: list[_Picture]) -> None:
    """File systems keep bytes; a name that is no text could not be written into a table."""
    for picture in pictures:
        try:
            picture.id.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the name of {str(picture.path)!r} is not UTF-8: rename it") from None


def _read_names(path: Path | None) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8: {one_line(error)}; save it as such") from None
    words = [line.split(maxsplit=1) for line in lines if line.strip()]
    for found in words:
        if len(found) != 2:
            raise ValueError(f"{str(path)!r} has the line {found[0]!r}; needed is '<category> <name>'")
    if twice := [category for category, count in Counter(word[0] for word in words).items() if count > 1]:
        raise ValueError(f"{str(path)!r} names the class {twice[0]!r} more than once: keep one line")
    return {category: name.strip() for category, name in words}

"""Finds the labelled and the test images of a data set on disk.

A data set is a folder, or a zip of it. The first of these that applies says where the labelled images are:

    train.csv with path,label     anywhere below the folder of the CSV
    train.csv with Id,Category    train/<Category>/<Id>, as in the competition
    train/                        train/<class>/
    anything else                 <class>/

Images that a train.csv does not name are not used. Test images are those of a test.csv with path. Without
one they are those in `test_upload` or `test`, in the order of the sample submission if there is one.
`classes.txt` gives names for display, one "<category> <name>" a line.
"""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd

from carmodels.data.archives import unpack_once
from carmodels.formatting import one_line
from carmodels.submission import read_sample

_SAMPLE_FILES = ("sample-submission.csv", "sample_submission.csv")
_TEST_FOLDERS = ("test_upload", "test")
_PATH_COLUMNS = ("path", "file", "filename", "image")
_LABEL_COLUMNS = ("label", "class", "category")

# Suffixes that mark an image; the formats among them that are not supported get a clear error later.
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_INNER_ARCHIVES = {"train.zip": ("train",), "test.zip": _TEST_FOLDERS, "test_upload.zip": _TEST_FOLDERS}


@dataclass(frozen=True)
class ListedImage:
    id: str
    path: Path
    category: str = ""  # empty for a test image


@dataclass(frozen=True)
class Listing:
    """The images that a data set lists. None has been opened yet."""

    labelled: list[ListedImage]  # sorted by id
    test: list[ListedImage]  # in the order of the sample file or test.csv, else sorted by id
    names: dict[str, str]  # category -> name, from classes.txt
    sample_file: Path | None


def data_roots(path: Path, cache_dir: Path) -> tuple[Path, ...]:
    """The folders to search for the parts of the data set: `path`, and archives in it, unpacked."""
    if path.is_dir():
        archives = [
            path / name
            for name, folders in _INNER_ARCHIVES.items()
            if (path / name).is_file() and not any((path / folder).is_dir() for folder in folders)
        ]
        return path, *(unpack_once(archive, cache_dir) for archive in archives)
    if not path.exists():
        raise ValueError(f"the data {str(path)!r} does not exist: give a folder or a zip")
    if not (path.is_file() and zipfile.is_zipfile(path)):  # a pipe would be waited for, a device read
        raise ValueError(f"the data {str(path)!r} is neither a folder nor an intact zip")
    folder = unpack_once(path, cache_dir)
    inside = [path for path in folder.iterdir() if path.name[0] != "."]
    return (inside[0],) if len(inside) == 1 and _holds_dataset(inside[0]) else (folder,)


def _holds_dataset(folder: Path) -> bool:
    """Whether `folder`, the only entry of a zip, is the whole data set and not one of its parts."""
    if _find([folder], "train.csv", "train"):
        return True
    if not folder.is_dir() or folder.name in ("train", *_TEST_FOLDERS):
        return False
    inside = list(folder.iterdir())
    images = (path.suffix.lower() in _IMAGE_SUFFIXES for path in inside if path.is_file())
    return any(path.is_dir() for path in inside) and not any(images)


def list_images(roots: Sequence[Path], path: Path) -> Listing:
    """The images found in `roots`, searched in order. `path` is what the user gave, for messages."""
    table, sample = _find(roots, "train.csv"), _find(roots, *_SAMPLE_FILES)
    labelled = _from_folders(roots) if table is None else _from_table(table, roots)
    if not labelled:
        raise ValueError(
            f"no images in {str(path)!r}: it needs train.csv, or a folder for each class in it or train/"
        )
    test = _list_tests(roots, sample)
    for images in (labelled, test):
        _refuse_duplicate_ids(images)
        _refuse_non_utf8_names(images)
    labelled.sort(key=lambda image: image.id)
    return Listing(labelled, test, _read_names(_find(roots, "classes.txt")), sample)


def _find(roots: Sequence[Path], *names: str) -> Path | None:
    return next((root / name for root in roots for name in names if (root / name).exists()), None)


def _from_table(table: Path, roots: Sequence[Path]) -> list[ListedImage]:
    frame = _read_table(table)
    path, label = _first_column(frame, _PATH_COLUMNS), _first_column(frame, _LABEL_COLUMNS)
    if path and label:
        rows = list(zip(frame[path], frame[label], strict=True))
        return [
            ListedImage(_checked_path(i, table), table.parent / i, _checked_label(label, table))
            for i, label in rows
        ]
    if not {"id", "category"} <= set(frame.columns):
        raise ValueError(
            f"{str(table)!r} has the columns {list(frame)}; needed are Id,Category or path,label"
        )
    train = _find(roots, "train")
    if train is None:
        raise ValueError(f"there is no train folder (or train.zip) beside {str(table)!r}")
    for category in sorted(set(frame["category"])):
        if not (train / _checked_path(category, table)).is_dir():
            raise ValueError(f"the class {category!r} of {str(table)!r} has no folder in {str(train)!r}")
    rows = list(zip(frame["id"], frame["category"], strict=True))
    return [ListedImage(_checked_path(i, table), train / category / i, category) for i, category in rows]


def _from_folders(roots: Sequence[Path]) -> list[ListedImage]:
    train = _find(roots, "train")
    not_classes = () if train else _TEST_FOLDERS
    base = train or roots[0]
    folders = [folder for folder in sorted(base.iterdir()) if folder.is_dir()]
    labelled = []
    for folder in folders:
        if folder.name in not_classes or folder.name.startswith("."):
            continue
        if base.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"the class folder {str(folder)!r} is a link to what holds it: remove the link")
        names = image_names(folder)
        if not names:
            raise ValueError(f"the class folder {str(folder)!r} holds no images: fill or remove it")
        labelled += [ListedImage(f"{folder.name}/{name}", folder / name, folder.name) for name in names]
    return labelled


def _list_tests(roots: Sequence[Path], sample: Path | None) -> list[ListedImage]:
    table, folder = _find(roots, "test.csv"), _find(roots, *_TEST_FOLDERS)
    ids = [] if sample is None else [_checked_path(i, sample) for i in read_sample(sample).iloc[:, 0]]
    if table is not None:
        return _tests_from_table(table, sample, ids)
    if folder is None and sample is not None:
        raise ValueError(f"{str(sample)!r} lists test images, but there is no test_upload or test folder")
    if folder is None:
        return []
    names = image_names(folder)
    if sample is not None:
        unlisted = sorted(set(names) - set(ids))
        if unlisted:
            raise ValueError(
                f"{len(unlisted)} images of {str(folder)!r} are not in {str(sample)!r}, "
                f"the first is {unlisted[0]!r}: add or remove them"
            )
        names = ids
    return [ListedImage(name, folder / name) for name in names]


def _tests_from_table(table: Path, sample: Path | None, sample_ids: Sequence[str]) -> list[ListedImage]:
    frame = _read_table(table)
    path = _first_column(frame, _PATH_COLUMNS)
    if path is None:
        raise ValueError(f"{str(table)!r} has the columns {list(frame)}; needed is path")
    names = [_checked_path(i, table) for i in frame[path]]
    if sample is not None and (mismatched := sorted(set(names) ^ set(sample_ids))):
        raise ValueError(
            f"{str(table)!r} and {str(sample)!r} do not list the same images, only one of them names "
            f"{mismatched[0]!r}: correct one, or take one away"
        )
    return [ListedImage(name, table.parent / name) for name in names]


def image_names(folder: Path) -> list[str]:
    """Paths of the images at any depth below `folder`, relative to it, sorted.

    Skips hidden files and folders. Follows links to folders, except to one above `folder` or already visited.
    """
    files: list[Path] = []
    top, visited = folder.resolve(), set[Path]()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        if real in visited or (real != top and top.is_relative_to(real)):
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if name[0] != "."]
        files += [Path(parent, name).relative_to(folder) for name in names if name[0] != "."]
    return sorted(file.as_posix() for file in files if file.suffix.lower() in _IMAGE_SUFFIXES)


def _read_table(table: Path) -> pd.DataFrame:
    """All columns as text, column names in lower case."""
    try:
        # header=None: otherwise pandas drops surplus cells of a long row and renames columns of the same name
        rows = pd.read_csv(table, header=None, dtype=str, na_filter=False, encoding="utf-8-sig").fillna("")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{str(table)!r} cannot be read as CSV: {one_line(error)}; needed is UTF-8 text with commas"
        ) from None
    columns = [name.strip().lower() for name in rows.iloc[0]]
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise ValueError(f"{str(table)!r} has more than one column {twice[0]!r}: keep one")
    return pd.DataFrame(rows.iloc[1:].to_numpy(), columns=columns)


def _first_column(frame: pd.DataFrame, columns: Sequence[str]) -> str | None:
    return next((column for column in columns if column in frame), None)


def _checked_path(name: str, source: Path) -> str:
    """`name`, a relative path that stays below its folder. ValueError names `source`, which lists it."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(
            f"{str(source)!r} names {name!r}, which is not a path inside its folder: correct the row"
        )
    return name


def _checked_label(name: str, source: Path) -> str:
    """`name`, usable as a class name. ValueError names `source`, which lists it."""
    if not name.strip() or "\0" in name:
        raise ValueError(f"{str(source)!r} has the label {name!r}, which names no class: correct the row")
    return name


def _refuse_duplicate_ids(images: list[ListedImage]) -> None:
    name, count = next(iter(Counter(image.id for image in images).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"the id {name!r} is there {count} times: ids must be unique")


def _refuse_non_utf8_names(images: list[ListedImage]) -> None:
    """File names are bytes. One that is not UTF-8 could not be written to a table."""
    for image in images:
        try:
            image.id.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the name of {str(image.path)!r} is not UTF-8: rename it") from None


def _read_names(path: Path | None) -> dict[str, str]:
    """Category -> name for display, from classes.txt; empty without one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8: {one_line(error)}; save it as such") from None
    rows = [line.split(maxsplit=1) for line in lines if line.strip()]
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"{str(path)!r} has the line {row[0]!r}; needed is '<category> <name>'")
    if twice := [category for category, count in Counter(row[0] for row in rows).items() if count > 1]:
        raise ValueError(f"{str(path)!r} names the class {twice[0]!r} more than once: keep one line")
    return {category: name.strip() for category, name in rows}

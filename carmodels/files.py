"""Atomic writes, appends and checked reads of a study's files, and the paths that users give."""

from __future__ import annotations

import json
import math
import os
import reprlib
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

NUMBER = (int, float)  # a kind of `other_kind`


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON, atomically. NaN and infinity become null."""
    write_atomic(path, json.dumps(json_ready(content), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in the file. ValueError names a damaged file, MissingKeyError an absent key.

    `kinds`: what the values must be where they are there, as in `other_kind`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda o: _CheckedDict(path, o))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); bring a copy back, or delete it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it holds no object); bring a copy back, or delete it")
    if wrong := other_kind(content, kinds or {}):
        raise ValueError(f"{path} is damaged ({wrong}); bring a copy back")
    return content


def other_kind(value: object, kind: Any, name: str = "it") -> str:
    """The first value that is not of its kind, in words; "" if all are.

    A kind is a type, several in a tuple, [kind] for a list, or {key: kind} for an object. Keys that the
    object lacks, or that the kind does not name, are not looked at.
    """
    plain = type(kind) if isinstance(kind, list | dict) else kind
    if not isinstance(value, plain):
        return f"{name} is {reprlib.repr(value)}"
    if isinstance(kind, list):
        parts = [(item, kind[0], f"{name}[{row}]") for row, item in enumerate(cast("list[Any]", value))]
    elif isinstance(kind, dict):
        there = cast("dict[str, Any]", value)
        parts = [(there[key], wanted, key) for key, wanted in kind.items() if key in there]
    else:
        parts = []
    return next((wrong for part in parts if (wrong := other_kind(*part))), "")


class MissingKeyError(ValueError, KeyError):
    """A file lacks a key that it should have. Also a KeyError, as templates expect."""

    __str__ = ValueError.__str__  # KeyError's would quote the message


class _CheckedDict(dict[str, Any]):
    """An object from a JSON file. A missing key raises an error that names the file."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._path = path  # private, as templates read keys as attributes and a file may have a key `path`

    def __missing__(self, key: str) -> NoReturn:
        raise MissingKeyError(
            f"{self._path} has no {key!r}: it is damaged, or of another version of this program; "
            "use the version it was made with, or begin another study"
        )


def json_ready(value: Any) -> Any:
    """The value in JSON's types. NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    if getattr(value, "ndim", None) == 0:  # a scalar of NumPy's, which a script's --help need not import
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def user_path(text: str | Path) -> Path:
    """The absolute path for what a user typed, `~` expanded. ValueError names text that is no path."""
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{str(text)!r}: there is no such home folder; write the path in full") from None
    try:
        path.resolve()
    except RuntimeError:
        raise ValueError(f"{str(text)!r} is a circle of symbolic links: give a path without it") from None
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(text)!r} is not UTF-8, as paths must be here: rename it") from None
    return path


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as CSV (RFC 4180, but with Unix line ends). None becomes an empty cell.

    With these line ends, csv.writer of Python 3.11 does not quote a carriage return.
    """
    return "".join(",".join(map(_field, row)) + "\n" for row in rows)


def _field(value: object) -> str:
    text = "" if value is None else str(value)
    return f'"{text.replace(chr(34), 2 * chr(34))}"' if any(c in text for c in '",\r\n') else text


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content`, text as UTF-8, to `path`, atomically. The folder must exist.

    Readers see the old file or the new one, never a part: a temporary file is written beside it, synced to
    disk and renamed. After an OSError the old file is unchanged and no temporary file is left.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # of a full disk, it names no file
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append `line` and a newline to `path` in one write, synced to disk. Creates a missing file.

    If an earlier append was cut off, the line starts on a new one. ValueError for a line that contains a
    newline, OSError if the disk took only a part.
    """
    if "\n" in line:
        raise ValueError(f"the line for {path} has a newline in it: {line!r}; append its lines one by one")
    # Unbuffered: one call is one write, so lines of two processes cannot mix.
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        data = (("\n" if _lacks_newline(path, end) else "") + line + "\n").encode()
        written = file.write(data)
        if written != len(data):
            raise OSError(f"{path}: only {written} of {len(data)} bytes were written; is the disk full?")
        os.fsync(file.fileno())
    if end == 0:
        _sync_folder(path.parent)


def _lacks_newline(path: Path, end: int) -> bool:
    """Whether the file, of `end` bytes, has content that does not end with a newline."""
    if end == 0:
        return False
    with path.open("rb") as file:
        file.seek(end - 1)
        return file.read(1) != b"\n"


def _sync_folder(folder: Path) -> None:
    """Sync the folder to disk, since a new file name is stored in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

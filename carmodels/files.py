"""Files that are whole or absent, whatever kills the process: how everything under `results/` is written."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON, whole or not at all; NaN and infinity become null."""
    write_whole(path, json.dumps(json_ready(content), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError naming a file that is no JSON object; later, LackingKey for what it does not say."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda values: _Known(path, values))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); bring a copy back, or delete it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no object); bring a copy back, or delete it")
    return found


class LackingKey(ValueError, KeyError):
    """A file of the study does not say what it should; a KeyError as well, which templates expect."""

    __str__ = ValueError.__str__  # KeyError's puts it in quotes


class _Known(dict[str, Any]):
    """What a file says; asked for what it does not say, it names the file."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._path = path  # templates ask for a key as for an attribute, and a file may have a key `path`

    def __missing__(self, key: str) -> NoReturn:
        raise LackingKey(
            f"{self._path} has no {key!r}: it is damaged, or of another version of this program; "
            "use the version it was made with, or begin another study"
        )


def json_ready(value: Any) -> Any:
    """The value in JSON's own types."""
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
    """The absolute path that a user means, with `~` as the home folder; ValueError names what is no path."""
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{str(text)!r}: there is no such home folder; write the path in full") from None
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(text)!r} is not UTF-8, as paths must be here: rename it") from None
    return path


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as RFC 4180 has it, but for line ends of Unix; None is empty.

    Python 3.11's csv.writer leaves a carriage return in a name without quotes, with these line ends.
    """
    return "".join(",".join(map(_field, row)) + "\n" for row in rows)


def _field(value: object) -> str:
    text = "" if value is None else str(value)
    return f'"{text.replace(chr(34), 2 * chr(34))}"' if any(c in text for c in '",\r\n') else text


def write_whole(path: Path, content: bytes | str) -> None:
    """Puts `content` (text as UTF-8) at `path`, whose folder must exist, in place of what was there.

    A reader sees the old file or the new one, never a part: the bytes go to a temporary file beside it, which
    is renamed once they are on the disk. OSError leaves the old file as it was and no temporary file.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Adds `line` and a newline to `path`, made where it is missing, in one write, and waits for the disk.

    A file that does not end with a newline was torn by an earlier append: the line then starts on a new one.
    ValueError for a line with a newline in it; OSError where the disk took only a part.
    """
    if "\n" in line:
        raise ValueError(f"the line for {path} has a newline in it: {line!r}; append its lines one by one")
    # unbuffered, so that one call is one write and lines of two processes cannot mix
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        data = (("\n" if _is_torn(path, end) else "") + line + "\n").encode()
        written = file.write(data)
        if written != len(data):
            raise OSError(f"{path}: only {written} of {len(data)} bytes were written; is the disk full?")
        os.fsync(file.fileno())
    if end == 0:
        _sync_folder(path.parent)


def _is_torn(path: Path, end: int) -> bool:
    if end == 0:
        return False
    with path.open("rb") as file:
        file.seek(end - 1)
        return file.read(1) != b"\n"


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk only once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Files that are whole or absent, whatever kills the process: how everything under `results/` is written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path


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

"""SHA-256 of files, remembered by path, size and modification time."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from carmodels.data.decode import raise_machine_trouble
from carmodels.files import write_whole


class DamagedCache(ValueError):
    """The cache folder is missing, incomplete or altered."""


def file_digests(paths: Sequence[Path], manifest: Path) -> list[str]:
    """SHA-256 of each file's bytes in hex, "" for one that cannot be read.

    `manifest` remembers digests by path, size and modification time, so that unchanged files are not read.
    """
    known: dict[str, list[Any]] = {}
    with contextlib.suppress(DamagedCache):
        known = read_checked(manifest)

    def entry(path: Path) -> list[Any]:
        try:
            if not path.is_file():
                return [None, None, ""]
            stat = path.stat()
            old = known.get(str(path), [None, None, ""])
            if old[:2] == [stat.st_size, stat.st_mtime_ns]:
                return old
            with path.open("rb") as file:
                return [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise_machine_trouble(error)
            return [None, None, ""]

    with ThreadPoolExecutor() as pool:
        entries = dict(zip(map(str, paths), pool.map(entry, paths), strict=True))
    if entries != known:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        write_checked(manifest, entries)
    return [entries[str(path)][2] for path in paths]


def write_checked(path: Path, value: Any) -> None:
    """Write JSON below a line that holds its SHA-256; whole or not at all."""
    body = json.dumps(value).encode()
    write_whole(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def read_checked(path: Path) -> Any:
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCache(f"{str(path)!r} is missing: open the data set again to rebuild it") from None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedCache(f"{str(path)!r} is damaged: open the data set again to rebuild it")
    return json.loads(body)

"""SHA-256 digests of files, cached by path, size and modification time, and JSON files with a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from carmodels.data.decode import reraise_resource_error
from carmodels.files import write_atomic


class DamagedCache(ValueError):
    """The cache folder is missing, incomplete or altered."""


def file_digests(paths: Sequence[Path], manifest: Path) -> list[str]:
    """SHA-256 of each file in hex, "" for a file that cannot be read.

    `manifest` keeps digests by path, size and modification time. Unchanged files are not read again.
    """
    known: dict[str, list[Any]] = {}
    with contextlib.suppress(DamagedCache):
        known = read_checksummed(manifest)

    def entry(path: Path) -> list[Any]:
        try:
            if not path.is_file():
                return [None, None, ""]
            stat = path.stat()
            remembered = known.get(str(path), [None, None, ""])
            if remembered[:2] == [stat.st_size, stat.st_mtime_ns]:
                return remembered
            with path.open("rb") as file:
                return [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            reraise_resource_error(error)
            return [None, None, ""]

    with ThreadPoolExecutor() as pool:
        entries = dict(zip(map(str, paths), pool.map(entry, paths), strict=True))
    if entries != known:
        with contextlib.suppress(OSError):  # in a folder that is not ours to write to, they are not kept
            manifest.parent.mkdir(parents=True, exist_ok=True)
            write_checksummed(manifest, entries)
    return [entries[str(path)][2] for path in paths]


def write_checksummed(path: Path, value: Any) -> None:
    """Write JSON below a line with its SHA-256, atomically."""
    body = json.dumps(value).encode()
    write_atomic(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def read_checksummed(path: Path) -> Any:
    """What `write_checksummed` wrote. Raises DamagedCache."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCache(f"{str(path)!r} is missing: open the data set again to rebuild it") from None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedCache(f"{str(path)!r} is damaged: open the data set again to rebuild it")
    return json.loads(body)

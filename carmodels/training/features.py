"""Outputs of a frozen backbone for fixed views of the images, computed once and shared by all trials.

While nothing of the backbone learns, an epoch needs only its pooled features. They are kept on disk for a few
random views of every training image (epoch after epoch takes the next one, and begins again after the last)
and the plain view of val, so that a frozen epoch trains the head alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from carmodels.files import write_atomic

VIEWS_KEPT = 4  # random views of each training image
VERSION = 1  # of what the files hold
LIMIT = 20 * 2**30  # bytes in the folder; the files not read for longest go first


@dataclass(frozen=True)
class FeatureStore:
    """A folder of feature arrays, each in a file named by the hash of everything that decides its content."""

    folder: Path
    limit: int = LIMIT  # bytes

    def get(self, content: dict[str, Any], rows: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """(rows, F) float16, read from its file; `compute` -> (rows, F) fills one that is missing or damaged.

        `content` names, in JSON's types, everything that the array depends on. A second process that asks for
        the same array meanwhile waits for the first.
        """
        key = hashlib.sha256(json.dumps([VERSION, content], sort_keys=True).encode()).hexdigest()[:24]
        path = self.folder / f"{key}.npy"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            found = _read(path, rows)
            if found is None:
                found, buffer = compute().astype(np.float16), io.BytesIO()
                np.save(buffer, found, allow_pickle=False)
                write_atomic(path, buffer.getvalue())
                self._make_room()
        with suppress(FileNotFoundError):  # another process may have made room
            os.utime(path)
        return found

    def _make_room(self) -> None:
        """Delete the files that were not read for longest, until what is left is within the limit."""
        with FileLock(self.folder / ".room.lock"):  # what one has seen another must not delete meanwhile
            files = sorted(self.folder.glob("*.npy"), key=lambda p: p.stat().st_mtime, reverse=True)
            kept = 0
            for number, path in enumerate(files):
                kept += path.stat().st_size
                if number and kept > self.limit:  # the newest stays: it is about to be read
                    path.unlink(missing_ok=True)


def _read(path: Path, rows: int) -> np.ndarray | None:
    """The array, mapped into memory; None where the file is missing or not what it should be."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.ndim == 2 and len(found) == rows and found.dtype == np.float16 else None

"""Feature arrays on disk, computed once and shared by all trials (`FeatureStore`)."""

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

VIEWS_KEPT = 4  # random views stored for each training image
FEATURES_VERSION = 1  # of the arrays' content
MAX_BYTES = 20 * 2**30


@dataclass(frozen=True)
class FeatureStore:
    """A folder of feature arrays. A file's name is the hash of everything that determines its content."""

    folder: Path
    max_bytes: int = MAX_BYTES  # above which the least recently read files are deleted

    def get(self, content: dict[str, Any], rows: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The array (rows, F) float16 that `content`, in JSON's types, determines.

        `compute` -> (rows, F) fills a missing or damaged file, while other processes that ask for it wait.
        """
        described = json.dumps([FEATURES_VERSION, content], sort_keys=True)
        key = hashlib.sha256(described.encode()).hexdigest()[:24]
        path = self.folder / f"{key}.npy"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            features = _read(path, rows)
            if features is None:
                features, buffer = compute().astype(np.float16), io.BytesIO()
                np.save(buffer, features, allow_pickle=False)
                write_atomic(path, buffer.getvalue())
                self._make_room()
        with suppress(FileNotFoundError):  # another process may have made room
            os.utime(path)
        return features

    def _make_room(self) -> None:
        """Delete the least recently read files beyond `max_bytes`, except the newest."""
        with FileLock(self.folder / ".room.lock"):  # stat fails on what another process deletes meanwhile
            files = sorted(self.folder.glob("*.npy"), key=lambda p: p.stat().st_mtime, reverse=True)
            total = 0
            for number, path in enumerate(files):
                total += path.stat().st_size
                if number and total > self.max_bytes:
                    path.unlink(missing_ok=True)


def _read(path: Path, rows: int) -> np.ndarray | None:
    """The array, mapped into memory; None if the file is missing or damaged."""
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    intact = features.ndim == 2 and len(features) == rows and features.dtype == np.float16
    return features if intact else None

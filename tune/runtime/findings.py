"""Checks of a machine. Each finding is one line with its remedy."""

from __future__ import annotations

import math
import resource
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

GB = 1e9
SHARED_MEMORY = 0.3 * GB  # bytes that Ray wants
FEWEST_FILES = 1024  # open files per process


@dataclass(frozen=True)
class Finding:
    """One line; `fatal` if the search would fail."""

    words: str
    fatal: bool = False


def folder_findings(wanted: Mapping[str, Path]) -> list[Finding]:
    return [
        Finding(f"{option} {folder}: no writing there ({trouble}); give a folder of your own", fatal=True)
        for option, folder in wanted.items()
        if (trouble := _trouble_writing(folder))
    ]


def _trouble_writing(folder: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(folder)):
            return ""
    except OSError as error:
        return str(error.strerror or error)


def nearest_existing(folder: Path) -> Path:
    return folder if folder.exists() or folder == folder.parent else nearest_existing(folder.parent)


def shared_memory_findings(loaded: float = 0.0) -> list[Finding]:
    folder = Path("/dev/shm")
    free = shutil.disk_usage(folder).free if folder.is_dir() else float("inf")
    if free < loaded:
        enough = math.ceil((SHARED_MEMORY + 2 * loaded) / GB)
        return [
            Finding(
                f"/dev/shm has {free / GB:.2f} GB free, loader processes hand over images there and need "
                f"{loaded / GB:.2f} GB; in a container: --shm-size={enough}g",
                fatal=True,
            )
        ]
    if free >= SHARED_MEMORY:
        return []
    return [
        Finding(
            f"/dev/shm has {free / GB:.2f} GB free, Ray wants {SHARED_MEMORY / GB:.1f} GB and will use the "
            "disk instead; in a container: --shm-size=1g"
        )
    ]


def file_handle_findings() -> list[Finding]:
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed >= FEWEST_FILES:
        return []
    more = most == resource.RLIM_INFINITY or most >= FEWEST_FILES
    remedy = f"ulimit -n {FEWEST_FILES}" if more else "ask the administrator for more"
    return [Finding(f"{allowed} files may be open at a time, Ray needs {FEWEST_FILES}: {remedy}", fatal=True)]

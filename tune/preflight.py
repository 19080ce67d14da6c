"""What could stop a search halfway, looked for before it starts: each finding is one line with its remedy."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from carmodels.catalog import BACKBONES
from carmodels.space import Space
from carmodels.study import Study
from tune.trials import WEIGHTS_KEPT, Workers

GB = 1e9
WORKER_BYTES = 1.5 * GB  # a worker that trains a small network on a CPU; larger ones and sizes take more
RAY_DISK = 0.5 * GB  # logs and spilled objects of a run
SHARED_MEMORY = 0.3 * GB  # what Ray keeps of it
FEWEST_FILES = 1024  # open at a time, by one process
BYTES_PER_PARAMETER = 4


@dataclass(frozen=True)
class Finding:
    """One line; `fatal` where a search would surely fail."""

    words: str
    fatal: bool = False


def findings(study: Study, space: Space, workers: Workers | None, cache: Path) -> list[Finding]:
    """Everything that was found, the fatal first. Without `workers` they are another machine's matter."""
    found = [
        *_folders(study, cache),
        *_disk(study, space),
        *(_memory(workers) if workers else ()),
        *_shared_memory(),
        *_handles(),
        *_other_rays(),
    ]
    return sorted(found, key=lambda finding: not finding.fatal)


def _folders(study: Study, cache: Path) -> list[Finding]:
    wanted = {"--results": study.folder.parent, "--cache": cache}
    return [
        Finding(f"{option} {folder}: no writing there ({trouble}); give a folder of your own", fatal=True)
        for option, folder in wanted.items()
        if (trouble := _trouble_writing(folder))
    ]


def _trouble_writing(folder: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return ""
    except OSError as error:
        return str(error.strerror or error)


def _disk(study: Study, space: Space) -> list[Finding]:
    """Weights of the best trials, of retrained ones and of those that end meanwhile; Ray's own files."""
    largest = max(BACKBONES[name].millions for name in space.backbones) * 1e6 * BYTES_PER_PARAMETER
    needed = RAY_DISK + (WEIGHTS_KEPT + 5) * largest
    free = shutil.disk_usage(_existing(study.folder)).free
    if free >= needed:
        return []
    return [
        Finding(
            f"--results {study.folder.parent}: {free / GB:.1f} GB are free, about {needed / GB:.1f} GB are "
            "needed; make room or give another folder",
            fatal=True,
        )
    ]


def _existing(folder: Path) -> Path:
    return folder if folder.exists() or folder == folder.parent else _existing(folder.parent)


def _memory(workers: Workers) -> list[Finding]:
    """Of the machine, or of the container where that has less."""
    available = min(psutil.virtual_memory().available, _container_memory())
    needed = workers.at_once * WORKER_BYTES
    if available >= needed:
        return []
    fewer = max(1, int(available / WORKER_BYTES))
    return [
        Finding(
            f"{available / GB:.1f} GB of memory are free for {workers.at_once} workers, which take about "
            f"{needed / GB:.1f} GB; --workers {fewer} is safer"
        )
    ]


def _container_memory() -> float:
    """Bytes that this control group may still take; infinite where nothing limits it."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = float((folder / "memory.max").read_text())
        return limit - float((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return float("inf")


def _shared_memory() -> list[Finding]:
    folder = Path("/dev/shm")
    free = shutil.disk_usage(folder).free if folder.is_dir() else float("inf")
    if free >= SHARED_MEMORY:
        return []
    return [
        Finding(
            f"/dev/shm has {free / GB:.2f} GB free, Ray wants {SHARED_MEMORY / GB:.1f} GB and will use the "
            "disk instead; in a container: --shm-size=1g"
        )
    ]


def _handles() -> list[Finding]:
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed >= FEWEST_FILES:
        return []
    more = most == resource.RLIM_INFINITY or most >= FEWEST_FILES
    remedy = f"ulimit -n {FEWEST_FILES}" if more else "ask the administrator for more"
    return [Finding(f"{allowed} files may be open at a time, Ray needs {FEWEST_FILES}: {remedy}", fatal=True)]


def _other_rays() -> list[Finding]:
    """Ray instances of the same user that are there already, which take cores that are not theirs alone."""
    found = []
    for process in psutil.process_iter(["pid", "name", "uids"]):
        uids = process.info["uids"]
        if process.info["name"] == "raylet" and uids is not None and uids.real == os.getuid():
            found.append(process.info["pid"])
    if not found:
        return []
    numbers = ", ".join(map(str, found))
    return [
        Finding(
            f"another Ray is running here (process {numbers}) and will share the machine with this search; "
            "`ray stop` ends it if it was left behind"
        )
    ]

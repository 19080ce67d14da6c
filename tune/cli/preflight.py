"""Checks before a search for problems that would stop it later. Each finding has its remedy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil

from carmodels.data.loader import PREFETCHED
from carmodels.models.facts import facts_of
from carmodels.space import Space
from carmodels.study import Study
from tune.budget.stages import WEIGHTS_KEPT
from tune.runtime.findings import (
    GB,
    Finding,
    file_handle_findings,
    folder_findings,
    nearest_existing,
    shared_memory_findings,
)
from tune.runtime.job import Workers

WORKER_BYTES = 1.5 * GB  # a small network on a CPU; larger networks and images take more
RAY_DISK = 0.5 * GB  # logs and spilled objects per run
BYTES_PER_PARAMETER = 4


def findings(
    study: Study, space: Space, workers: Workers | None, cache: Path, *, later: int
) -> list[Finding]:
    """All findings, the fatal ones first. Without `workers`, trials run on a cluster's machines.

    `later`: number of models that later stages may add to those of the search.
    """
    found = [
        *folder_findings({"--results": study.folder.parent, "--cache": cache}),
        *_disk(study, space, later),
        *([*_memory(workers), *_other_rays()] if workers else ()),
        *shared_memory_findings(_loaded(space, workers) if workers else 0.0),
        *file_handle_findings(),
    ]
    return sorted(found, key=lambda finding: not finding.fatal)


def _disk(study: Study, space: Space, later: int) -> list[Finding]:
    """Disk space for Ray's files and for weights: best trials, reruns, retrained models, soups."""
    largest = max(facts_of(name).millions for name in space.backbones) * 1e6 * BYTES_PER_PARAMETER
    there = sum(file.stat().st_size for file in study.weights_file("x").parent.glob("*"))
    needed = RAY_DISK + max(0.0, (WEIGHTS_KEPT + later) * largest - there)
    free = shutil.disk_usage(nearest_existing(study.folder)).free
    if free >= needed:
        return []
    return [
        Finding(
            f"--results {study.folder.parent}: {free / GB:.1f} GB are free, about {needed / GB:.1f} GB are "
            "needed; make room or give another folder",
            fatal=True,
        )
    ]


def _memory(workers: Workers) -> list[Finding]:
    """Memory of the machine, or of the container if that has less."""
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
    """Bytes left to this control group; infinite without a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = float((folder / "memory.max").read_text())
        return limit - float((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return float("inf")


def _loaded(space: Space, workers: Workers) -> float:
    """Bytes in shared memory: the batches that loader processes have ready. Those of val are the largest."""
    images = 2 * space.largest_batch_size
    batches = workers.count * workers.processes * PREFETCHED
    return float(batches * images * 3 * space.largest_size**2)


def _other_rays() -> list[Finding]:
    """Other Ray instances of this user. They compete for cores and GPUs.

    A search is the parent of its Ray.
    """
    other_pids: list[int] = []
    searches: list[str] = []
    for process in psutil.process_iter(["pid", "ppid", "name", "uids"]):
        uids = process.info["uids"]
        if process.info["name"] == "raylet" and uids is not None and uids.real == os.getuid():
            if study := _search_of(process.info["ppid"]):
                searches.append(study)
            else:
                other_pids.append(process.info["pid"])
    found = []
    if searches:
        found.append(
            f"another search is running here ({'; '.join(searches)}) and takes the same cores and GPUs; "
            "wait for its end, or give each its own with --workers and CUDA_VISIBLE_DEVICES"
        )
    if other_pids:
        numbers = ", ".join(map(str, other_pids))
        found.append(
            f"another Ray is running here (process {numbers}) and will share the machine with this search; "
            "`ray stop` ends it if it was left behind"
        )
    return [Finding(words) for words in found]


def _search_of(pid: int) -> str:
    """Process id and study of a search; empty if the process is not a search."""
    try:
        command = psutil.Process(pid).cmdline()
    except psutil.Error:
        return ""
    if not any(Path(word).parts[-2:] == ("tune", "search.py") for word in command):
        return ""
    pairs = zip(command, [*command[1:], ""], strict=True)
    names = [word[8:] or after for word, after in pairs if word == "--study" or word.startswith("--study=")]
    return f"process {pid}, study {names[-1] if names else 'its own'}"

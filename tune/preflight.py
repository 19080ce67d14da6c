"""What could stop a search halfway, looked for before it starts: each finding is one line with its remedy."""

from __future__ import annotations

import importlib.metadata
import math
import os
import resource
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from carmodels.catalog import BACKBONES
from carmodels.space import Space, TrialConfig
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


def findings(
    study: Study, space: Space, workers: Workers | None, cache: Path, *, later: int
) -> list[Finding]:
    """Everything that was found, the fatal first. Without `workers` they are other machines' matter.

    `later`: models that further stages may leave beside those of the search.
    """
    found = [
        *_folders({"--results": study.folder.parent, "--cache": cache}),
        *_disk(study, space, later),
        *([*_memory(workers), *_other_rays()] if workers else ()),
        *_shared_memory(_loaded(space, workers) if workers else 0.0),
        *_handles(),
    ]
    return sorted(found, key=lambda finding: not finding.fatal)


def _folders(wanted: Mapping[str, Path]) -> list[Finding]:
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


def _disk(study: Study, space: Space, later: int) -> list[Finding]:
    """Weights of the best trials, of reruns, of retrained ones and of their soups; Ray's own files."""
    largest = max(BACKBONES[name].millions for name in space.backbones) * 1e6 * BYTES_PER_PARAMETER
    there = sum(file.stat().st_size for file in study.weights_file("x").parent.glob("*"))
    needed = RAY_DISK + max(0.0, (WEIGHTS_KEPT + later) * largest - there)
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


def _loaded(space: Space, workers: Workers) -> float:
    """Bytes that loader processes hand over in shared memory: of each a batch of val, the larger ones."""
    pictures = 2 * space.fixed.get("batch_size", TrialConfig.batch_size)
    return float(workers.count * workers.processes * pictures * 3 * space.largest_size**2)


def _shared_memory(loaded: float = 0.0) -> list[Finding]:
    folder = Path("/dev/shm")
    free = shutil.disk_usage(folder).free if folder.is_dir() else float("inf")
    if free < loaded:
        enough = math.ceil((SHARED_MEMORY + 2 * loaded) / GB)
        return [
            Finding(
                f"/dev/shm has {free / GB:.2f} GB free, loader processes hand over pictures there and need "
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


def _handles() -> list[Finding]:
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed >= FEWEST_FILES:
        return []
    more = most == resource.RLIM_INFINITY or most >= FEWEST_FILES
    remedy = f"ulimit -n {FEWEST_FILES}" if more else "ask the administrator for more"
    return [Finding(f"{allowed} files may be open at a time, Ray needs {FEWEST_FILES}: {remedy}", fatal=True)]


def _other_rays() -> list[Finding]:
    """Ray instances of the same user, which take cores and GPUs that are not theirs alone.

    Each search is the parent of one.
    """
    rays: list[int] = []
    searches: list[str] = []
    for process in psutil.process_iter(["pid", "ppid", "name", "uids"]):
        uids = process.info["uids"]
        if process.info["name"] == "raylet" and uids is not None and uids.real == os.getuid():
            if study := _searched(process.info["ppid"]):
                searches.append(study)
            else:
                rays.append(process.info["pid"])
    found = []
    if searches:
        found.append(
            f"another search is running here ({'; '.join(searches)}) and takes the same cores and GPUs; "
            "wait for its end, or give each its own with --workers and CUDA_VISIBLE_DEVICES"
        )
    if rays:
        numbers = ", ".join(map(str, rays))
        found.append(
            f"another Ray is running here (process {numbers}) and will share the machine with this search; "
            "`ray stop` ends it if it was left behind"
        )
    return [Finding(words) for words in found]


def _searched(pid: int) -> str:
    """What the process searches, in words; empty where it is no search of ours."""
    try:
        command = psutil.Process(pid).cmdline()
    except psutil.Error:
        return ""
    if not any(Path(word).parts[-2:] == ("tune", "search.py") for word in command):
        return ""
    pairs = zip(command, [*command[1:], ""], strict=True)
    names = [word[8:] or after for word, after in pairs if word == "--study" or word.startswith("--study=")]
    return f"process {pid}, study {names[-1] if names else 'its own'}"


# ---- the machines of a cluster

PATIENCE = 120.0  # seconds for a machine to receive our code, start a worker and answer
PACKAGES = ("torch", "torchvision", "timm", "albumentations", "numpy")  # which change what a trial comes to


def cluster_findings(results: Path, shared: Mapping[str, Path], cache: Path) -> list[Finding]:
    """What is amiss on the machines of the cluster that was joined, the fatal first.

    `results` must be one folder that all see, `shared` (by option) must be there on all, `cache` is each
    machine's own or shared.
    """
    results.mkdir(parents=True, exist_ok=True)
    marker = results / f".{secrets.token_hex(8)}.shared"
    marker.touch()
    look = ray.remote(num_cpus=0, max_retries=0)(_on_this_machine)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    try:
        asked = {
            address: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
            ).remote(marker, shared, cache, _versions())
            for node_id, address in nodes.items()
        }
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=PATIENCE)
        found = [
            Finding(f"machine {address}: {finding.words}", finding.fatal)
            for address, answer in asked.items()
            for finding in _answer(answer)
        ]
    finally:
        marker.unlink()
    return sorted(found, key=lambda finding: not finding.fatal)


def _answer(answer: ray.ObjectRef) -> list[Finding]:
    try:
        return ray.get(answer, timeout=0)
    except GetTimeoutError:
        return [
            Finding(f"no answer in {PATIENCE:.0f} s; look at it, or take it out of the cluster", fatal=True)
        ]
    except RayError as error:
        last = str(error).strip().splitlines()[-1]
        return [
            Finding(
                f"our code does not run there ({last}); install what requirements.lock lists, in the same "
                "versions",
                fatal=True,
            )
        ]


def _on_this_machine(
    marker: Path, shared: Mapping[str, Path], cache: Path, versions: Mapping[str, str]
) -> list[Finding]:
    """What is amiss here, with what the machine that asks has at these paths and in these versions."""
    results = marker.parent
    if not marker.is_file():
        words = (
            f"--results {results} is not the folder that the search sees; give one that all machines share"
        )
        return [Finding(words, fatal=True)]
    missing = [
        Finding(f"{option} {path} is not there; share it, or put a copy at the same path", fatal=True)
        for option, path in shared.items()
        if not path.exists()
    ]
    other = [
        Finding(f"{name} is {here} there and {versions[name]} here; install the same")
        for name, here in _versions().items()
        if here != versions[name]
    ]
    folders = _folders({"--results": results, "--cache": cache})
    return [*missing, *folders, *other, *_shared_memory(), *_handles()]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}

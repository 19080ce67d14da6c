"""Costs of an epoch on this hardware, measured once and cached."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import timm
import torch
from filelock import FileLock
from ray.exceptions import RayError

from carmodels.files import read_json, write_json
from carmodels.space import Space, unfrozen_configs
from carmodels.training.config import TrialConfig
from carmodels.training.timing import training_seconds
from tune.budget.costs import Compiled, Costs
from tune.runtime.job import Job, Say, as_task, failure_text, results_of

_VERSION = 5  # version of the cached file's contents
_PARTS = ("seconds", "bytes", "compiled")
_CHANGED = 1.6  # ratio of times, either way, beyond which cached costs are discarded
_WORTH_COMPILING = 120.0  # seconds per trial; the test takes a minute and saves less than a third


def processor() -> str:
    """The processor's name, or its architecture if the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _looked_at(job: Job, config: TrialConfig) -> tuple[str, float]:
    """A worker's device, which may differ from this machine's, and its current seconds per image."""
    job.begin()
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else processor()
    return device, _seconds(job, config)


def _seconds(job: Job, config: TrialConfig, **more: Any) -> float:
    own = job.workers
    return training_seconds(
        config, job.splits, weights=job.weights, device=own.device, processes=own.processes, **more
    )


def shared_gpu_bytes(job: Job) -> float:
    """Memory of a worker's GPU in bytes if trials share GPUs, else 0."""
    if not job.workers.packed:
        return 0.0
    [size] = results_of([as_task(_gpu_bytes, job.workers).remote()], "asking for a GPU's memory")
    return float(size)


def _gpu_bytes() -> float:
    return float(torch.cuda.get_device_properties(0).total_memory)


def costs_of(job: Job, space: Space, say: Say) -> Costs:
    """Costs of each backbone in the space. Cached by hardware and versions.

    As many measurements run side by side as trials will: they share memory bandwidth, caches and disks.

    One backbone is always timed again. If the time has changed by more than _CHANGED, the machine is or was
    busy, and all backbones are measured again.

    A backbone that cannot be measured costs infinitely much, so no trial of it fits; `say` tells why.
    ValueError if none can be measured.
    """
    configs, workers = unfrozen_configs(space), job.workers
    failures: dict[str, str] = {}
    device, sample, seconds = _probed(job, configs, failures)
    own = [device, workers.cpus, workers.gpus, workers.count]
    held_for = [_VERSION, *own, torch.__version__, timm.__version__]
    name = hashlib.sha256(json.dumps(held_for).encode()).hexdigest()[:12]
    path = job.cache / "costs" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        known = _known(path)
        keys = {b: _key(of_one) for b, of_one in configs.items() if b not in failures}
        before = known.get(keys[sample.backbone], {"seconds": {}})["seconds"].get(str(sample.image_size))
        if before and not 1 / _CHANGED < seconds / before < _CHANGED:
            known = {}
        missing = [b for b, key in keys.items() if key not in known or _untried(known[key], job, configs[b])]
        found = _measured(job, {b: configs[b] for b in missing}, failures)
        known |= {keys[backbone]: measured for backbone, measured in found.items()}
        if found:
            write_json(path, known)
    if len(failures) == len(configs):
        raise _nothing_trains(failures)
    for backbone, why in failures.items():
        say(f"No trial will have {backbone}: measuring its training failed ({why}).")
    unknown: dict[str, Any] = {part: {} for part in _PARTS}
    of = {b: unknown if b in failures else known[keys[b]] for b in configs}
    return Costs(
        seconds={b: {int(size): value for size, value in m["seconds"].items()} for b, m in of.items()},
        train=len(job.splits.train),
        val=len(job.splits.val),
        holdout_and_test=len(job.splits.holdout) + len(job.splits.test),
        caches_features=job.weights.source != "none",
        memory={b: {int(size): value for size, value in m["bytes"].items()} for b, m in of.items()},
        compiled={b: Compiled(**m["compiled"]) for b, m in of.items() if m["compiled"]},
    )


def _probed(
    job: Job, configs: Mapping[str, Sequence[TrialConfig]], failures: dict[str, str]
) -> tuple[str, TrialConfig, float]:
    """(a worker's device, a configuration, its seconds per image) of the first backbone that can be trained.

    Adds to `failures` why others cannot. ValueError if none can.
    """
    probe = as_task(_looked_at, job.workers)
    for backbone, of_one in configs.items():
        sample = of_one[-1]
        found, why = _finished([probe.remote(job, sample) for _ in range(job.workers.count)])
        if found:
            return found[0][0], sample, float(np.median([seconds for _, seconds in found]))
        failures[backbone] = why
    raise _nothing_trains(failures)


def _nothing_trains(failures: Mapping[str, str]) -> ValueError:
    reasons = "; ".join(dict.fromkeys(failures.values()))
    return ValueError(
        f"no backbone can be trained here, not even for a few steps ({reasons}): give fewer --workers, or "
        "smaller images with --set image_size=..."
    )


def _measured(
    job: Job, configs: Mapping[str, Sequence[TrialConfig]], failures: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Measurements by backbone. Adds to `failures` why a backbone could not be measured.

    Backbones are measured several times where that keeps all workers busy.
    """
    workers = job.workers.count
    turns = list(islice(cycle(configs), workers * math.ceil(len(configs) / workers)))
    measure = as_task(_measure, job.workers)
    tasks = [(backbone, measure.remote(job, configs[backbone])) for backbone in turns]
    measured = {}
    for backbone in configs:
        found, why = _finished([task for name, task in tasks if name == backbone])
        if found:
            measured[backbone] = _combined(found)
        else:
            failures[backbone] = why
    return measured


def _finished(tasks: Sequence[Any]) -> tuple[list[Any], str]:
    """The results of the Ray tasks that did not fail, and why the last one that failed did."""
    found, why = [], ""
    for task in tasks:
        try:
            found.append(ray.get(task))
        except RayError as error:
            why = failure_text(error)
    return found, why


def _combined(copies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One measurement of several of the same backbone. Leaves out sizes that did not fit in one of them."""
    sizes = [size for size in copies[0]["seconds"] if all(size in copy["seconds"] for copy in copies)]
    return {
        "seconds": {size: float(np.median([copy["seconds"][size] for copy in copies])) for size in sizes},
        "bytes": {s: max(copy["bytes"][s] for copy in copies) for s in sizes if s in copies[0]["bytes"]},
        "compiled": next((copy["compiled"] for copy in copies if copy["compiled"]), copies[0]["compiled"]),
    }


def _key(configs: Sequence[TrialConfig]) -> str:
    sizes = " ".join(str(c.image_size) for c in configs)
    return f"{configs[0].backbone} {sizes} px, batches of {configs[0].batch_size}"


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """Cached measurements by key; empty if the file is missing or damaged."""
    try:
        found = read_json(path)
        return {key: {part: _as_dict(value[part]) for part in _PARTS} for key, value in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _as_dict(part: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if part is None else dict(part)


def _untried(measured: Mapping[str, Any], job: Job, configs: Sequence[TrialConfig]) -> bool:
    """Whether torch.compile was skipped for too few images or epochs, and may pay now."""
    slowest = max(measured["seconds"].values(), default=0.0)
    return measured["compiled"] is None and _may_pay_to_compile(slowest, job, configs[0])


def _may_pay_to_compile(seconds: float, job: Job, config: TrialConfig) -> bool:
    return seconds * len(job.splits.train) * config.epochs >= _WORTH_COMPILING


def _measure(job: Job, configs: Sequence[TrialConfig]) -> dict[str, Any]:
    """Measure a backbone at its smallest size and the largest that fits in memory. Sizes descend."""
    job.begin()
    on_gpu = job.workers.device == "cuda"
    found: dict[str, Any] = {part: {} for part in _PARTS}

    for config in configs:
        if found["seconds"] and config is not configs[-1]:
            continue
        size = str(config.image_size)
        try:
            if on_gpu:
                gc.collect()
                torch.cuda.empty_cache()  # else memory of the previous size counts as reserved
                torch.cuda.reset_peak_memory_stats()
            eager = _seconds(job, config)
        except torch.OutOfMemoryError:
            continue
        if on_gpu:
            found["bytes"][size] = torch.cuda.max_memory_reserved()
        if on_gpu and not found["seconds"]:
            compiled = partial(_seconds, job, config, compiled=True)
            pays = _may_pay_to_compile(eager, job, config)
            found["compiled"] = _tried_to_compile(compiled, eager) if pays else None
        found["seconds"][size] = eager
    return found


def _tried_to_compile(run: Callable[[], float], eager: float) -> dict[str, float]:
    """Fields of `Compiled`; empty if this machine cannot compile (no C compiler, an old GPU, no memory)."""
    started = time.monotonic()
    try:
        compiled = run()
    except RuntimeError:  # base class of the errors of torch._dynamo, torch._inductor, and out of memory
        return {}
    return {"seconds": time.monotonic() - started, "ratio": compiled / eager}

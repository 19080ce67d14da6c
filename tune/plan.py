"""What an epoch costs on this hardware, measured once, and what a budget buys for it."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
import timm
import torch
from filelock import FileLock
from ray.tune import PlacementGroupFactory

from carmodels.space import Space, TrialConfig, suggest
from carmodels.study import read_json, write_json
from carmodels.training import training_seconds
from tune.costs import Compiled, Costs
from tune.scheduler import REDUCTION_FACTOR
from tune.trials import Job, as_task

_VERSION = 4  # of what a file of costs holds
_PARTS = ("seconds", "bytes", "compiled")
TRIAL_SHARE = 0.7  # of the time for searching that one trial may take on its worker: results/search/NOTES.md
_CHANGED = 1.6  # times as long or short, beyond which costs that were kept no longer hold
_WORTH_COMPILING = 120.0  # seconds of a trial; to find out takes a minute, and less than a third is saved
_SAMPLE = 300  # random configurations over which a plan averages


@dataclass(frozen=True)
class Plan:
    """What a search has time for. Without costs (no limit on time) everything fits."""

    costs: Costs | None
    end: float  # time.time()
    workers: int  # cores or whole GPUs that train at a time
    gpu_bytes: float = 0.0  # memory of a GPU that trials share as their need is; 0: none is shared so
    longest: float = math.inf  # seconds that a trial may take

    @property
    def core_seconds(self) -> float:
        """Seconds left, over all workers."""
        return max(0.0, self.end - time.time()) * self.workers

    def fits(self, config: TrialConfig) -> bool:
        """Whether the whole schedule of a trial that starts now ends in time and leaves time for others."""
        if self.costs is None:
            return True
        seconds = self.seconds(config)
        in_time = seconds <= self.longest and time.time() + seconds <= self.end
        return math.isfinite(seconds) and in_time  # it is not where memory does not hold it

    def seconds(self, config: TrialConfig) -> float:
        """What a trial takes, longer on the share of a GPU that it gets."""
        assert self.costs is not None
        share = self.costs.gpu_share(config, self.gpu_bytes) if self.gpu_bytes else 1.0
        return self.costs.schedule(config) / share

    def affordable(self, wanted: TrialConfig, sizes: Iterable[int], share: float) -> tuple[TrialConfig, str]:
        """The configuration for at most this share of the search: smaller, then for fewer epochs, if need be.

        Also what was changed for that, in words; empty where nothing was.
        """
        if self.costs is None:
            return wanted, ""
        # One trial runs on one worker: of many workers this share is more than the whole time of one.
        whole, costs = self.core_seconds, self.costs

        def affords(config: TrialConfig) -> bool:
            seconds = self.seconds(config)
            in_time = math.isfinite(seconds) and seconds <= 0.9 * whole / self.workers
            return in_time and costs.schedule(config) <= share * whole

        config = wanted
        for size in sorted((s for s in sizes if s <= wanted.image_size), reverse=True):
            config = replace(wanted, image_size=size)
            if affords(config):
                break
        while config.epochs > 1 and not affords(config):
            config = replace(config, epochs=config.epochs - 1)
        smaller, shorter = config.image_size < wanted.image_size, config.epochs < wanted.epochs
        changed = f" at {config.image_size} instead of {wanted.image_size} px" if smaller else ""
        return config, changed + (
            f" for {config.epochs} instead of {wanted.epochs} epochs" if shorter else ""
        )

    def trials(self, space: Space, grace_period: int) -> int:
        """About how many trials the time buys, drawn at random where they fit and halved at every rung."""
        assert self.costs is not None
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        drawn = [TrialConfig.from_dict(suggest(study.ask(), space)) for _ in range(_SAMPLE)]
        costs = [
            sum(self.costs.epoch(c, n) * _alive(n, grace_period) for n in range(1, c.epochs + 1))
            for c in drawn
            if self.fits(c)
        ]
        return round(self.core_seconds / float(np.mean(costs))) if costs else 0


def _alive(epoch: int, grace_period: int) -> float:
    """The share of trials that successive halving lets run in this epoch."""
    if epoch <= grace_period:
        return 1.0
    return REDUCTION_FACTOR ** -math.ceil(math.log(epoch / grace_period, REDUCTION_FACTOR))


def make_plan(job: Job, space: Space, begun: float, end: float) -> Plan:
    """The plan for searching a space until `end`, by the job's costs; `begun` is when that began."""
    costs = job.costs
    if costs is None:
        return Plan(None, end, job.workers.count)
    gpu_bytes = ray.get(as_task(_gpu_bytes, job.workers).remote()) if job.workers.packed else 0.0
    cheapest = min(costs.schedule(config) for of_one in _opened(space).values() for config in of_one)
    longest = max(TRIAL_SHARE * (end - begun), cheapest)
    return Plan(costs, end, job.workers.count, gpu_bytes, longest)


@dataclass(frozen=True)
class Packing:
    """What a trial asks of Ray: the share of a GPU that its memory needs, and the cores that go with it."""

    costs: Costs
    gpu_bytes: float
    cpus: int  # for each whole GPU

    def __call__(self, values: dict[str, Any]) -> PlacementGroupFactory:
        share = self.costs.gpu_share(TrialConfig.from_dict(values), self.gpu_bytes)
        return PlacementGroupFactory([{"CPU": max(1, int(share * self.cpus)), "GPU": share}])


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _looked_at(job: Job, config: TrialConfig) -> tuple[str, float]:
    """What a worker trains on (where the search was started there may be another), and how fast it is now."""
    job.workers.take()
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else processor()
    return device, _seconds(job, config)


def _seconds(job: Job, config: TrialConfig, **more: Any) -> float:
    own = job.workers
    return training_seconds(
        config, job.splits, weights=job.weights, device=own.device, processes=own.processes, **more
    )


def _gpu_bytes() -> float:
    return float(torch.cuda.get_device_properties(0).total_memory)


def _opened(space: Space) -> dict[str, list[TrialConfig]]:
    """For each backbone of a space a configuration of every size, largest first, everything open."""
    shared = {**space.fixed, "unfreeze": "full"}
    sizes = sorted(space.image_sizes, reverse=True)
    return {
        b: [TrialConfig.from_dict({**shared, "backbone": b, "image_size": s}) for s in sizes]
        for b in space.backbones
    }


def costs_of(job: Job, space: Space) -> Costs:
    """What each backbone of a space costs, measured unless it was, by hardware and versions.

    One of them is timed again, on as many workers at once as all are: where that takes much longer or shorter
    than it did, as on a machine that is busy now, or was then, all are measured anew.
    """
    configs, workers = _opened(space), job.workers
    sample = next(iter(configs.values()))[-1]
    look = as_task(_looked_at, workers)
    looks = ray.get([look.remote(job, sample) for _ in range(min(workers.count, len(configs)))])
    device, seconds = looks[0][0], float(np.median([taken for _, taken in looks]))
    own = [device, workers.cpus, workers.gpus, workers.count]
    held_for = [_VERSION, *own, torch.__version__, timm.__version__]
    name = hashlib.sha256(json.dumps(held_for).encode()).hexdigest()[:12]
    path = job.cache / "costs" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        known = _known(path)
        keys = {backbone: _key(of_one) for backbone, of_one in configs.items()}
        before = known.get(keys[sample.backbone], {"seconds": {}})["seconds"].get(str(sample.image_size))
        if before and not 1 / _CHANGED < seconds / before < _CHANGED:
            known = {}
        missing = [b for b, key in keys.items() if key not in known or _untried(known[key], job, configs[b])]
        measure = as_task(_measure, workers)
        found = ray.get([measure.remote(job, configs[backbone]) for backbone in missing])
        known |= {keys[backbone]: measured for backbone, measured in zip(missing, found, strict=True)}
        if missing:
            write_json(path, known)
    of = {backbone: known[key] for backbone, key in keys.items()}
    return Costs(
        seconds={b: {int(size): value for size, value in m["seconds"].items()} for b, m in of.items()},
        train=len(job.splits.train),
        val=len(job.splits.val),
        others=len(job.splits.audit) + len(job.splits.test),
        stored=job.weights.source != "none",
        memory={b: {int(size): value for size, value in m["bytes"].items()} for b, m in of.items()},
        compiled={b: Compiled(**m["compiled"]) for b, m in of.items() if m["compiled"]},
    )


def _key(configs: Sequence[TrialConfig]) -> str:
    sizes = " ".join(str(c.image_size) for c in configs)
    return f"{configs[0].backbone} {sizes} px, batches of {configs[0].batch_size}"


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """What was measured before, by key; nothing where the file is missing or damaged."""
    try:
        found = read_json(path)
        return {key: {part: _of(value[part]) for part in _PARTS} for key, value in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _of(part: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if part is None else dict(part)


def _untried(measured: Mapping[str, Any], job: Job, configs: Sequence[TrialConfig]) -> bool:
    """Whether torch.compile was not tried, as it could not pay with fewer pictures or epochs, and may now."""
    slowest = max(measured["seconds"].values(), default=0.0)
    return measured["compiled"] is None and _may_pay_to_compile(slowest, job, configs[0])


def _may_pay_to_compile(seconds: float, job: Job, config: TrialConfig) -> bool:
    return seconds * len(job.splits.train) * config.epochs >= _WORTH_COMPILING


def _measure(job: Job, configs: Sequence[TrialConfig]) -> dict[str, Any]:
    """A backbone at the largest size that memory holds and at the smallest; sizes fall."""
    job.workers.take()
    on_gpu = job.workers.device == "cuda"
    found: dict[str, Any] = {part: {} for part in _PARTS}

    for config in configs:
        if found["seconds"] and config is not configs[-1]:
            continue
        size = str(config.image_size)
        try:
            if on_gpu:
                gc.collect()
                torch.cuda.empty_cache()  # what the allocator keeps of the size before counts as reserved
                torch.cuda.reset_peak_memory_stats()
            eager = _seconds(job, config)
            if on_gpu:
                found["bytes"][size] = torch.cuda.max_memory_reserved()
            if on_gpu and not found["seconds"]:
                compiled = partial(_seconds, job, config, compiled=True)
                pays = _may_pay_to_compile(eager, job, config)
                found["compiled"] = _tried_to_compile(compiled, eager) if pays else None
        except torch.OutOfMemoryError:
            continue
        found["seconds"][size] = eager
    return found


def _tried_to_compile(run: Callable[[], float], eager: float) -> dict[str, float]:
    """What `Compiled` holds; nothing where this machine cannot compile (no C compiler, an old GPU)."""
    started = time.monotonic()
    try:
        compiled = run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # torch._dynamo's and torch._inductor's are of this kind
        return {}
    return {"seconds": time.monotonic() - started, "ratio": compiled / eager}

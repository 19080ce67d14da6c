"""What an epoch costs on this hardware, measured once, and what a budget buys for it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optuna
import ray
import timm
import torch
from filelock import FileLock

from carmodels.catalog import UNFREEZE
from carmodels.models import open_groups
from carmodels.space import Space, TrialConfig, suggest
from carmodels.study import read_json, write_json
from carmodels.training import seconds_per_picture
from tune.scheduler import REDUCTION_FACTOR
from tune.trials import Job, as_task

FORWARD_SHARE = 0.35  # of a training step that showing a picture to a network takes
_SAMPLE = 300  # random configurations over which a plan averages


@dataclass(frozen=True)
class Costs:
    """Seconds that training on one picture takes, everything open, by backbone and image size."""

    seconds: Mapping[str, Mapping[int, float]]  # per backbone, at the sizes that were measured
    train: int  # pictures
    val: int

    def picture(self, backbone: str, image_size: int) -> float:
        """Seconds for one picture, linear in the area between measured sizes; infinite beyond memory."""
        sizes = sorted(s for s, seconds in self.seconds[backbone].items() if math.isfinite(seconds))
        if not sizes or image_size > max(sizes):
            return math.inf
        areas, seconds = [s * s for s in sizes], [self.seconds[backbone][s] for s in sizes]
        return float(np.interp(image_size * image_size, areas, seconds))

    def epoch(self, config: TrialConfig, number: int) -> float:
        """Seconds of one epoch (the first is 1): less while the backbone is frozen."""
        row = UNFREEZE[config.unfreeze]
        frozen = not open_groups(row, epoch=number, epochs=config.epochs, groups=1)
        full, shown = (0, self.train + self.val) if frozen else (self.train, self.val)
        return self.picture(config.backbone, config.image_size) * (full + FORWARD_SHARE * shown)

    def schedule(self, config: TrialConfig) -> float:
        """Seconds of the whole schedule."""
        return sum(self.epoch(config, number) for number in range(1, config.epochs + 1))


@dataclass(frozen=True)
class Plan:
    """What a search has time for. Without costs (no limit on time) everything fits."""

    costs: Costs | None
    end: float  # time.time()
    workers: int

    @property
    def core_seconds(self) -> float:
        """Seconds left, over all workers."""
        return max(0.0, self.end - time.time()) * self.workers

    def fits(self, config: TrialConfig) -> bool:
        """Whether the whole schedule of a trial that starts now ends in time."""
        return self.costs is None or time.time() + self.costs.schedule(config) <= self.end

    def affordable(self, wanted: TrialConfig, sizes: Iterable[int], share: float) -> tuple[TrialConfig, str]:
        """The configuration for at most this share of the search: smaller, then for fewer epochs, if need be.

        Also what was changed for that, in words; empty where nothing was.
        """
        if self.costs is None:
            return wanted, ""
        # One trial runs on one worker: of many workers a fifth is more than the whole time of one.
        limit = min(share * self.core_seconds, 0.9 * self.core_seconds / self.workers)
        config = wanted
        for size in sorted((s for s in sizes if s <= wanted.image_size), reverse=True):
            config = replace(wanted, image_size=size)
            if self.costs.schedule(config) <= limit:
                break
        while config.epochs > 1 and self.costs.schedule(config) > limit:
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


def make_plan(job: Job, space: Space, end: float) -> Plan:
    """The plan for searching a space until `end`; measures what this hardware has not been measured for."""
    if math.isinf(end):
        return Plan(None, end, job.workers.count)
    shared = {**space.fixed, "unfreeze": "full"}
    sizes = sorted(space.image_sizes, reverse=True)
    configs = {
        b: [TrialConfig.from_dict({**shared, "backbone": b, "image_size": s}) for s in sizes]
        for b in space.backbones
    }
    return Plan(_costs(job, configs), end, job.workers.count)


def _costs(job: Job, configs: Mapping[str, list[TrialConfig]]) -> Costs:
    """What each backbone costs, kept in a file for this hardware and these versions."""
    workers, hardware = job.workers, job.study.facts["hardware"]
    held_for = [hardware, workers.cpus, workers.count, torch.__version__, timm.__version__]
    name = hashlib.sha256(json.dumps(held_for).encode()).hexdigest()[:12]
    path = job.cache / "costs" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        known = _known(path)
        keys = {backbone: _key(of_one) for backbone, of_one in configs.items()}
        missing = [backbone for backbone, key in keys.items() if key not in known]
        measure = as_task(_measure, workers)
        found = ray.get([measure.remote(job, configs[backbone]) for backbone in missing])
        known |= {keys[backbone]: seconds for backbone, seconds in zip(missing, found, strict=True)}
        if missing:
            write_json(path, known)
    seconds = {b: {int(size): cost for size, cost in known[key].items()} for b, key in keys.items()}
    return Costs(seconds, len(job.splits.train), len(job.splits.val))


def _key(configs: Sequence[TrialConfig]) -> str:
    sizes = " ".join(str(c.image_size) for c in configs)
    return f"{configs[0].backbone} {sizes} px, batches of {configs[0].batch_size}"


def _known(path: Path) -> dict[str, dict[str, float]]:
    """Seconds by size, for what was measured before; nothing where the file is missing or damaged."""
    try:
        return {k: {size: float(cost) for size, cost in v.items()} for k, v in read_json(path).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _measure(job: Job, configs: Sequence[TrialConfig]) -> dict[str, float]:
    """Seconds a picture, by size, at the largest size that memory holds and at the smallest; sizes fall."""
    torch.set_num_threads(job.workers.cpus)
    found: dict[str, float] = {}
    for config in configs:
        if not found or config is configs[-1]:
            try:
                found[str(config.image_size)] = seconds_per_picture(
                    config, job.splits, weights=job.weights, device=job.workers.device
                )
            except torch.cuda.OutOfMemoryError:
                continue
    return found

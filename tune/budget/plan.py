"""What a search has time for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import optuna

from carmodels.space import Space, unfrozen_configs
from carmodels.training.config import TrialConfig
from tune.budget.costs import Costs
from tune.optim.optuna_records import suggest
from tune.optim.scheduler import REDUCTION_FACTOR

TRIAL_SHARE = 0.7  # of the time for searching that one trial may take on its worker: results/search/NOTES.md
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


def make_plan(
    costs: Costs | None, workers: int, space: Space, begun: float, end: float, gpu_bytes: float = 0.0
) -> Plan:
    """The plan for searching a space until `end`, time.time(); `begun` is when that began.

    `gpu_bytes` is the memory of a GPU where trials share one, else 0.
    """
    if costs is None:
        return Plan(None, end, workers)
    cheapest = min(costs.schedule(config) for of_one in unfrozen_configs(space).values() for config in of_one)
    longest = max(TRIAL_SHARE * (end - begun), cheapest)
    return Plan(costs, end, workers, gpu_bytes, longest)

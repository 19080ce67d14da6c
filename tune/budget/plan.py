"""What fits into the time of a search: single trials, the baseline, about how many trials."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import optuna

from carmodels.models.facts import facts_of
from carmodels.space import Space, unfrozen_configs
from carmodels.steady_clock import steady_time
from carmodels.training.config import TrialConfig
from tune.budget.costs import Costs
from tune.optim.optuna_records import suggest
from tune.optim.scheduler import REDUCTION_FACTOR

TRIAL_SHARE = 0.7  # of the search's time that one trial may take on its worker (results/search/NOTES.md)
_FILLED_SHARE = 0.9  # share of a worker's time left that `shrink_to_fit` fills
_SAMPLE = 300  # random configurations over which `trials` averages


@dataclass(frozen=True)
class Plan:
    """The time of a search and what fits into it. Without costs (no time limit) everything fits."""

    costs: Costs | None
    end: float  # steady_time()
    workers: int  # cores or whole GPUs, each training one trial at a time
    gpu_bytes: float = 0.0  # memory of a GPU that trials share; 0: trials share none
    max_trial_seconds: float = math.inf

    @property
    def worker_seconds(self) -> float:
        """Seconds left, summed over workers."""
        return max(0.0, self.end - steady_time()) * self.workers

    def fits(self, config: TrialConfig) -> bool:
        """Whether a trial that starts now ends in time and takes at most `max_trial_seconds`."""
        if self.costs is None:
            return True
        seconds = self.seconds(config)
        in_time = seconds <= self.max_trial_seconds and steady_time() + seconds <= self.end
        return math.isfinite(seconds) and in_time  # infinite: memory does not hold it

    def seconds(self, config: TrialConfig) -> float:
        """Seconds of a trial on the share of a GPU that it gets."""
        assert self.costs is not None
        share = self.costs.gpu_share(config, self.gpu_bytes) if self.gpu_bytes else 1.0
        return self.costs.schedule(config) / share

    def shrink_to_fit(
        self, wanted: TrialConfig, sizes: Iterable[int], share: float
    ) -> tuple[TrialConfig, str]:
        """Shrinks the image size, then the epochs, until the trial takes at most `share` of the search.

        Returns the configuration and what changed, in words; "" if nothing did.
        """
        if self.costs is None:
            return wanted, ""
        available, costs = self.worker_seconds, self.costs

        def affordable(config: TrialConfig) -> bool:
            seconds = self.seconds(config)
            # With many workers, `share` of their time together is more than one worker has.
            in_time = math.isfinite(seconds) and seconds <= _FILLED_SHARE * available / self.workers
            return in_time and costs.schedule(config) <= share * available

        config = wanted
        fitting = {facts_of(wanted.backbone).fit(size) for size in sizes}
        for size in sorted((s for s in fitting if s <= wanted.image_size), reverse=True):
            config = replace(wanted, image_size=size)
            if affordable(config):
                break
        while config.epochs > 1 and not affordable(config):
            config = replace(config, epochs=config.epochs - 1)
        changed = ""
        if config.image_size < wanted.image_size:
            changed += f" at {config.image_size} instead of {wanted.image_size} px"
        if config.epochs < wanted.epochs:
            changed += f" for {config.epochs} instead of {wanted.epochs} epochs"
        return config, changed

    def trials(self, space: Space, grace_period: int) -> int:
        """About how many random trials fit, half of them stopped at every rung."""
        assert self.costs is not None
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        drawn = [TrialConfig.from_dict(suggest(study.ask(), space)) for _ in range(_SAMPLE)]
        seconds = [
            sum(self.costs.epoch(c, n) * _surviving_share(n, grace_period) for n in range(1, c.epochs + 1))
            for c in drawn
            if self.fits(c)
        ]
        return round(self.worker_seconds / float(np.mean(seconds))) if seconds else 0


def _surviving_share(epoch: int, grace_period: int) -> float:
    """The share of trials that successive halving lets run in an epoch."""
    if epoch <= grace_period:
        return 1.0
    return REDUCTION_FACTOR ** -math.ceil(math.log(epoch / grace_period, REDUCTION_FACTOR))


def make_plan(
    costs: Costs | None, workers: int, space: Space, begun: float, end: float, gpu_bytes: float = 0.0
) -> Plan:
    """The plan for searching a space from `begun` to `end`, both in seconds of steady_time().

    A trial may take `TRIAL_SHARE` of that time, or what the space's cheapest unfrozen one takes if more.
    """
    if costs is None:
        return Plan(None, end, workers)
    cheapest = min(costs.schedule(c) for configs in unfrozen_configs(space).values() for c in configs)
    return Plan(costs, end, workers, gpu_bytes, max(TRIAL_SHARE * (end - begun), cheapest))

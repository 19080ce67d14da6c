"""A search in simulated time: real searcher, real scheduler, a surrogate in the place of training.

What happens to a trial is what Ray Tune's controller does: the scheduler is asked about every result, the
searcher is told of those after which a trial goes on, and of the end of each.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from surrogate import Surrogate

from carmodels.catalog import UNFREEZE
from carmodels.features import VIEWS_KEPT
from carmodels.models import open_groups
from carmodels.space import TrialConfig
from tune import plan, scheduler


@dataclass(frozen=True)
class Seen:
    """A result that a search has got to know."""

    at: float  # simulated seconds
    value: float  # as observed, with its noise
    mean: float  # what the model in hand is worth: the surrogate's noise-free accuracy in that epoch
    finished: bool  # whether its trial ran to its end, so far only in its last result
    trial: int


@dataclass(eq=False)
class Trial:
    """What schedulers ask of a trial of Ray's."""

    trial_id: str
    config: dict[str, Any]
    status: str = "RUNNING"
    last_result: dict[str, Any] = field(default_factory=dict)


@dataclass
class Clock:
    """The time that `tune` sees while a simulation runs."""

    now: float = 0.0

    def time(self) -> float:
        return self.now


@contextmanager
def simulated(clock: Clock) -> Iterator[None]:
    """`tune`'s scheduler and plan look at this clock."""
    own = scheduler.time, plan.time
    scheduler.time = plan.time = clock  # type: ignore[assignment]
    try:
        yield
    finally:
        scheduler.time, plan.time = own


def simulate(
    searcher: Searcher,
    scheduling: TrialScheduler,
    surrogate: Surrogate,
    *,
    stamp: dict[str, Any],
    metric: str,
    budget: float,
    workers: int,
    seed: int,
    clock: Clock,
) -> list[Seen]:
    """Every result until `budget` seconds are over, in the order of time."""
    rng = np.random.default_rng(seed)
    controller = SimpleNamespace(get_live_trials=list, get_trials=list)
    stored: set[tuple[Any, ...]] = set()  # outputs of frozen backbones, as the store of a search keeps them
    numbers = itertools.count()
    queue: list[tuple[float, int, Any]] = []
    seen: list[Seen] = []

    def start() -> None:
        number = next(numbers)
        trial_id = f"t{number:05d}"
        values = searcher.suggest(trial_id)
        if not isinstance(values, dict):
            return
        config = TrialConfig.from_dict({**values, **stamp})
        trial = Trial(trial_id, {**values})
        scheduling.on_trial_add(controller, trial)
        steps = run(trial, config)
        heapq.heappush(queue, (next(steps), number, steps))

    def run(trial: Trial, config: TrialConfig) -> Iterator[float]:
        """Yields the moments at which the trial reports, and handles each report when it is resumed then."""
        mean, seconds = surrogate.of(config)
        values = surrogate.sample(mean, rng)
        number, spent = int(trial.trial_id[1:]), 0.0
        for epoch in range(1, len(mean) + 1):
            taken = float(seconds[epoch - 1]) + _filling(surrogate, config, epoch, stored)
            spent += taken
            yield clock.now + taken
            last = epoch == len(mean)
            result = {
                metric: float(values[epoch - 1]),
                "epoch": epoch,
                "training_iteration": epoch,
                "config_id": config.id,
                "seconds": spent,
                "done": last,
            }
            if last:
                result |= {"status": "finished", "best_value": float(values.max())}
                best = int(values.argmax())
                seen.append(Seen(clock.now, float(values[best]), float(mean[best]), True, number))
            else:
                seen.append(Seen(clock.now, float(values[epoch - 1]), float(mean[epoch - 1]), False, number))
            trial.last_result = result
            decision = scheduling.on_trial_result(controller, trial, result)
            if last or decision == TrialScheduler.STOP:
                trial.status = "TERMINATED"
                scheduling.on_trial_complete(controller, trial, result)
                searcher.on_trial_complete(trial.trial_id, result)
                return
            searcher.on_trial_result(trial.trial_id, result)

    with simulated(clock):
        for _ in range(workers):
            start()
        while queue:
            clock.now, number, steps = heapq.heappop(queue)
            if clock.now > budget:
                break
            again = next(steps, None)
            if again is None:
                start()
            else:
                heapq.heappush(queue, (again, number, steps))
    return seen


def _filling(surrogate: Surrogate, config: TrialConfig, epoch: int, stored: set[tuple[Any, ...]]) -> float:
    """Seconds to store the frozen backbone's outputs, where this epoch is the first to need them."""
    key = (config.backbone, config.image_size, config.augment, (epoch - 1) % VIEWS_KEPT)
    if open_groups(UNFREEZE[config.unfreeze], epoch=epoch, epochs=config.epochs, groups=1) or key in stored:
        return 0.0
    stored.add(key)
    return surrogate.curves.fills.get((config.backbone, config.image_size), 0.0)

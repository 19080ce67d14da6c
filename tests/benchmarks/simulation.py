"""A search in simulated time: real searcher, real scheduler, a surrogate in the place of training.

What happens to a trial is what Ray Tune's controller does: the scheduler is asked about every result, the
searcher is told of those after which a trial goes on, and of the end of each. A paused trial keeps no worker,
and goes on from the epoch it was paused after; checkpoints take no time. A trial takes `START`
seconds besides its epochs.
"""

from __future__ import annotations

import heapq
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
from carmodels.models.parameter_groups import trainable_groups
from carmodels.records import State
from carmodels.training.config import TrialConfig
from carmodels.training.features import VIEWS_KEPT
from carmodels.training.run import Run
from tune.budget import plan
from tune.optim import scheduler

START = 2.0  # seconds to make a model and to write predictions, as in `bench_overhead`


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
    status: str = "PENDING"
    last_result: dict[str, Any] = field(default_factory=dict)
    is_saving: bool = False
    steps: Iterator[float | None] | None = None  # moments of its reports, None where it is paused


@dataclass
class Controller:
    """What schedulers ask of Ray's TuneController."""

    searcher: Searcher
    scheduler: TrialScheduler
    trials: list[Trial] = field(default_factory=list)
    drawn_all: bool = False

    @property
    def search_alg(self) -> SimpleNamespace:
        return SimpleNamespace(searcher=self.searcher)

    def get_trials(self) -> list[Trial]:
        return self.trials

    def get_live_trials(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status != "TERMINATED"]

    def stop_trial(self, trial: Trial) -> None:
        if trial.status == "RUNNING":
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
            self.searcher.on_trial_complete(trial.trial_id, trial.last_result)
        elif trial.status != "TERMINATED":
            self.scheduler.on_trial_remove(self, trial)
            self.searcher.on_trial_complete(trial.trial_id)
        trial.status = "TERMINATED"

    def next_trial(self) -> Trial | None:
        """What a free worker runs: the scheduler's choice, once the searcher has drawn if none is pending."""
        if not self.drawn_all and not self._pending():
            self._draw()
        return self.scheduler.choose_trial_to_run(self) or self._pending()

    def _draw(self) -> None:
        trial_id = f"t{len(self.trials):05d}"
        values = self.searcher.suggest(trial_id)
        self.drawn_all = values == Searcher.FINISHED
        if isinstance(values, dict):
            trial = Trial(trial_id, values)
            self.trials.append(trial)
            self.scheduler.on_trial_add(self, trial)

    def _pending(self) -> Trial | None:
        return next((trial for trial in self.trials if trial.status == "PENDING"), None)


@dataclass
class Clock:
    """The time that `tune` sees while a simulation runs."""

    now: float = 0.0

    def time(self) -> float:
        return self.now


@contextmanager
def simulated(clock: Clock) -> Iterator[None]:
    """`tune`'s scheduler and plan look at this clock."""
    own = scheduler.steady_time, plan.steady_time
    scheduler.steady_time = plan.steady_time = clock.time
    try:
        yield
    finally:
        scheduler.steady_time, plan.steady_time = own


def simulate(
    searcher: Searcher,
    scheduling: TrialScheduler,
    surrogate: Surrogate,
    *,
    metric: str,
    budget: float,
    workers: int,
    seed: int,
    clock: Clock,
) -> list[Seen]:
    """Every result until `budget` seconds are over, in the order of time."""
    rng = np.random.default_rng(seed)
    controller = Controller(searcher, scheduling)
    stored: set[tuple[Any, ...]] = set()  # outputs of frozen backbones, as the store of a search keeps them
    queue: list[tuple[float, str, Trial]] = []
    seen: list[Seen] = []

    def proceed(trial: Trial) -> None:
        """Let a trial run until its next report, unless it is paused or at its end."""
        assert trial.steps is not None
        if (at := next(trial.steps, None)) is not None:
            heapq.heappush(queue, (at, trial.trial_id, trial))

    def run(trial: Trial) -> Iterator[float | None]:
        """Yields the moments at which the trial reports, and handles each report when it is resumed then."""
        drawn = _run_of(trial.config)
        config = drawn.config
        mean, seconds = surrogate.of(config)
        values = surrogate.sample(mean, rng)
        number, spent = int(trial.trial_id[1:]), 0.0
        for epoch in range(1, len(mean) + 1):
            taken = float(seconds[epoch - 1]) + _filling(surrogate, config, epoch, stored)
            taken += START if epoch == 1 else 0.0
            spent += taken
            yield clock.now + taken
            last = epoch == len(mean)
            result = {
                metric: float(values[epoch - 1]),
                "epoch": epoch,
                "training_iteration": epoch,
                "run_id": drawn.id,
                "elapsed": spent,
                "done": last,
            }
            if last:
                best = int(values.argmax())
                result |= {"state": State.COMPLETE, "best_value": float(values[best])}
                seen.append(Seen(clock.now, float(values[best]), float(mean[best]), True, number))
            else:
                seen.append(Seen(clock.now, float(values[epoch - 1]), float(mean[epoch - 1]), False, number))
            trial.last_result = result
            decision = scheduling.on_trial_result(controller, trial, result)
            if decision == TrialScheduler.STOP or (last and decision == TrialScheduler.CONTINUE):
                break
            searcher.on_trial_result(trial.trial_id, result)
            if decision == TrialScheduler.PAUSE:
                trial.status = "PAUSED"
                yield None
        controller.stop_trial(trial)

    with simulated(clock):
        while True:
            while len(queue) < workers and (trial := controller.next_trial()):
                trial.steps = trial.steps or run(trial)
                trial.status = "RUNNING"
                proceed(trial)
            if not queue:
                break
            clock.now, _, trial = heapq.heappop(queue)
            if clock.now > budget:
                break
            proceed(trial)
    return seen


def _run_of(values: dict[str, Any]) -> Run:
    """What a searcher drew: ours draw runs, Ray's own the fields of a configuration."""
    return Run.from_dict(values) if "origin" in values else Run(TrialConfig.from_dict(values))


def _filling(surrogate: Surrogate, config: TrialConfig, epoch: int, stored: set[tuple[Any, ...]]) -> float:
    """Seconds to store the frozen backbone's outputs, where this epoch is the first to need them."""
    key = (config.backbone, config.image_size, config.augment, (epoch - 1) % VIEWS_KEPT)
    if (
        trainable_groups(UNFREEZE[config.unfreeze], epoch=epoch, epochs=config.epochs, groups=1)
        or key in stored
    ):
        return 0.0
    stored.add(key)
    return surrogate.curves.fills.get((config.backbone, config.image_size), 0.0)

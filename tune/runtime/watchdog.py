"""Kills workers that stay silent for too long."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import ray

from carmodels.training.config import TrialConfig
from tune.budget.costs import Costs

LONGEST_SILENCE = 6 * 3600.0  # seconds between two epochs' ends before a worker counts as hung
SHORTEST_SILENCE, MUCH_SLOWER = 1800.0, 20.0  # with a known cost: least seconds, multiple of it
ANSWERS_SLOWER = 5.0  # same for a complete trial's predictions: multiple of their cost


@dataclass
class Watchdog:
    """Kills workers that stay silent for too long. A hung loader, disk or GPU shows no other sign.

    `costs` give the expected time of an epoch. Without them a trial may be silent for LONGEST_SILENCE.
    """

    costs: Costs | None
    until: dict[str, tuple[Any, float, float]] = field(default_factory=dict)  # trial, deadline, seconds
    ended: dict[str, str] = field(default_factory=dict)  # Ray's trial id -> reason

    def heard(self, trial: Any, config: TrialConfig) -> None:
        """The trial has started, or an epoch has ended."""
        seconds = self.allowed(config)
        self.until[trial.trial_id] = trial, time.monotonic() + seconds, seconds

    def forget(self, trial: Any) -> None:
        """The trial has ended."""
        self.until.pop(trial.trial_id, None)

    def allowed(self, config: TrialConfig) -> float:
        """Seconds of silence before the worker counts as hung."""
        if self.costs is None:
            return LONGEST_SILENCE
        epoch = max(self.costs.epoch(config, number) for number in range(1, config.epochs + 1))
        last = ANSWERS_SLOWER * self.costs.final_predictions(config)  # before the last epoch is reported
        return min(LONGEST_SILENCE, max(SHORTEST_SILENCE, MUCH_SLOWER * epoch) + last)

    def end(self) -> None:
        """Kill the overdue workers. Ray then reports each as a dead worker."""
        over = [entry for entry in self.until.values() if time.monotonic() > entry[1]]
        for trial, _, seconds in over:
            self.forget(trial)
            if (actor := trial.temporary_state.ray_actor) is not None:
                self.ended[trial.trial_id] = f"no epoch ended in {seconds:.0f} s, its worker was hung"
                ray.kill(actor)

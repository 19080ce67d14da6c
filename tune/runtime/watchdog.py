"""Ends workers that were not heard of for too long."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import ray

from carmodels.training.config import TrialConfig
from tune.budget.costs import Costs

LONGEST_SILENCE = 6 * 3600.0  # seconds from one epoch's end to the next before a worker counts as hung
SHORTEST_SILENCE, MUCH_SLOWER = 1800.0, 20.0  # likewise, where an epoch's cost is known: seconds, times that
ANSWERS_SLOWER = 5.0  # likewise for what a finished trial is shown: times what that should take


@dataclass
class Watchdog:
    """Ends workers that were not heard of for too long: of a hung loader, disk or GPU nothing else is seen.

    `costs` say what an epoch should take; without them a trial may be silent for LONGEST_SILENCE.
    """

    costs: Costs | None
    until: dict[str, tuple[Any, float, float]] = field(default_factory=dict)  # trial, moment, seconds
    ended: dict[str, str] = field(default_factory=dict)  # Ray's trial id -> why, in words

    def heard(self, trial: Any, config: TrialConfig) -> None:
        """It has begun, or an epoch has ended."""
        seconds = self.allowed(config)
        self.until[trial.trial_id] = trial, time.monotonic() + seconds, seconds

    def forget(self, trial: Any) -> None:
        """It has ended."""
        self.until.pop(trial.trial_id, None)

    def allowed(self, config: TrialConfig) -> float:
        """Seconds from one epoch's end to the next, or to the first, before the worker counts as hung."""
        if self.costs is None:
            return LONGEST_SILENCE
        epoch = max(self.costs.epoch(config, number) for number in range(1, config.epochs + 1))
        last = ANSWERS_SLOWER * self.costs.final_predictions(config)  # before the last epoch is reported
        return min(LONGEST_SILENCE, max(SHORTEST_SILENCE, MUCH_SLOWER * epoch) + last)

    def end(self) -> None:
        """Kill the workers whose time is over; Ray then tells of a worker that died."""
        over = [entry for entry in self.until.values() if time.monotonic() > entry[1]]
        for trial, _, seconds in over:
            self.forget(trial)
            if (actor := trial.temporary_state.ray_actor) is not None:
                self.ended[trial.trial_id] = f"no epoch ended in {seconds:.0f} s, its worker was hung"
                ray.kill(actor)

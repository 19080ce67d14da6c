"""Which trials go on: asynchronous successive halving that explains itself and knows the clock."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from carmodels.catalog import UNFREEZE
from carmodels.records import State, TrialRecord

REDUCTION_FACTOR = 2.0


class Stop(NamedTuple):
    """Why a trial was stopped."""

    state: State  # PRUNED or OUT_OF_TIME
    reason: str  # for people


@dataclass(frozen=True)
class Deadline:
    """Until when a stage may run, in seconds of time.time()."""

    draw_until: float  # no new trial after this
    end: float  # a trial that cannot end by this is stopped at its next epoch


class AshaScheduler(AsyncHyperBandScheduler):
    """ASHA (Li et al., 2020) with reasons for its stops, a clock, and trials that always run to their end.

    Those that do are no peers of others at a rung: the baseline is ahead of better trials in its
    fourth epoch, and would have the first ones stopped (results/search/NOTES.md).

    A result that carries `state` is a trial's last and is never stopped. Ray calls this object in the driver
    only.
    """

    _metric: str  # Ray allows None, until it is told by TuneConfig; here it is always given
    _metric_op: float  # likewise: 1 for max, -1 for min

    def __init__(
        self,
        *,
        metric: str,
        mode: str,
        epochs: int,
        grace_period: int,
        deadline: Deadline,
        protect: Iterable[str] = (),
    ) -> None:
        super().__init__(
            time_attr="epoch",
            metric=metric,
            mode=mode,
            max_t=epochs,
            grace_period=min(grace_period, epochs),
            reduction_factor=REDUCTION_FACTOR,
            stop_last_trials=False,
        )
        self.stops: dict[str, Stop] = {}  # by Ray's trial id
        self._deadline = deadline
        self._protect = frozenset(protect)

    def replay(self, records: Iterable[TrialRecord]) -> None:
        """Fill the rungs with what an earlier run of the same study has seen, in its order."""
        for record in records:
            if record.trial_id in self._protect:
                continue
            trial: Any = SimpleNamespace(trial_id=record.trial_id)  # all that a bracket asks of a trial
            for epoch in record.curve:
                sign = self._metric_op if np.isfinite(epoch.value) else np.nan
                self._brackets[0].on_result(trial, epoch.epoch, sign * epoch.value)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """CONTINUE or STOP, and for the latter the reason in `stops`."""
        if result.get("state"):
            return TrialScheduler.CONTINUE
        epoch, epochs = result["epoch"], trial.config["config"]["epochs"]
        stop = self._too_late(result["elapsed"], epoch, epochs)
        if not stop and epoch < epochs and result["run_id"] not in self._protect:
            peers = self._peers(trial, epoch)
            action = super().on_trial_result(tune_controller, trial, result)
            if action == TrialScheduler.STOP:
                stop = Stop(State.PRUNED, self._reason(result[self._metric], peers, epoch))
        if stop:
            self.stops[trial.trial_id] = stop
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Ray enters a trial's last value at the rung that it has passed: not that of a protected one."""
        if result.get("run_id") in self._protect:
            self._trial_info.pop(trial.trial_id, None)
        else:
            super().on_trial_complete(tune_controller, trial, result)

    def _too_late(self, elapsed: float, epoch: int, epochs: int) -> Stop | None:
        """Why the clock stops this trial; None while what is left of it fits in, by its pace so far."""
        now = time.time()
        left = elapsed / epoch * (epochs - epoch)
        if now < self._deadline.draw_until or now + left <= self._deadline.end:
            return None
        return Stop(State.OUT_OF_TIME, f"the time for searching was up after epoch {epoch} of {epochs}")

    def _peers(self, trial: Any, epoch: int) -> list[float]:
        """Values that earlier trials had at the rung this result will be held against."""
        for milestone, recorded in self._brackets[0]._rungs:
            if epoch >= milestone:
                return [] if trial.trial_id in recorded else [v * self._metric_op for v in recorded.values()]
        return []

    def _reason(self, value: float, peers: list[float], epoch: int) -> str:
        share = 1 - 1 / REDUCTION_FACTOR
        cutoff = np.nanquantile(peers, share if self._mode == "max" else 1 - share)
        better = sum(v > value if self._mode == "max" else v < value for v in peers)
        return (
            f"rung at epoch {epoch}: {value:.4f} against a cut-off of {cutoff:.4f}, "
            f"rank {better + 1} of {len(peers) + 1}"
        )


def grace_period(epochs: int) -> int:
    """Epochs before a trial can be stopped: those in which a slow starter trains only its head, plus two."""
    head_only = max(row.head_only_epochs or 0 for row in UNFREEZE.values())
    return min(epochs, head_only + 2)

"""The Ray Tune scheduler: ASHA that gives a reason for every stop and keeps to a time limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from carmodels.catalog import UNFREEZE
from carmodels.records import Cause, State, TrialRecord
from carmodels.steady_clock import steady_time
from tune.optim.failures import cause_of

REDUCTION_FACTOR = 2.0


class StopDecision(NamedTuple):
    """Why the scheduler stopped a trial."""

    state: State  # PRUNED or OUT_OF_TIME
    reason: str  # a sentence for people


@dataclass(frozen=True)
class TimeLimit:
    """When a stage must end, in seconds of steady_time()."""

    soft: float  # from here on, a trial that would pass the hard limit is stopped
    hard: float


class AshaScheduler(AsyncHyperBandScheduler):
    """ASHA (Li et al., 2020) with reasons, a time limit and protected trials.

    Protected trials, given by run id, run their whole schedule and stay out of the rungs: in its fourth epoch
    the baseline leads better trials and would stop the first of them (results/search/NOTES.md).

    A result with `state` is a trial's last and never stops it. Ray uses this object in the driver only.
    """

    _metric: str  # Ray's type allows None; here it is always set
    _metric_op: float  # 1 for max, -1 for min; Ray's type allows None

    def __init__(
        self,
        *,
        metric: str,
        mode: str,
        epochs: int,
        grace_period: int,
        time_limit: TimeLimit,
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
        self.stops: dict[str, StopDecision] = {}  # by Ray's trial id
        self.causes: dict[
            str, Cause
        ] = {}  # of failures, by Ray's trial id; the searcher is not told the error
        self._time_limit = time_limit
        self._protect = frozenset(protect)

    def replay(self, records: Iterable[TrialRecord]) -> None:
        """Fills the rungs with the curves that earlier runs of this study recorded, in their order."""
        for record in records:
            if record.trial_id in self._protect:
                continue
            trial: Any = SimpleNamespace(trial_id=record.trial_id)  # a bracket needs nothing else
            for epoch in record.curve:
                value = self._metric_op * epoch.value if np.isfinite(epoch.value) else np.nan
                self._brackets[0].on_result(trial, epoch.epoch, value)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """CONTINUE or STOP; `stops` keeps the decision for a stop."""
        if result.get("state"):
            return TrialScheduler.CONTINUE
        epoch, epochs = result["epoch"], trial.config["config"]["epochs"]
        stop = self._out_of_time(result["elapsed"], epoch, epochs)
        if not stop and epoch < epochs and result["run_id"] not in self._protect:
            peers = self._peers(trial, epoch)
            action = super().on_trial_result(tune_controller, trial, result)
            if action == TrialScheduler.STOP:
                stop = StopDecision(State.PRUNED, self._reason(result[self._metric], peers, epoch))
        if stop:
            self.stops[trial.trial_id] = stop
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Keeps protected trials out of the rungs: Ray would enter their last value."""
        if result.get("run_id") in self._protect:
            self._trial_info.pop(trial.trial_id, None)
        else:
            super().on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Keeps the cause for the searcher, whom Ray tells next."""
        self.causes[trial.trial_id] = cause_of(trial.get_pickled_error())

    def _out_of_time(self, elapsed: float, epoch: int, epochs: int) -> StopDecision | None:
        """A stop after the soft limit, if at the trial's pace it would not end by the hard one."""
        now = steady_time()
        remaining = elapsed / epoch * (epochs - epoch)
        if now < self._time_limit.soft or now + remaining <= self._time_limit.hard:
            return None
        return StopDecision(
            State.OUT_OF_TIME, f"the time for searching was up after epoch {epoch} of {epochs}"
        )

    def _peers(self, trial: Any, epoch: int) -> list[float]:
        """Values of earlier trials at the rung this result is compared at; empty if it is at none."""
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
    """Epochs before a trial can be stopped: the longest head-only phase plus two."""
    head_only = max(row.head_only_epochs or 0 for row in UNFREEZE.values())
    return min(epochs, head_only + 2)

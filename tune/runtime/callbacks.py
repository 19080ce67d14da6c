"""Callbacks for progress observers: the terminal, Prometheus, TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from carmodels.records import TrialRecord
from carmodels.training.config import EpochMetrics
from carmodels.training.run import Run


class RunState(Protocol):
    """A running stage, as observers see it."""

    @property
    def stage(self) -> str: ...
    @property
    def running(self) -> Mapping[str, Sequence[EpochMetrics]]:
        """Epochs so far, by Ray's trial id."""
        ...

    @property
    def runs(self) -> Mapping[str, Run]:
        """Runs by Ray's trial id."""
        ...

    @property
    def recorded(self) -> Collection[str]:
        """Ray's ids of the trials that have ended."""
        ...


@dataclass
class ProgressCallback:
    """Called after each epoch, at each trial's end and at every step of Ray's loop."""

    on_record: Callable[[TrialRecord], None] = lambda record: None
    on_step: Callable[[RunState], None] = lambda state: None
    on_epoch: Callable[[str, Run, EpochMetrics, int], None] = lambda *epoch: None


def combine_callbacks(*callbacks: ProgressCallback) -> ProgressCallback:
    """One callback that calls all of them in order."""

    def on_record(record: TrialRecord) -> None:
        for callback in callbacks:
            callback.on_record(record)

    def on_step(state: RunState) -> None:
        for callback in callbacks:
            callback.on_step(state)

    def on_epoch(stage: str, run: Run, epoch: EpochMetrics, gpu_bytes: int) -> None:
        for callback in callbacks:
            callback.on_epoch(stage, run, epoch, gpu_bytes)

    return ProgressCallback(on_record, on_step, on_epoch)

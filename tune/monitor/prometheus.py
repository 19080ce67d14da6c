"""Prometheus metrics of a run, exported by Ray's metrics agent on each node.

`tune/monitor/` holds a scrape configuration and a Grafana dashboard. Ray prefixes the names with `ray_`.
Names of counters end in `_total` in Prometheus.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

from ray.util.metrics import Counter, Gauge

from carmodels.evaluation.metrics import METRICS
from carmodels.records import FOLD, State, TrialRecord
from carmodels.training.config import EpochMetrics
from carmodels.training.run import Run
from tune.budget.clock import Clock
from tune.runtime.callbacks import ProgressCallback, RunState
from tune.runtime.worker import trial_name

REFRESH_SECONDS = 1.0  # between updates of all gauges
_RUN = ("study", "stage")
_TRIAL = (*_RUN, "trial", "backbone", "image_size", "strategy")

SERIES: dict[str, tuple[type[Counter] | type[Gauge], str, tuple[str, ...]]] = {
    "carmodels_best": (Gauge, "best value of a complete trial on val", ("study", "metric")),
    "carmodels_running": (Gauge, "trials that train", ("study",)),
    "carmodels_seconds_left": (Gauge, "seconds that the command has left", ("study",)),
    "carmodels_ended": (Counter, "trials that ended, by state and reason", (*_RUN, "state", "reason")),
    "carmodels_value": (Gauge, "the metric on val after the trial's last epoch", (*_TRIAL, "metric")),
    "carmodels_epoch": (Gauge, "epochs that the trial has run", _TRIAL),
    "carmodels_epochs_per_second": (Gauge, "of the trial's last epoch; 0: it has ended", _TRIAL),
    "carmodels_images_per_second": (Gauge, "likewise, images trained on", _TRIAL),
    "carmodels_gpu_bytes": (Gauge, "most GPU memory the trial has taken; 0: it has ended", _TRIAL),
}

_WHILE_TRAINING = ("carmodels_epochs_per_second", "carmodels_images_per_second", "carmodels_gpu_bytes")


def reason_tag(record: TrialRecord) -> str:
    """Why the trial ended, in a few words: the rung's epoch if pruned, the cause of a failure."""
    if record.state is State.PRUNED:
        return f"rung at epoch {record.epochs_run}"
    if record.cause is not None:
        return str(record.cause)
    if record.state is State.COMPLETE:
        return record.curve[-1].ending if record.curve else ""
    return {State.OUT_OF_TIME: "time", State.INTERRUPTED: "interrupted"}.get(record.state, "")


@cache
def _series(name: str) -> Counter | Gauge:
    kind, description, tags = SERIES[name]
    return kind(name, description, tags)


def exported(
    study: str,
    metric: str,
    *,
    images: Callable[[Run], int],
    clock: Clock,
    records: Iterable[TrialRecord] = (),
) -> ProgressCallback:
    """Callbacks that export a run's metrics to Prometheus.

    `images` returns a run's number of training images per epoch. `records` are trials that ended earlier;
    they set the initial best value.
    """
    exporter = _Exporter(study, metric, images, clock)
    for record in records:
        exporter.on_complete(record)
    return ProgressCallback(exporter.on_record, exporter.on_step, exporter.on_epoch)


@dataclass
class _Exporter:
    study: str
    metric: str
    images: Callable[[Run], int]
    clock: Clock
    _levels: dict[tuple[str, ...], tuple[dict[str, str], float]] = field(default_factory=dict)
    _refreshed: float = -math.inf  # time.monotonic()

    def on_epoch(self, stage: str, run: Run, epoch: EpochMetrics, gpu_bytes: int) -> None:
        tags = self._trial_tags(stage, run)
        self._set("carmodels_value", epoch.value, {**tags, "metric": self.metric})
        self._set("carmodels_epoch", epoch.epoch, tags)
        if epoch.seconds > 0:
            self._set("carmodels_epochs_per_second", 1 / epoch.seconds, tags)
            self._set("carmodels_images_per_second", self.images(run) / epoch.seconds, tags)
        self._set("carmodels_gpu_bytes", gpu_bytes, tags)

    def on_record(self, record: TrialRecord) -> None:
        where = {"study": self.study, "stage": record.stage}
        ended = _series("carmodels_ended")
        assert isinstance(ended, Counter)
        ended.inc(1, {**where, "state": str(record.state), "reason": reason_tag(record)})
        tags = self._trial_tags(record.stage, record.run)
        for name in _WHILE_TRAINING:
            self._set(name, 0.0, tags)
        self._levels = {
            k: level for k, level in self._levels.items() if level[0].get("trial") != tags["trial"]
        }
        self.on_complete(record)

    def on_complete(self, record: TrialRecord) -> None:
        """Update the best value if this trial is complete and better."""
        if record.state is not State.COMPLETE or record.value is None or record.stage == FOLD:
            return
        tags = {"study": self.study, "metric": self.metric}
        _, best = self._levels.get(_key("carmodels_best", tags), (tags, record.value))
        better = max if METRICS[self.metric].mode == "max" else min
        self._set("carmodels_best", better(record.value, best), tags)

    def on_step(self, recorder: RunState) -> None:
        """Set all gauges again. Ray drops a gauge that is not set for two reports (20 s)."""
        if time.monotonic() - self._refreshed < REFRESH_SECONDS:
            return
        self._refreshed = time.monotonic()
        self._set("carmodels_running", len(recorder.running), {"study": self.study})
        self._set("carmodels_seconds_left", self.clock.left, {"study": self.study})
        for (name, *_), (tags, value) in list(self._levels.items()):
            self._set(name, value, tags)

    def _set(self, name: str, value: float, tags: dict[str, str]) -> None:
        gauge = _series(name)
        assert isinstance(gauge, Gauge)
        if math.isfinite(value):
            gauge.set(value, tags)
            self._levels[_key(name, tags)] = tags, value

    def _trial_tags(self, stage: str, run: Run) -> dict[str, str]:
        config = run.config
        return {
            "study": self.study,
            "stage": stage,
            "trial": trial_name(run),
            "backbone": config.backbone,
            "image_size": str(config.image_size),
            "strategy": config.unfreeze,
        }


def _key(name: str, tags: dict[str, str]) -> tuple[str, ...]:
    return (name, *tags.values())

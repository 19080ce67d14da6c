"""What a run tells Prometheus: series of Ray's own metrics, which the agent of the node exports.

`tune/monitoring/` holds a scrape configuration and a Grafana dashboard for them; Ray puts `ray_` before the
names, and Prometheus' convention `_total` after those of counters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache

from ray.util.metrics import Counter, Gauge

from carmodels.predictions import METRICS
from carmodels.space import EpochMetrics, TrialConfig
from carmodels.study import Status, TrialRecord
from tune.stages import Clock
from tune.trials import Recorder, Watch, trial_name

_RUN = ("study", "stage")
_TRIAL = (*_RUN, "trial", "backbone", "image_size", "strategy")
SERIES: dict[str, tuple[type[Counter] | type[Gauge], str, tuple[str, ...]]] = {
    "carmodels_best": (Gauge, "best value of a finished trial on val", ("study", "metric")),
    "carmodels_running": (Gauge, "trials that train", _RUN),
    "carmodels_seconds_left": (Gauge, "seconds that the command has left", ("study",)),
    "carmodels_ended": (Counter, "trials that ended, by status and reason", (*_RUN, "status", "reason")),
    "carmodels_value": (Gauge, "the metric on val after the trial's last epoch", (*_TRIAL, "metric")),
    "carmodels_epoch": (Gauge, "epochs that the trial has run", _TRIAL),
    "carmodels_epochs_per_second": (Gauge, "of the trial's last epoch; 0: it has ended", _TRIAL),
    "carmodels_pictures_per_second": (Gauge, "likewise, pictures trained on", _TRIAL),
    "carmodels_gpu_bytes": (Gauge, "most GPU memory the trial has taken; 0: it has ended", _TRIAL),
}
_WHILE_TRAINING = ("carmodels_epochs_per_second", "carmodels_pictures_per_second", "carmodels_gpu_bytes")
REASONS = {  # how a record's reason begins -> the tag, of which there are few
    "the time": "time",
    "no better": "patience",
    "ran its": "schedule",
    "the loss": "loss not finite",
    "interrupted": "user",
}


def reason_tag(record: TrialRecord) -> str:
    """Why the trial ended, in a word or two: a rung by its epoch, an error by its kind."""
    known = next((tag for start, tag in REASONS.items() if record.reason.startswith(start)), None)
    return known or record.reason.split(":")[0][:40]


@cache
def _series(name: str) -> Counter | Gauge:
    kind, description, tags = SERIES[name]
    return kind(name, description, tags)


def _set(name: str, value: float, tags: dict[str, str]) -> None:
    gauge = _series(name)
    assert isinstance(gauge, Gauge)
    if math.isfinite(value):
        gauge.set(value, tags)


def _count(name: str, tags: dict[str, str]) -> None:
    counter = _series(name)
    assert isinstance(counter, Counter)
    counter.inc(1, tags)


def _tags(study: str, stage: str, config: TrialConfig) -> dict[str, str]:
    return {
        "study": study,
        "stage": stage,
        "trial": trial_name(config),
        "backbone": config.backbone,
        "image_size": str(config.image_size),
        "strategy": config.unfreeze,
    }


def exported(
    study: str, metric: str, *, pictures: int, clock: Clock, records: Iterable[TrialRecord] = ()
) -> Watch:
    """A watch that exports what it is told; `pictures` are those of an epoch, `records` are there already."""
    best = max if METRICS[metric].mode == "max" else min
    finished: list[float] = []

    def on_finished(record: TrialRecord) -> None:
        if record.status is Status.FINISHED and record.value is not None:
            finished.append(record.value)
            _set("carmodels_best", best(finished), {"study": study, "metric": metric})

    def on_epoch(stage: str, config: TrialConfig, epoch: EpochMetrics, gpu_bytes: int) -> None:
        tags = _tags(study, stage, config)
        _set("carmodels_value", epoch.value, {**tags, "metric": metric})
        _set("carmodels_epoch", epoch.epoch, tags)
        if epoch.seconds > 0:
            _set("carmodels_epochs_per_second", 1 / epoch.seconds, tags)
            _set("carmodels_pictures_per_second", pictures / epoch.seconds, tags)
        _set("carmodels_gpu_bytes", gpu_bytes, tags)

    def on_record(record: TrialRecord) -> None:
        run = {"study": study, "stage": record.stage}
        _count("carmodels_ended", {**run, "status": str(record.status), "reason": reason_tag(record)})
        for name in _WHILE_TRAINING:
            _set(name, 0.0, _tags(study, record.stage, record.config))
        on_finished(record)

    def on_step(recorder: Recorder) -> None:
        _set("carmodels_running", len(recorder.running), {"study": study, "stage": recorder.stage})
        _set("carmodels_seconds_left", clock.left, {"study": study})

    for record in records:
        on_finished(record)
    return Watch(on_record, on_step, on_epoch)

"""Test-time augmentation: views are added to the plain image only if they help in a nested check on val."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from carmodels.catalog import VIEWS
from carmodels.data.splits import Split
from carmodels.ensembling.selection import choose_views
from carmodels.evaluation.calibration import with_temperature
from carmodels.evaluation.metrics import METRICS, count_fixed_and_broken, log_loss
from carmodels.evaluation.nested import NestedCheck, nested_check
from carmodels.evaluation.predictions import Predictions, blend
from carmodels.models.classifier import create_classifier
from carmodels.models.weights import Weights
from carmodels.records import FOLDS, TrialRecord
from carmodels.steady_clock import steady_time
from carmodels.training.config import TrialConfig
from carmodels.training.forward import shown_view, view_size
from carmodels.training.run import Run
from tune.finalize import folds
from tune.runtime.job import Job, as_task, results_of

_HALF_PRECISION_TOLERANCE = 0.02  # how much probabilities differ between batch layouts on a GPU
_ROUNDING_TOLERANCE = 1e-5
_TIMED_IMAGES = 64
_VAL_SHARE = 0.5  # of the remaining time, for predicting val; the rest is for holdout and test


@dataclass(frozen=True)
class PredictionTimes:
    """Measured prediction time per image on one worker; each backbone and size is measured once."""

    job: Job
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)  # by backbone and side in pixels

    def seconds_per_image(self, run: Run, view: str = "plain") -> float:
        """Seconds per image, including loading; of a fold set, all its models together."""
        return (run.origin.folds or 1) * self.seconds[self._key(run.config, view)]

    def measure(self, runs: Iterable[Run], views: Iterable[str] = ("plain",)) -> None:
        """Measure what is not measured yet, side by side as predictions will run."""
        wanted = {self._key(r.config, v): r.config for r in runs for v in views}
        missing = {key: config for key, config in wanted.items() if key not in self.seconds}
        task = as_task(prediction_seconds, self.job.workers)
        tasks = [task.remote(self.job, config, size) for (_, size), config in missing.items()]
        times = results_of(tasks, "measuring how long a prediction takes")
        self.seconds.update(zip(missing, times, strict=True))

    @staticmethod
    def _key(config: TrialConfig, view: str) -> tuple[str, int]:
        return config.backbone, view_size(config, view)


def prediction_seconds(job: Job, config: TrialConfig, size: int) -> float:
    """Seconds per image: the faster of two passes over some val images, after a warm-up pass."""
    job.begin()
    config = replace(config, image_size=size, start_image_size=0, eval_image_size=0)
    model = create_classifier(config, classes=len(job.splits.classes), weights=Weights("none"))
    val = job.splits.val
    assert val.labels is not None
    count = _TIMED_IMAGES * (1 + job.workers.processes)  # loader processes take a while to start
    images = Split(val.name, val.ids[:count], val.labels[:count], val.rows[:count])
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        job.predict(model, config, images)
        seconds.append(time.monotonic() - started)
    return min(seconds[1:]) / len(images)


@dataclass(frozen=True)
class EnsembleMembers:
    """The trials of an ensemble with their weights, and their predictions through any views."""

    job: Job
    weights: Mapping[TrialRecord, float]
    temperatures: Mapping[str, float]  # by trial id, applied before the mean

    def blended(self, split: str, views: Sequence[str]) -> Predictions:
        """Mean over views per member, then weighted mean over members. Predicts what is not on disk."""
        self.predict_missing(split, views)
        means = [blend([self._tempered(record, split, view) for view in views]) for record in self.weights]
        return blend(means, list(self.weights.values()))

    def _tempered(self, record: TrialRecord, split: str, view: str) -> Predictions:
        view = shown_view(record.config, view)
        predictions = self.job.study.predictions(record.trial_id, split, view)
        return with_temperature(predictions, self.temperatures[record.trial_id])

    def predict_missing(self, split: str, views: Sequence[str]) -> list[Path]:
        """Compute missing or damaged predictions of all members and views, side by side; damaged files.

        What a member is shown alike is computed once, under the first such view.
        """
        study, path = self.job.study, self.job.study.predictions_file
        shown = {r: dict.fromkeys(shown_view(r.config, view) for view in views) for r in self.weights}
        missing = {
            r: [v for v in shown[r] if not study.has_predictions(r.trial_id, split, v)] for r in self.weights
        }
        damaged = [f for r, vs in missing.items() for v in vs if (f := path(r.trial_id, split, v)).is_file()]
        # few tasks, as each may start a process
        parts = math.ceil(self.job.workers.count / max(1, sum(map(bool, missing.values()))))
        tasks = [(r, vs[k::parts]) for r, vs in missing.items() for k in range(parts) if vs[k::parts]]
        task = as_task(_predict_views, self.job.workers)
        results = results_of([task.remote(self.job, r, split, vs) for r, vs in tasks], f"predicting {split}")
        for (record, vs), by_view in zip(tasks, results, strict=True):
            for view, predictions in zip(vs, by_view, strict=True):
                predictions.save(path(record.trial_id, split, view))
        return damaged

    def reproduce_predictions(self) -> bool:
        """Whether the first member, predicting val again, reproduces its saved predictions.

        If not, images and ids no longer match, or this is another kind of machine.
        """
        record = next(iter(self.weights))
        before = self.job.study.predictions(record.trial_id, "val")
        task = as_task(_predict_views, self.job.workers)
        [[shown]] = results_of([task.remote(self.job, record, "val", ("plain",))], "predicting val")
        again = shown.aligned(before.ids)
        tolerance = _ROUNDING_TOLERANCE if record.stage == FOLDS else 0.0  # batches of folds differ
        if self.job.workers.gpus:
            tolerance = _HALF_PRECISION_TOLERANCE
        return np.allclose(again.probs, before.probs, rtol=0, atol=tolerance)

    def costs(
        self, times: PredictionTimes, views: Iterable[str], *, on_val: bool = False
    ) -> dict[str, float]:
        """Seconds for 1,000 images, all members together, by view.

        On val only one model of a fold set predicts each image. A view costs nothing for a member that is
        shown another one alike: on val all views are computed, else the plain one is.
        """
        runs, views = [record.run for record in self.weights], tuple(views)
        times.measure(runs, views)

        def seconds(run: Run, view: str) -> float:
            shown = shown_view(run.config, view)
            if shown != view and (on_val or shown == "plain"):
                return 0.0
            share = 1 / (run.origin.folds or 1) if on_val else 1.0
            return share * times.seconds_per_image(run, view)

        return {view: 1000 * sum(seconds(run, view) for run in runs) for view in views}


def _predict_views(job: Job, record: TrialRecord, split: str, views: Sequence[str]) -> list[Predictions]:
    """One trial's predictions for a split, one per view, from its saved weights."""
    if record.stage == FOLDS:
        return folds.predict_with_folds(job, record, split, views)
    return job.predict_again(record, getattr(job.splits, split), views)


@dataclass(frozen=True)
class ViewsVerdict:
    """The views to average over, and the evidence."""

    views: tuple[str, ...]
    sentence: str
    tried: tuple[dict[str, Any], ...] = ()  # a row per set: val, log loss, images corrected and spoilt
    nested: dict[str, Any] | None = None  # the check: scores on the other half of val

    @property
    def lines(self) -> list[str]:
        """Each set of views in words."""
        return [_row_text(row) for row in self.tried]


def _row_text(row: Mapping[str, Any]) -> str:
    name = ", ".join(row["views"])
    if "left_out" in row:
        return f"{name}: left out, {row['left_out']}"
    counts = f"{row['set_right']} set right, {row['set_wrong']} set wrong"
    return f"{name}: val {row['val']:.4f}, log loss {row['log_loss']:.4f}, {counts}"


def select_tta_views(
    members: EnsembleMembers,
    labels: Mapping[str, int],
    *,
    limit: int,
    seconds: float,
    times: PredictionTimes,
    max_cost: float = math.inf,
) -> ViewsVerdict:
    """Choose views on val greedily, starting from the plain one, within `seconds`.

    At most `limit` views, at most `max_cost` seconds for 1,000 images and all members. Log loss chooses, as
    it is less noisy than accuracy on a few hundred images: chosen on 297 images of cars9, its views gained
    3.2 points on the other images, accuracy's 2.3 (results/final). The best of many sets is partly luck, so
    views are kept only if views chosen on one half of val improve the study's metric on the other half.
    """
    if limit < 2:
        return ViewsVerdict(("plain",), "not asked for")
    ends = steady_time() + seconds
    if not members.reproduce_predictions():
        return ViewsVerdict(("plain",), "left out, the plain view does not give again what the trial left")
    costs = members.costs(times, VIEWS)
    on_val = members.costs(times, VIEWS, on_val=True)
    max_views, left_out = _plan_views(members.job, costs, on_val, limit, ends - steady_time(), max_cost)
    if len(left_out) == len(VIEWS) - 1:
        reason = "no time for it" if max_views < 2 else "every view would cost too much"
        return ViewsVerdict(("plain",), f"left out, {reason}", _left_out_rows(left_out))
    ids, truth = list(labels), np.array(list(labels.values()))
    candidates = [view for view in VIEWS if view not in left_out]
    members.predict_missing("val", candidates)
    probs = {view: members.blended("val", (view,)).aligned(ids).probs for view in candidates}
    metric = members.job.study.metric

    def chosen(rows: np.ndarray) -> tuple[str, ...]:
        part = {view: p[rows] for view, p in probs.items()}
        return choose_views(
            part, truth[rows], metric="log_loss", max_views=max_views, costs=costs, max_cost=max_cost
        )

    def choose(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _mean_probs(probs, chosen(rows)), probs["plain"]

    views = chosen(np.arange(len(truth)))
    sets: list[tuple[str, ...]] = [("plain", view) for view in probs if view != "plain"]
    sets += [views[:count] for count in range(3, len(views) + 1)]
    tried = tuple(_score_views(metric, probs, views, truth) for views in sets)
    groups = members.job.study.groups(ids)
    check = nested_check(choose, truth, metric=metric, groups=groups, until=ends)
    kept, sentence = _decision(metric, probs, views, truth, check)
    return ViewsVerdict(
        kept, sentence, tried + _left_out_rows(left_out), {**asdict(check), "gain": check.gain}
    )


def _plan_views(
    job: Job,
    costs: Mapping[str, float],
    on_val: Mapping[str, float],
    limit: int,
    seconds: float,
    max_cost: float,
) -> tuple[int, dict[str, str]]:
    """(most views per image that there is time for, reasons by view that is left out)."""
    splits, workers = job.splits, job.workers.count
    later = (len(splits.holdout) + len(splits.test)) * max(costs.values()) / 1000 / workers  # per view
    max_views = min(limit, 1 + int(min((1 - _VAL_SHARE) * seconds / later, limit))) if later else limit
    remaining, left_out = _VAL_SHARE * seconds, {}
    for view in VIEWS:
        if view == "plain":
            continue
        on_val_seconds = len(splits.val) * on_val[view] / 1000 / workers
        if on_val[view] == 0:
            left_out[view] = "every model is shown another view alike"
        elif costs["plain"] + costs[view] > max_cost:
            total = costs["plain"] + costs[view]
            left_out[view] = f"with it 1,000 images would take {total:.1f} s, more than {max_cost:g} s"
        elif max_views < 2 or on_val_seconds > remaining:
            left_out[view] = f"it would take about {on_val_seconds + later:.0f} s"
        else:
            remaining -= on_val_seconds
    return max_views, left_out


def _left_out_rows(reasons: Mapping[str, str]) -> tuple[dict[str, Any], ...]:
    return tuple({"views": ("plain", view), "left_out": reason} for view, reason in reasons.items())


def _mean_probs(probs: Mapping[str, np.ndarray], views: Sequence[str]) -> np.ndarray:
    mean: np.ndarray = np.mean([probs[view] for view in views], axis=0)
    return mean


def _score_views(
    metric: str, probs: Mapping[str, np.ndarray], views: Sequence[str], truth: np.ndarray
) -> dict[str, Any]:
    """A row of `ViewsVerdict.tried`. probs: (N, C) by view."""
    mean = _mean_probs(probs, views)
    right, wrong = count_fixed_and_broken(probs["plain"], mean, truth)
    score = METRICS[metric].score(mean, truth)
    return {
        "views": views,
        "val": score,
        "log_loss": log_loss(mean, truth),
        "set_right": right,
        "set_wrong": wrong,
    }


def _decision(
    metric: str,
    probs: Mapping[str, np.ndarray],
    views: tuple[str, ...],
    truth: np.ndarray,
    check: NestedCheck,
) -> tuple[tuple[str, ...], str]:
    """(views that are kept, the reason in words)."""
    before = METRICS[metric].score(probs["plain"], truth)
    if len(views) < 2:
        return views, f"left out, no gain on val ({before:.4f})"
    row = _score_views(metric, probs, views, truth)
    scores = f"{', '.join(views)}: val {before:.4f} -> {row['val']:.4f}, log loss {row['log_loss']:.4f}"
    halves = f"chosen on one half of val it gains {check.gain:+.4f} on the other"
    if not check.helps:
        return ("plain",), f"left out {scores}, but {halves}"
    counts = f"{row['set_right']} images set right, {row['set_wrong']} set wrong"
    return views, f"kept {scores}, {counts}; {halves}"

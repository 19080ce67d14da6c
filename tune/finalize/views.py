"""Test-time augmentation on probation: further views of each image are kept only where they help on val."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from carmodels.catalog import VIEWS
from carmodels.data.splits import Split
from carmodels.ensembling.selection import choose_views
from carmodels.evaluation.calibration import with_temperature
from carmodels.evaluation.metrics import METRICS, log_loss, right_and_wrong
from carmodels.evaluation.nested import Nested, nested_check
from carmodels.evaluation.predictions import Predictions, blend
from carmodels.models.classifier import create_classifier
from carmodels.models.weights import Weights
from carmodels.records import FOLDS, TrialRecord
from carmodels.training.config import TrialConfig
from carmodels.training.forward import view_size
from carmodels.training.run import Run
from tune.finalize import folds
from tune.runtime.job import Job, as_task

MOST_VIEWS = 4  # an image, the plain one included
_HALF_PRECISION = 0.02  # by how much probabilities differ between two batch layouts on a GPU
_ROUNDING = 1e-5
_TIMED = 64  # images
_JUDGING = 0.5  # of the time that is left: for showing val; the rest is for holdout and test


@dataclass(frozen=True)
class Paces:
    """What showing an image to a model takes one worker here, in seconds, as measured; each shape once."""

    job: Job
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)  # by backbone and size in pixels

    def of(self, run: Run, view: str = "plain") -> float:
        """Seconds an image, loading included, by all models of a run over folds."""
        return (run.origin.folds or 1) * self.seconds[self._key(run.config, view)]

    def measure(self, runs: Iterable[Run], views: Iterable[str] = ("plain",)) -> None:
        """Time what was not timed yet, side by side as it will run."""
        wanted = {self._key(r.config, v): r.config for r in runs for v in views}
        missing = {key: config for key, config in wanted.items() if key not in self.seconds}
        task = as_task(prediction_seconds, self.job.workers)
        found = ray.get([task.remote(self.job, config, size) for (_, size), config in missing.items()])
        self.seconds.update(zip(missing, found, strict=True))

    @staticmethod
    def _key(config: TrialConfig, view: str) -> tuple[str, int]:
        return config.backbone, view_size(config, view)


def prediction_seconds(job: Job, config: TrialConfig, size: int) -> float:
    """The better of two passes over some images of val, after the network has warmed up on them."""
    job.workers.take()
    config = replace(config, image_size=size, start_image_size=0, eval_image_size=0)
    model = create_classifier(config, classes=len(job.splits.classes), weights=Weights("none"))
    val = job.splits.val
    assert val.labels is not None
    many = _TIMED * (1 + job.workers.processes)  # loader processes take a while to begin
    some = Split(val.name, val.ids[:many], val.labels[:many], val.rows[:many])
    taken = []
    for _ in range(3):
        started = time.monotonic()
        job.predict(model, config, some)
        taken.append(time.monotonic() - started)
    return min(taken[1:]) / len(some)


@dataclass(frozen=True)
class Members:
    """An ensemble's trials with their weights, and the probabilities they give through any views."""

    job: Job
    weights: Mapping[TrialRecord, float]
    temperatures: Mapping[str, float]  # by trial id, put on each one's probabilities before the mean

    def blended(self, split: str, views: Sequence[str]) -> Predictions:
        """The weighted mean over members of each one's mean over views; what is missing on disk is made."""
        self.show(split, views)
        means = [blend([self._tempered(record, split, view) for view in views]) for record in self.weights]
        return blend(means, list(self.weights.values()))

    def _tempered(self, record: TrialRecord, split: str, view: str) -> Predictions:
        found = self.job.study.predictions(record.trial_id, split, view)
        return with_temperature(found, self.temperatures[record.trial_id])

    def show(self, split: str, views: Sequence[str]) -> list[Path]:
        """Show the split to every member through every view whose probabilities are missing or damaged.

        They are made side by side. What comes back are the files that were there, but damaged.
        """
        study, path = self.job.study, self.job.study.predictions_file
        missing = {
            r: [v for v in views if not study.has_predictions(r.trial_id, split, v)] for r in self.weights
        }
        damaged = [f for r, vs in missing.items() for v in vs if (f := path(r.trial_id, split, v)).is_file()]
        # few tasks: each may start a process
        parts = math.ceil(self.job.workers.count / max(1, sum(map(bool, missing.values()))))
        tasks = [(r, vs[k::parts]) for r, vs in missing.items() for k in range(parts) if vs[k::parts]]
        task = as_task(_shown, self.job.workers)
        made = ray.get([task.remote(self.job, r, split, vs) for r, vs in tasks])
        for (record, vs), found in zip(tasks, made, strict=True):
            for view, predictions in zip(vs, found, strict=True):
                predictions.save(path(record.trial_id, split, view))
        return damaged

    def repeats(self) -> bool:
        """Show val to the first member again: whether that gives what it left.

        Where it does not, images and ids have come apart, or this is another kind of machine.
        """
        record = next(iter(self.weights))
        before = self.job.study.predictions(record.trial_id, "val")
        task = as_task(_shown, self.job.workers)
        again = ray.get(task.remote(self.job, record, "val", ("plain",)))[0].aligned(before.ids)
        tolerance = _ROUNDING if record.stage == FOLDS else 0.0  # whose images come in other batches now
        if self.job.workers.gpus:
            tolerance = _HALF_PRECISION
        return np.allclose(again.probs, before.probs, rtol=0, atol=tolerance)

    def costs(self, paces: Paces, views: Iterable[str], *, on_val: bool = False) -> dict[str, float]:
        """Seconds that all members together take for 1,000 images, by view.

        On val each image is shown to one model of folds alone.
        """
        runs, views = [record.run for record in self.weights], tuple(views)
        paces.measure(runs, views)
        shares = {run: 1 / (run.origin.folds or 1) if on_val else 1.0 for run in runs}
        return {view: 1000 * sum(shares[r] * paces.of(r, view) for r in runs) for view in views}


def _shown(job: Job, record: TrialRecord, split: str, views: Sequence[str]) -> list[Predictions]:
    """One trial's probabilities for one split through each of the views, from the weights it left."""
    if record.stage == FOLDS:
        return folds.shown(job, record, split, views)
    return job.predict_again(record, getattr(job.splits, split), views)


@dataclass(frozen=True)
class Verdict:
    """Which views are averaged over, and how that was judged."""

    views: tuple[str, ...]
    sentence: str
    tried: tuple[dict[str, Any], ...] = ()  # by set of views: val, log loss, images set right and wrong
    nested: dict[str, Any] | None = None  # what choosing them is worth on images that did not choose

    @property
    def lines(self) -> list[str]:
        """Each set that was tried, in words."""
        return [_line(row) for row in self.tried]


def _line(row: Mapping[str, Any]) -> str:
    name = ", ".join(row["views"])
    if "left_out" in row:
        return f"{name}: left out, {row['left_out']}"
    counts = f"{row['set_right']} set right, {row['set_wrong']} set wrong"
    return f"{name}: val {row['val']:.4f}, log loss {row['log_loss']:.4f}, {counts}"


def judge_views(
    members: Members,
    labels: Mapping[str, int],
    *,
    limit: int,
    seconds: float,
    paces: Paces,
    max_cost: float = math.inf,
) -> Verdict:
    """Add views to the plain one on val, as far as `seconds` allow, each the one that helps most.

    That is judged by log loss, which a few hundred images tell more surely than accuracy: views that it
    chose on 297 of cars9 gained 3.2 points on the others, those that accuracy chose 2.3 (results/final). At
    most `limit` views, which take all members at most `max_cost` seconds for 1,000 images. The best of so
    many sets is partly the luckiest, so they are kept only where, chosen on one half of val, they help on the
    other by the study's metric.
    """
    if limit < 2:
        return Verdict(("plain",), "not asked for")
    ends = time.time() + seconds
    if not members.repeats():
        return Verdict(("plain",), "left out, the plain view does not give again what the trial left")
    costs = members.costs(paces, VIEWS)
    on_val = members.costs(paces, VIEWS, on_val=True)
    most, left_out = _affordable(members.job, costs, on_val, limit, ends - time.time(), max_cost)
    if len(left_out) == len(VIEWS) - 1:
        reason = "no time for it" if most < 2 else "every view would cost too much"
        return Verdict(("plain",), f"left out, {reason}", _left_out(left_out))
    ids, truth = list(labels), np.array(list(labels.values()))
    tried_on = [view for view in VIEWS if view not in left_out]
    members.show("val", tried_on)
    shown = {view: members.blended("val", (view,)).aligned(ids).probs for view in tried_on}
    metric = members.job.study.metric

    def chosen(rows: np.ndarray) -> tuple[str, ...]:
        some = {view: probs[rows] for view, probs in shown.items()}
        return choose_views(
            some, truth[rows], metric="log_loss", max_views=most, costs=costs, max_cost=max_cost
        )

    def choose(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _mean(shown, chosen(rows)), shown["plain"]

    views = chosen(np.arange(len(truth)))
    sets: list[tuple[str, ...]] = [("plain", view) for view in shown if view != "plain"]
    sets += [views[:count] for count in range(3, len(views) + 1)]
    tried = tuple(_tried(metric, shown, views, truth) for views in sets)
    check = nested_check(choose, truth, metric=metric, until=ends)
    kept, sentence = _verdict(metric, shown, views, truth, check)
    return Verdict(kept, sentence, tried + _left_out(left_out), {**asdict(check), "gain": check.gain})


def _affordable(
    job: Job,
    costs: Mapping[str, float],
    on_val: Mapping[str, float],
    limit: int,
    seconds: float,
    max_cost: float,
) -> tuple[int, dict[str, str]]:
    """How many views an image there is time for, and why views are left out that are not to be tried."""
    splits, workers = job.splits, job.workers.count
    later = (len(splits.holdout) + len(splits.test)) * max(costs.values()) / 1000 / workers  # for each view
    most = min(limit, 1 + int(min((1 - _JUDGING) * seconds / later, limit))) if later else limit
    left, left_out = _JUDGING * seconds, {}
    for view in VIEWS:
        if view == "plain":
            continue
        takes = len(splits.val) * on_val[view] / 1000 / workers
        if costs["plain"] + costs[view] > max_cost:
            total = costs["plain"] + costs[view]
            left_out[view] = f"with it 1,000 images would take {total:.1f} s, more than {max_cost:g} s"
        elif most < 2 or takes > left:
            left_out[view] = f"it would take about {takes + later:.0f} s"
        else:
            left -= takes
    return most, left_out


def _left_out(reasons: Mapping[str, str]) -> tuple[dict[str, Any], ...]:
    return tuple({"views": ("plain", view), "left_out": reason} for view, reason in reasons.items())


def _mean(shown: Mapping[str, np.ndarray], views: Sequence[str]) -> np.ndarray:
    found: np.ndarray = np.mean([shown[view] for view in views], axis=0)
    return found


def _tried(
    metric: str, shown: Mapping[str, np.ndarray], views: Sequence[str], truth: np.ndarray
) -> dict[str, Any]:
    probs = _mean(shown, views)
    right, wrong = right_and_wrong(shown["plain"], probs, truth)
    score = METRICS[metric].score(probs, truth)
    return {
        "views": views,
        "val": score,
        "log_loss": log_loss(probs, truth),
        "set_right": right,
        "set_wrong": wrong,
    }


def _verdict(
    metric: str, shown: Mapping[str, np.ndarray], views: tuple[str, ...], truth: np.ndarray, check: Nested
) -> tuple[tuple[str, ...], str]:
    """The views that are kept, and why, in words."""
    before = METRICS[metric].score(shown["plain"], truth)
    if len(views) < 2:
        return views, f"left out, no gain on val ({before:.4f})"
    found = _tried(metric, shown, views, truth)
    scores = f"{', '.join(views)}: val {before:.4f} -> {found['val']:.4f}, log loss {found['log_loss']:.4f}"
    halves = f"chosen on one half of val it gains {check.gain:+.4f} on the other"
    if not check.helps:
        return ("plain",), f"left out {scores}, but {halves}"
    counts = f"{found['set_right']} images set right, {found['set_wrong']} set wrong"
    return views, f"kept {scores}, {counts}; {halves}"

"""Test-time augmentation on probation: further views of each picture are kept only where they help on val."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from carmodels.catalog import VIEWS
from carmodels.data import Split
from carmodels.models import load_weights
from carmodels.predictions import METRICS, Predictions, blend, log_loss, right_and_wrong
from carmodels.study import FOLDS, TrialRecord
from carmodels.training import predict
from tune import folds
from tune.trials import Job, as_task

_HALF_PRECISION = 0.02  # by how much probabilities differ between two batch layouts on a GPU


@dataclass(frozen=True)
class Members:
    """An ensemble's trials with their weights, and the probabilities they give through any views."""

    job: Job
    weights: Mapping[TrialRecord, float]

    def blended(self, split: str, views: Sequence[str]) -> Predictions:
        """The weighted mean over members of each one's mean over views; what is missing on disk is made."""
        self.show(split, views)
        study = self.job.study
        means = [blend([study.predictions(r.trial_id, split, v) for v in views]) for r in self.weights]
        return blend(means, list(self.weights.values()))

    def show(self, split: str, views: Sequence[str]) -> None:
        """Show the split to every member through every view that has left no probabilities, side by side."""
        path = self.job.study.predictions_file
        missing = [(r, v) for r in self.weights for v in views if not path(r.trial_id, split, v).is_file()]
        task = as_task(_show_one, self.job.workers)
        made = ray.get([task.remote(self.job, r, split, v) for r, v in missing])
        for (record, view), predictions in zip(missing, made, strict=True):
            predictions.save(path(record.trial_id, split, view))

    def identity(self) -> tuple[bool, float]:
        """Show val to the first member again: whether that gives what it left, and seconds a picture.

        Where it does not, pictures and ids have come apart, or this is another kind of machine.
        """
        record = next(iter(self.weights))
        before = self.job.study.predictions(record.trial_id, "val")
        started = time.monotonic()
        task = as_task(_show_one, self.job.workers)
        again = ray.get(task.remote(self.job, record, "val", "plain")).aligned(before.ids)
        seconds = time.monotonic() - started
        tolerance = _HALF_PRECISION if self.job.workers.gpus else 0.0
        same = np.allclose(again.probs, before.probs, rtol=0, atol=tolerance)
        return same, seconds / len(before.ids)


def _show_one(job: Job, record: TrialRecord, split: str, view: str) -> Predictions:
    """One trial's probabilities for one split through one view, from the weights it left."""
    if record.stage == FOLDS:
        return folds.shown(job, record, split, view)
    torch.set_num_threads(job.workers.cpus)
    weights = job.study.weights_file(record.trial_id)
    model = load_weights(record.config, weights, classes=len(job.splits.classes))
    pictures: Split = getattr(job.splits, split)
    return predict(
        model,
        job.splits,
        pictures,
        config=record.config,
        view=view,
        device=job.workers.device,
        processes=job.workers.processes,
    )


@dataclass(frozen=True)
class Verdict:
    """Which views are averaged over, and how that was judged."""

    views: tuple[str, ...]
    sentence: str
    tried: tuple[dict[str, Any], ...] = ()  # by set of views: val, log loss, pictures set right and wrong


def judge_views(members: Members, labels: Mapping[str, int], *, limit: int, seconds: float) -> Verdict:
    """Try the first 2, 3, ... `limit` rows of VIEWS on val, as far as `seconds` allow, and keep the best set.

    A set is better if it scores higher by the study's metric, or the same with a lower log loss.
    """
    if limit < 2:
        return Verdict(("plain",), "not asked for")
    started = time.monotonic()
    same, each = members.identity()
    if not same:
        return Verdict(("plain",), "left out, the plain view does not give again what the trial left")
    ids, truth = list(labels), np.array(list(labels.values()))
    metric = METRICS[members.job.study.metric]
    plain = members.blended("val", ("plain",)).aligned(ids).probs
    best: tuple[str, ...] = ("plain",)
    best_probs = plain
    tried: list[dict[str, Any]] = []
    for count in range(2, limit + 1):
        views = tuple(VIEWS)[:count]
        cost = each * _pictures(members, views)
        if cost > seconds - (time.monotonic() - started):
            tried.append({"views": views, "left_out": f"it would take about {cost:.0f} s"})
            break
        probs = members.blended("val", views).aligned(ids).probs
        score, loss = metric.score(probs, truth), log_loss(probs, truth)
        fixed, broken = right_and_wrong(plain, probs, truth)
        tried.append(
            {"views": views, "val": score, "log_loss": loss, "set_right": fixed, "set_wrong": broken}
        )
        gain = metric.gain(score, metric.score(best_probs, truth))
        if gain > 0 or (gain == 0 and loss < log_loss(best_probs, truth)):
            best, best_probs = views, probs
    kept = next((row for row in tried if row.get("views") == best and "val" in row), None)
    before = f"{metric.score(plain, truth):.4f}"
    if kept:
        sentence = (
            f"kept {', '.join(best)}: val {before} -> {kept['val']:.4f}, log loss {kept['log_loss']:.4f}"
        )
    elif "val" in tried[0]:
        sentence = f"left out, no gain on val ({before})"
    else:
        sentence = "left out, no time for it"
    return Verdict(best, sentence, tuple(tried))


def _pictures(members: Members, views: Sequence[str]) -> float:
    """How many pictures, in units of a plain one, each worker would show for these views of all splits."""
    splits = members.job.splits
    area = sum(VIEWS[view].scale ** 2 for view in views[1:])
    count = len(splits.val) + len(splits.audit) + len(splits.test)
    return count * area * len(members.weights) / members.job.workers.count

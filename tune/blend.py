"""The last stage: members, views and temperatures by val, one look at audit, ensemble.json and submission."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from carmodels.predictions import (
    METRICS,
    Interval,
    Nested,
    Predictions,
    Selection,
    accuracy_interval,
    blend,
    fit_temperature,
    hidden_score,
    nested_check,
    paired_gain,
    score_interval,
    select_ensemble,
    with_temperature,
)
from carmodels.study import FOLDS, TRAINED, Study, TrialRecord, read_json, write_json
from carmodels.submission import write_submission
from tune import folds, soups
from tune.stages import RECIPE, Clock, Say
from tune.trials import WEIGHTS_KEPT, Job
from tune.views import MOST_VIEWS, Members, Paces, judge_views

SOUP_SHARE = 0.3  # of the time that is left, after which no further soup is tried
CHECK_SHARE = 0.2  # of the rest, after which the nested check is not repeated once more


def ensemble(
    job: Job,
    *,
    clock: Clock,
    say: Say,
    top: int = WEIGHTS_KEPT,
    views: int = MOST_VIEWS,
    max_seconds: float = math.inf,
) -> dict[str, Any]:
    """Choose members, views and temperatures on val, score once on audit, write ensemble and submission.

    `max_seconds` is what all members with all views may take one worker for 1,000 pictures.
    """
    study, metric = job.study, job.study.metric
    trained = _trained(study, top)
    cooked = soups.cook(job, trained, until=time.time() + SOUP_SHARE * clock.left)
    for record in cooked:
        say(f"Soup {record.trial_id}: {record.reason}, {record.config.title}; val {record.value:.4f}.")
    paces = Paces(job)
    candidates, on, asked = folds.judged_on(study, [*trained, *cooked])
    paces.measure(record.config for record in candidates)
    library = Library.of(study, candidates, on, asked, paces, max_seconds)
    selection = library.select(np.arange(len(asked)))
    check = library.check(until=time.time() + CHECK_SHARE * clock.left)
    weights = selection.weights if check.helps else {selection.single: 1.0}
    sentence = _sentence(selection, check)
    say(f"{sentence}.")
    temperatures = library.temperatures(np.arange(len(asked)))
    records = {r.trial_id: r for r in [*trained, *candidates]}
    labels = study.labels("val")
    truth = np.array(list(labels.values()))
    members = Members(job, {records[i]: weight for i, weight in weights.items()}, temperatures)
    verdict = judge_views(members, labels, limit=views, seconds=clock.left, paces=paces, max_cost=max_seconds)
    for line in verdict.lines:
        say(f"  {line}.")
    say(f"Test-time augmentation: {verdict.sentence}.")
    temperature = fit_temperature(members.blended("val", verdict.views).aligned(list(labels)).probs, truth)
    blended = {
        split.name: with_temperature(members.blended(split.name, verdict.views), temperature)
        for split in (job.splits.val, job.splits.audit, job.splits.test)
        if len(split)
    }
    for split, predictions in blended.items():
        predictions.save(study.predictions_file("ensemble", split))
    gains = selection.gains if check.helps else {selection.single: 0.0}
    single = library.best_of([r.trial_id for r in trained]) if on == "val" else trained[0].trial_id
    costs = members.costs(paces)
    results = {
        "metric": metric,
        "members": [
            _member(one, record, weight, gains, temperatures, library.costs, len(models))
            for record, weight in members.weights.items()
            for models in [folds.models_of(study, record)]
            for one in models
        ],
        "temperature": temperature,
        "tta": asdict(verdict),
        "nested": {**asdict(check), "gain": check.gain, "sentence": sentence},
        "soups": [_soup(record) for record in cooked],
        "cost": {
            "seconds_per_1000": sum(costs[view] for view in verdict.views),
            "most": max_seconds,
            "device": job.workers.device,
            "cores": job.workers.cpus,
        },
        "val": {
            "ensemble": METRICS[metric].score(blended["val"].aligned(list(labels)).probs, truth),
            "single": {"trial_id": single, "value": records[single].value},
        },
        "audit": _audit(study, metric, blended["audit"], single),
    }
    if "test" in blended:
        write_submission(blended["test"], study.submission_file, sample=job.splits.sample_file)
        results["submission"] = _described(study, job.splits.class_names, blended["test"])
        results["hidden"] = _expected(study, metric, blended["audit"], len(blended["test"].ids))
    write_json(study.ensemble_file, results)
    study.write_table()
    return results


def _trained(study: Study, top: int) -> list[TrialRecord]:
    """The best `top` trials of the search and all later runs that left their weights, best first."""
    ready = [r for r in study.leaderboard() if study.weights_file(r.trial_id).is_file()]
    searched = [r for r in ready if r.stage == "search"][:top]
    found = [r for r in ready if r in searched or (r.stage in TRAINED and r.stage != "search")]
    if not found:
        raise ValueError(f"{study.folder} has no finished trial to make a submission from; --resume goes on")
    return found


@dataclass(frozen=True)
class Library:
    """What an ensemble is chosen from, and by."""

    metric: str
    probs: Mapping[str, Predictions]  # by trial id, rows in the order of truth
    truth: np.ndarray  # (N,)
    costs: Mapping[str, float]  # seconds for 1,000 pictures
    max_cost: float
    means: frozenset[str] = frozenset()  # of several models, whose temperature is left alone

    @classmethod
    def of(
        cls,
        study: Study,
        candidates: Sequence[TrialRecord],
        on: str,
        labels: Mapping[str, int],
        paces: Paces,
        max_cost: float,
    ) -> Library:
        """The candidates' answers on a split; ValueError where none of them is cheap enough."""
        costs = {r.trial_id: 1000 * paces.of(r.config) for r in candidates}
        if min(costs.values()) > max_cost:
            raise ValueError(
                f"--max-seconds-per-1000 {max_cost:g} is less than the fastest candidate takes here, "
                f"{min(costs.values()):.2f} s; allow more"
            )
        probs = {r.trial_id: study.predictions(r.trial_id, on).aligned(list(labels)) for r in candidates}
        means = frozenset(r.trial_id for r in candidates if r.stage == FOLDS)
        return cls(study.metric, probs, np.array(list(labels.values())), costs, max_cost, means)

    def temperatures(self, rows: np.ndarray) -> dict[str, float]:
        """Each model's temperature, fitted on these rows."""
        return {
            name: 1.0 if name in self.means else fit_temperature(p.probs[rows], self.truth[rows])
            for name, p in self.probs.items()
        }

    def tempered(self, rows: np.ndarray) -> dict[str, Predictions]:
        """All rows, with the temperatures fitted on some."""
        found = self.temperatures(rows)
        return {name: with_temperature(p, found[name]) for name, p in self.probs.items()}

    def select(self, rows: np.ndarray) -> Selection:
        """The ensemble by these rows alone."""
        return self._selected(self.tempered(rows), rows)

    def _selected(self, tempered: Mapping[str, Predictions], rows: np.ndarray) -> Selection:
        some = {name: p.rows(rows) for name, p in tempered.items()}
        return select_ensemble(
            some, self.truth[rows], metric=self.metric, costs=self.costs, max_cost=self.max_cost
        )

    def check(self, until: float) -> Nested:
        """Whether choosing an ensemble on one half of the pictures beats the best one on the other."""

        def choose(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            tempered = self.tempered(rows)
            found = self._selected(tempered, rows)
            mixed = blend([tempered[name] for name in found.weights], list(found.weights.values()))
            return mixed.probs, tempered[found.single].probs

        return nested_check(choose, self.truth, metric=self.metric, until=until)

    def best_of(self, names: Sequence[str]) -> str:
        """The best of these alone, of those that are cheap enough."""
        some = {name: self.probs[name] for name in names if self.costs[name] <= self.max_cost}
        return select_ensemble(some, self.truth, metric=self.metric, rounds=0, max_members=1).single


def _sentence(selection: Selection, check: Nested) -> str:
    """What the nested check says, in words."""
    halves = f"chosen on one half of val, the ensemble has {check.chosen:.4f} on the other, the best model "
    halves += f"{check.before:.4f} ({check.gain:+.4f}, mean of {len(check.gains)} cuts)"
    if len(selection.weights) == 1:
        return f"One model is the ensemble, no other helps on val; {halves}"
    return f"The ensemble is {'kept' if check.helps else 'left out for the best model'}: {halves}"


def _member(
    one: TrialRecord,
    record: TrialRecord,
    weight: float,
    gains: Mapping[str, float],
    temperatures: Mapping[str, float],
    costs: Mapping[str, float],
    models: int,
) -> dict[str, Any]:
    """One model of what was chosen: that itself, or one of its folds, which share what there is to it."""
    return {
        "trial_id": one.trial_id,
        "title": one.config.title,
        "stage": one.stage,
        "weight": weight / models,
        "gain": gains[record.trial_id] / models,
        "val": record.value,
        "temperature": temperatures[record.trial_id],
        "seconds_per_1000": costs[record.trial_id] / models,
    }


def _soup(record: TrialRecord) -> dict[str, Any]:
    ingredients = record.note.removeprefix("soup of ").split(", ")
    return {
        "trial_id": record.trial_id,
        "title": record.config.title,
        "of": ingredients,
        "val": record.value,
    }


def _described(study: Study, names: Sequence[str], test: Predictions) -> dict[str, Any]:
    """What the submission says: its rows, and how many of them are of each class, by name."""
    counts = np.bincount(test.probs.argmax(1), minlength=len(names)).tolist()
    given = [{"class": c, "name": n, "rows": k} for c, n, k in zip(test.classes, names, counts, strict=True)]
    return {"file": study.submission_file.name, "rows": len(test.ids), "classes": given}


def _audit(study: Study, metric: str, ensembled: Predictions, single: str) -> dict[str, Any]:
    """The one look at audit: ensemble, best single trial and competitor's recipe, with 95 % intervals."""
    labels = study.labels("audit")
    truth = np.array(list(labels.values()))
    probs = {"ensemble": ensembled.aligned(list(labels)).probs}
    recipe = next((r.trial_id for r in study.leaderboard() if r.note.startswith(RECIPE)), None)
    named = {"single": single} | ({"recipe": recipe} if recipe else {})
    for name, trial_id in named.items():
        probs[name] = study.predictions(trial_id, "audit").aligned(list(labels)).probs
    scores: dict[str, Any] = {name: asdict(interval(metric, p, truth)) for name, p in probs.items()}
    for name in named:
        scores[f"gain_over_{name}"] = asdict(paired_gain(metric, probs["ensemble"], probs[name], truth))
    looks = 1 + (read_json(study.ensemble_file)["audit"]["looks"] if study.ensemble_file.is_file() else 0)
    return {**scores, "pictures": len(truth), "looks": looks}


def _expected(study: Study, metric: str, audit: Predictions, pictures: int) -> dict[str, Any]:
    """What the submission is going to score: a 95 % prediction interval, from audit alone."""
    labels = study.labels("audit")
    truth = np.array(list(labels.values()))
    found = hidden_score(metric, audit.aligned(list(labels)).probs, truth, pictures)
    return {**asdict(found), "pictures": pictures}


def interval(metric: str, probs: np.ndarray, labels: np.ndarray) -> Interval:
    """95 %: Wilson's for accuracy, which holds near 1 as well; by bootstrap for the other metrics."""
    return accuracy_interval(probs, labels) if metric == "accuracy" else score_interval(metric, probs, labels)

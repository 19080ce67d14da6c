"""The last stage: members, views and temperatures by val, one score on holdout, ensemble.json, submission."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from carmodels.catalog import VIEWS
from carmodels.ensembling.selection import Selection, select_ensemble
from carmodels.evaluation.calibration import fit_temperature, with_temperature
from carmodels.evaluation.intervals import paired_gain, score_interval, score_prediction_interval
from carmodels.evaluation.metrics import METRICS
from carmodels.evaluation.nested import Nested, nested_check
from carmodels.evaluation.predictions import Predictions, blend
from carmodels.files import read_json, write_json
from carmodels.models.classifier import weights_damage
from carmodels.records import FOLDS, TRAIN_SPLIT_STAGES, TrialRecord
from carmodels.study import Study
from carmodels.submission import write_submission
from tune.budget.clock import Clock
from tune.finalize import folds, soups
from tune.finalize.views import MOST_VIEWS, Members, Paces, judge_views
from tune.runtime.job import Job, Say
from tune.runtime.recorder import WEIGHTS_KEPT

SOUP_SHARE = 0.3  # of the time that is left, after which no further soup is tried
MOST_MEMBERS = 8  # of `select_ensemble`
_STARTS, _START = 5, 10.0  # tasks of a member, for timing it, each split and soups; seconds until one works
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
    """Choose members, views and temperatures on val, score once on holdout, write ensemble and submission.

    `max_seconds` is what all members with all views may take one worker for 1,000 images.
    """
    study, labels = job.study, job.study.labels("val")
    ready = _with_weights(study, say)
    trained = _trained(study, ready, top)
    _restore(job, list({*trained, *(r for r in ready if r.baseline)}), say)
    paces = Paces(job)
    folds.restore(job)
    folds.gather(study)
    whole = folds.ready(study)
    for record in study.records():
        if record.stage == FOLDS and record not in whole:
            name = f"{record.trial_id}, {record.origin.folds} folds of {record.repeats}"
            say(f"Left out: {name}: the weights of some are lost.")
    folded = _affordable(whole, paces, max_seconds)
    _, on, _ = folds.judged_on(study, trained, folded)  # where it is out of fold, folds alone are chosen from
    cooked = soups.cook(job, trained, until=time.time() + SOUP_SHARE * clock.left) if on == "val" else []
    for record in cooked:
        say(f"Soup {record.trial_id}: {record.reason}, {record.config.title}; val {record.value:.4f}.")
    candidates, on, asked = folds.judged_on(study, [*trained, *cooked], folded)
    _restore(job, candidates, say)
    paces.measure(record.run for record in candidates)
    library = Library.of(study, candidates, on, asked, paces, max_seconds)
    chosen = library.choose(until=time.time() + CHECK_SHARE * clock.left)
    say(f"{chosen.sentence}.")
    records = {r.trial_id: r for r in [*trained, *candidates]}
    members = Members(
        job, {records[i]: w for i, w in chosen.weights.items()}, library.temperatures(library.all_rows)
    )
    verdict = judge_views(members, labels, limit=views, seconds=clock.left, paces=paces, max_cost=max_seconds)
    for line in (*(f"  {line}" for line in verdict.lines), f"Test-time augmentation: {verdict.sentence}"):
        say(f"{line}.")
    blended, temperature = _answers(members, verdict.views, labels)
    truth = np.array(list(labels.values()))
    best = library.best_of([r.trial_id for r in trained]) if on == "val" else trained[0].trial_id
    single = records[best]
    results = {
        "metric": study.metric,
        "members": [
            described
            for record, weight in members.weights.items()
            for described in _described_members(study, record, weight, chosen.gains, members, library)
        ],
        "temperature": temperature,
        "tta": asdict(verdict),
        "nested": {**asdict(chosen.check), "gain": chosen.check.gain, "sentence": chosen.sentence},
        "soups": [_soup(record) for record in cooked],
        "cost": {
            "seconds_per_1000": sum(members.costs(paces, verdict.views).values()),
            "most": max_seconds,
            "device": job.workers.device,
            "cores": job.workers.cpus,
        },
        "val": {
            "ensemble": METRICS[study.metric].score(blended["val"].aligned(list(labels)).probs, truth),
            "single": {"trial_id": single.trial_id, "value": single.value},
        },
        "holdout": _holdout(study, study.metric, blended["holdout"], single.trial_id),
        **_submitted(job, blended),
    }
    study.thumbnails_file.unlink(missing_ok=True)  # of the mistakes of the ensemble before
    write_json(study.ensemble_file, results)
    study.write_table()
    return results


def most_seconds(job: Job, folds: int = 0) -> float:
    """What the ensemble takes at most, by the costs of the dearest of the best trials; infinite without.

    With `folds`, of which each member has so many models: only one of them sees an image of val.
    """
    study, splits, costs = job.study, job.splits, job.costs
    best = [r.config for r in study.leaderboard() if r.stage == "search"][:MOST_MEMBERS]
    if not best or costs is None:
        return math.inf
    image = max(costs.tested(config) for config in best)
    later = (len(splits.holdout) + len(splits.test)) * MOST_VIEWS * (folds or 1)
    images = len(splits.val) * len(VIEWS) + later
    return MOST_MEMBERS * (image * images + _STARTS * _START) / job.workers.count


def _answers(
    members: Members, views: Sequence[str], labels: Mapping[str, int]
) -> tuple[dict[str, Predictions], float]:
    """The ensemble's probabilities of each split, which are kept, and their temperature, fitted on val."""
    splits, study = members.job.splits, members.job.study
    models = _models(members)
    found = {"val": members.blended("val", views)}
    found |= {s.name: models.blended(s.name, views) for s in (splits.holdout, splits.test) if len(s)}
    truth = np.array(list(labels.values()))
    temperature = fit_temperature(found["val"].aligned(list(labels)).probs, truth)
    if all(record.stage == FOLDS for record in members.weights):
        # On val one model of each member answers, on other images the mean of all its folds, which is less
        # sure: what fits the one does not fit the other. Each model has a temperature of its own already.
        temperature = 1.0
    blended = {split: with_temperature(predictions, temperature) for split, predictions in found.items()}
    for split, predictions in blended.items():
        predictions.save(study.predictions_file("ensemble", split))
    return blended, temperature


def _models(members: Members) -> Members:
    """Each model by itself, those of folds too, with its member's temperature: as in the exported network."""
    models: dict[TrialRecord, float] = {}
    temperatures: dict[str, float] = {}
    for record, weight in members.weights.items():
        of = folds.models_of(members.job.study, record)
        models |= dict.fromkeys(of, weight / len(of))
        temperatures |= dict.fromkeys((one.trial_id for one in of), members.temperatures[record.trial_id])
    return Members(members.job, models, temperatures)


def _submitted(job: Job, blended: Mapping[str, Predictions]) -> dict[str, Any]:
    """Write the submission, and say what it holds and is going to score; nothing without test images."""
    if "test" not in blended:
        return {}
    study, test = job.study, blended["test"]
    write_submission(test, study.submission_file, sample=job.splits.sample_file)
    return {
        "submission": _described(study, job.splits.class_names, test),
        "hidden": _expected(study, study.metric, blended["holdout"], len(test.ids)),
    }


def _trained(study: Study, ready: Sequence[TrialRecord], top: int) -> list[TrialRecord]:
    """The best `top` trials of the search and all later runs, of what is ready, best first."""
    searched = [r for r in ready if r.stage == "search"][:top]
    found = [r for r in ready if r in searched or (r.stage in TRAIN_SPLIT_STAGES and r.stage != "search")]
    if not found:
        raise ValueError(f"{study.folder} has no finished trial to make a submission from; --resume goes on")
    return found


def _with_weights(study: Study, say: Say) -> list[TrialRecord]:
    """Finished runs whose weights are there and intact, best first."""
    there = [r for r in study.leaderboard() if study.weights_file(r.trial_id).is_file()]
    damaged = {r.trial_id: d for r in there if (d := weights_damage(study.weights_file(r.trial_id)))}
    for trial_id, damage in damaged.items():
        say(f"Left out: {study.weights_file(trial_id)} is damaged ({damage}); bring a copy back.")
    return [r for r in there if r.trial_id not in damaged]


def _affordable(records: Sequence[TrialRecord], paces: Paces, most: float) -> list[TrialRecord]:
    """Those that take one worker at most so many seconds for 1,000 images."""
    paces.measure(record.run for record in records)
    return [record for record in records if 1000 * paces.of(record.run) <= most]


def _restore(job: Job, records: Sequence[TrialRecord], say: Say) -> None:
    """Make probabilities that are missing or damaged anew, from the weights."""
    for split in ("val", "holdout"):
        for file in Members(job, dict.fromkeys(records, 1.0), {}).show(split, ("plain",)):
            say(f"{file} was damaged, it is made anew from the weights.")


@dataclass(frozen=True)
class Chosen:
    """Who is in the ensemble, and why."""

    weights: Mapping[str, float]  # by trial id
    gains: Mapping[str, float]  # as in `Selection`
    check: Nested
    sentence: str


@dataclass(frozen=True)
class Library:
    """What an ensemble is chosen from, and by."""

    metric: str
    probs: Mapping[str, Predictions]  # by trial id, rows in the order of truth
    truth: np.ndarray  # (N,)
    costs: Mapping[str, float]  # seconds for 1,000 images
    max_cost: float

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
        costs = {r.trial_id: 1000 * paces.of(r.run) for r in candidates}
        if min(costs.values()) > max_cost:
            raise ValueError(
                f"--max-seconds-per-1000 {max_cost:g} is less than the fastest candidate takes here, "
                f"{min(costs.values()):.2f} s; allow more"
            )
        probs = {r.trial_id: study.predictions(r.trial_id, on).aligned(list(labels)) for r in candidates}
        return cls(study.metric, probs, np.array(list(labels.values())), costs, max_cost)

    @property
    def all_rows(self) -> np.ndarray:
        return np.arange(len(self.truth))

    def choose(self, until: float) -> Chosen:
        """The ensemble, or the best model alone where choosing one does not help on other images."""
        found, check = self.select(self.all_rows), self.check(until)
        alone = {found.single: 1.0}
        return Chosen(
            weights=found.weights if check.helps else alone,
            gains=found.gains if check.helps else dict.fromkeys(alone, 0.0),
            check=check,
            sentence=_sentence(found, check),
        )

    def temperatures(self, rows: np.ndarray) -> dict[str, float]:
        """Each model's temperature, fitted on these rows; that of folds is of each of their models."""
        return {name: fit_temperature(p.probs[rows], self.truth[rows]) for name, p in self.probs.items()}

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
        """Whether choosing an ensemble on one half of the images beats the best one on the other."""

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


def _described_members(
    study: Study,
    record: TrialRecord,
    weight: float,
    gains: Mapping[str, float],
    members: Members,
    library: Library,
) -> list[dict[str, Any]]:
    """The models of what was chosen: that itself, or its folds, which share what there is to it."""
    models = folds.models_of(study, record)
    return [
        {
            "trial_id": one.trial_id,
            "title": one.config.title,
            "stage": one.stage,
            "weight": weight / len(models),
            "gain": gains[record.trial_id] / len(models),
            "val": record.value,
            "temperature": members.temperatures[record.trial_id],
            "seconds_per_1000": library.costs[record.trial_id] / len(models),
        }
        for one in models
    ]


def _soup(record: TrialRecord) -> dict[str, Any]:
    return {
        "trial_id": record.trial_id,
        "title": record.config.title,
        "of": list(record.ingredients),
        "val": record.value,
    }


def _described(study: Study, names: Sequence[str], test: Predictions) -> dict[str, Any]:
    """What the submission says: its rows, and how many of them are of each class, by name."""
    counts = np.bincount(test.probs.argmax(1), minlength=len(names)).tolist()
    given = [{"class": c, "name": n, "rows": k} for c, n, k in zip(test.classes, names, counts, strict=True)]
    return {"file": study.submission_file.name, "rows": len(test.ids), "classes": given}


def _holdout(study: Study, metric: str, ensembled: Predictions, single: str) -> dict[str, Any]:
    """The one look at holdout: ensemble, best single trial and baseline, with 95 % intervals."""
    labels = study.labels("holdout")
    truth = np.array(list(labels.values()))
    probs = {"ensemble": ensembled.aligned(list(labels)).probs}
    baselines = (r.trial_id for r in study.leaderboard() if r.baseline)
    baseline = next((name for name in baselines if study.has_predictions(name, "holdout")), None)
    named = {"single": single} | ({"baseline": baseline} if baseline else {})
    for name, trial_id in named.items():
        probs[name], _ = study.probs_and_labels(trial_id, "holdout")
    scores: dict[str, Any] = {name: asdict(score_interval(metric, p, truth)) for name, p in probs.items()}
    for name in named:
        scores[f"gain_over_{name}"] = asdict(paired_gain(metric, probs["ensemble"], probs[name], truth))
    looks = 1 + (read_json(study.ensemble_file)["holdout"]["looks"] if study.ensemble_file.is_file() else 0)
    return {**scores, "images": len(truth), "looks": looks}


def _expected(study: Study, metric: str, holdout: Predictions, images: int) -> dict[str, Any]:
    """What the submission is going to score: a 95 % prediction interval, from holdout alone."""
    labels = study.labels("holdout")
    truth = np.array(list(labels.values()))
    found = score_prediction_interval(metric, holdout.aligned(list(labels)).probs, truth, images)
    return {**asdict(found), "images": images}

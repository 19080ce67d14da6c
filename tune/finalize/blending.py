"""The last stage: choose an ensemble on val, score it once on holdout, write results and submission."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from carmodels.catalog import VIEWS
from carmodels.ensembling.selection import Selection, select_ensemble
from carmodels.evaluation.calibration import apply_temperature, fit_temperature, with_temperature
from carmodels.evaluation.intervals import paired_gain, score_interval, score_prediction_interval
from carmodels.evaluation.metrics import METRICS
from carmodels.evaluation.nested import NestedCheck, nested_check
from carmodels.evaluation.predictions import Predictions, blend
from carmodels.files import write_json
from carmodels.holdout import add_look
from carmodels.models.classifier import weights_damage
from carmodels.records import FOLDS, TRAIN_SPLIT_STAGES, TrialRecord
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from carmodels.submission import write_submission
from tune.budget.clock import Clock
from tune.budget.stages import MOST_VIEWS, WEIGHTS_KEPT
from tune.finalize import folds, soups
from tune.finalize.views import EnsembleMembers, PredictionTimes, select_tta_views
from tune.runtime.job import Job, Say

SOUP_SHARE = 0.3  # of the remaining time, for making soups
MOST_MEMBERS = 8  # as in `select_ensemble`
_TASKS_PER_MEMBER = 5  # timing, one per split, soups
_TASK_START_SECONDS = 10.0
CHECK_SHARE = 0.2  # of the remaining time, for repeats of the nested check


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

    `top`: trials of the search to choose from; `views`: most views per image; `max_seconds`: limit for 1,000
    images on one worker, all members and views. Returns the content of ensemble.json.
    """
    study, labels = job.study, job.study.labels("val")
    intact = _with_intact_weights(study, say)
    trained = _candidates(study, intact, top)
    _recompute_predictions(job, list({*trained, *(r for r in intact if r.baseline)}), say)
    times = PredictionTimes(job)
    fold_sets = _within_cost(_fold_sets(job, say), times, max_seconds)
    _, split, _ = folds.ensemble_candidates(study, trained, fold_sets)
    until = steady_time() + SOUP_SHARE * clock.left
    new_soups = soups.make_soups(job, trained, until=until) if split == "val" else []  # else only fold sets
    for record in new_soups:
        say(f"Soup {record.trial_id}: {record.reason}, {record.config.title}; val {record.value:.4f}.")
    candidates, split, split_labels = folds.ensemble_candidates(study, [*trained, *new_soups], fold_sets)
    _recompute_predictions(job, candidates, say)
    times.measure(record.run for record in candidates)
    library = ModelLibrary.from_study(study, candidates, split, split_labels, times, max_seconds)
    chosen = library.choose(until=steady_time() + CHECK_SHARE * clock.left)
    say(f"{chosen.sentence}.")
    records = {r.trial_id: r for r in [*trained, *candidates]}
    members = EnsembleMembers(
        job, {records[i]: w for i, w in chosen.weights.items()}, library.temperatures(library.all_rows)
    )
    verdict = select_tta_views(
        members, labels, limit=views, seconds=clock.left, times=times, max_cost=max_seconds
    )
    for line in (*(f"  {line}" for line in verdict.lines), f"Test-time augmentation: {verdict.sentence}"):
        say(f"{line}.")
    blended, temperature = _save_blended(members, verdict.views, labels)
    truth = np.array(list(labels.values()))
    single = library.best_single([r.trial_id for r in trained]) if split == "val" else trained[0].trial_id
    results = {
        "metric": study.metric,
        "members": [
            row
            for record, weight in members.weights.items()
            for row in _member_rows(study, record, weight, chosen.gains, members, library)
        ],
        "temperature": temperature,
        "tta": asdict(verdict),
        "nested": {**asdict(chosen.check), "gain": chosen.check.gain, "sentence": chosen.sentence},
        "soups": [_soup_row(record) for record in new_soups],
        "cost": {
            "seconds_per_1000": sum(members.costs(times, verdict.views).values()),
            "most": max_seconds,
            "device": job.workers.device,
            "cores": job.workers.cpus,
        },
        "val": {
            "ensemble": METRICS[study.metric].score(blended["val"].aligned(list(labels)).probs, truth),
            "single": {
                "trial_id": single,
                "value": METRICS[study.metric].score(_calibrated(study, single, "val"), truth),
            },
        },
        "holdout": _holdout_results(study, blended["holdout"], single),
        **_submission_results(job, blended),
    }
    study.thumbnails_file.unlink(missing_ok=True)  # shows the mistakes of the previous ensemble
    results["holdout"]["looks"] = add_look(study, "ensemble", results).number
    write_json(study.ensemble_file, results)
    study.write_table()
    return results


def ensemble_seconds(job: Job, folds: int = 0) -> float:
    """Upper bound on the seconds of this stage, from the slowest of the best trials; infinite without any.

    `folds`: models per member. Only one of them predicts a val image.
    """
    study, splits, costs = job.study, job.splits, job.costs
    best = [r.config for r in study.leaderboard() if r.stage == "search"][:MOST_MEMBERS]
    if not best or costs is None:
        return math.inf
    image = max(costs.inference(config) for config in best)
    later = (len(splits.holdout) + len(splits.test)) * MOST_VIEWS * (folds or 1)
    images = len(splits.val) * len(VIEWS) + later
    return MOST_MEMBERS * (image * images + _TASKS_PER_MEMBER * _TASK_START_SECONDS) / job.workers.count


def _fold_sets(job: Job, say: Say) -> list[TrialRecord]:
    """The usable fold sets, best first, their predictions recomputed if lost. Reports unusable ones."""
    folds.recompute_fold_predictions(job)
    folds.record_complete_folds(job.study)
    usable = folds.usable_fold_sets(job.study)
    for record in job.study.records():
        if record.stage == FOLDS and record not in usable:
            name = f"{record.trial_id}, {record.origin.folds} folds of {record.repeats}"
            say(f"Left out: {name}: the weights of some are lost.")
    return usable


def _save_blended(
    members: EnsembleMembers, views: Sequence[str], labels: Mapping[str, int]
) -> tuple[dict[str, Predictions], float]:
    """Save the ensemble's predictions; (predictions by split, their temperature, fitted on val)."""
    splits, study = members.job.splits, members.job.study
    models = _single_models(members)
    raw = {"val": members.blended("val", views)}
    raw |= {s.name: models.blended(s.name, views) for s in (splits.holdout, splits.test) if len(s)}
    truth = np.array(list(labels.values()))
    temperature = fit_temperature(raw["val"].aligned(list(labels)).probs, truth)
    if all(record.stage == FOLDS for record in members.weights):
        # One model per member predicts a val image, the mean of all its folds any other. The mean is less
        # confident, so val's temperature does not fit it. Each model has its own temperature already.
        temperature = 1.0
    blended = {split: with_temperature(predictions, temperature) for split, predictions in raw.items()}
    for split, predictions in blended.items():
        predictions.save(study.predictions_file("ensemble", split))
    return blended, temperature


def _single_models(members: EnsembleMembers) -> EnsembleMembers:
    """Fold sets replaced by their models, each with its member's temperature, as in the exported network."""
    models: dict[TrialRecord, float] = {}
    temperatures: dict[str, float] = {}
    for record, weight in members.weights.items():
        temperature = members.temperatures[record.trial_id]
        parts = folds.member_models(members.job.study, record)
        models |= dict.fromkeys(parts, weight / len(parts))
        temperatures |= dict.fromkeys((part.trial_id for part in parts), temperature)
    return EnsembleMembers(members.job, models, temperatures)


def _submission_results(job: Job, blended: Mapping[str, Predictions]) -> dict[str, Any]:
    """Write the submission; its summary and expected score, or nothing without test images."""
    if "test" not in blended:
        return {}
    study, test = job.study, blended["test"]
    write_submission(test, study.submission_file, sample=job.splits.sample_file)
    return {
        "submission": _submission_summary(study, job.splits.class_names, test),
        "hidden": _expected_test_score(study, blended["holdout"], len(test.ids)),
    }


def _candidates(study: Study, records: Sequence[TrialRecord], top: int) -> list[TrialRecord]:
    """The best `top` trials of the search and all reruns and retrained runs; `records` is best first."""
    searched = [r for r in records if r.stage == "search"][:top]
    later = [stage for stage in TRAIN_SPLIT_STAGES if stage != "search"]
    candidates = [r for r in records if r in searched or r.stage in later]
    if not candidates:
        raise ValueError(f"{study.folder} has no finished trial to make a submission from; --resume goes on")
    return candidates


def _with_intact_weights(study: Study, say: Say) -> list[TrialRecord]:
    """Complete runs with intact weights, best first. Reports damaged ones."""
    saved = [r for r in study.leaderboard() if study.weights_file(r.trial_id).is_file()]
    damaged = {r.trial_id: d for r in saved if (d := weights_damage(study.weights_file(r.trial_id)))}
    for trial_id, damage in damaged.items():
        say(f"Left out: {study.weights_file(trial_id)} is damaged ({damage}); bring a copy back.")
    return [r for r in saved if r.trial_id not in damaged]


def _within_cost(
    records: Sequence[TrialRecord], times: PredictionTimes, max_cost: float
) -> list[TrialRecord]:
    """The records that take one worker at most `max_cost` seconds for 1,000 images."""
    times.measure(record.run for record in records)
    return [record for record in records if 1000 * times.seconds_per_image(record.run) <= max_cost]


def _recompute_predictions(job: Job, records: Sequence[TrialRecord], say: Say) -> None:
    """Recompute missing or damaged predictions from the weights. Reports damaged files."""
    for split in ("val", "holdout"):
        for file in EnsembleMembers(job, dict.fromkeys(records, 1.0), {}).predict_missing(split, ("plain",)):
            say(f"{file} was damaged, it is made again from the weights.")


@dataclass(frozen=True)
class EnsembleChoice:
    """The members of the ensemble, and the evidence."""

    weights: Mapping[str, float]  # by trial id
    gains: Mapping[str, float]  # as in `Selection`
    check: NestedCheck
    sentence: str


@dataclass(frozen=True)
class ModelLibrary:
    """The candidates of an ensemble with their predictions and costs, and the labels to choose by."""

    metric: str
    probs: Mapping[str, Predictions]  # by trial id, rows in the order of truth
    truth: np.ndarray  # (N,)
    groups: np.ndarray  # (N,) of near-duplicates
    costs: Mapping[str, float]  # seconds for 1,000 images
    max_cost: float

    @classmethod
    def from_study(
        cls,
        study: Study,
        candidates: Sequence[TrialRecord],
        split: str,
        labels: Mapping[str, int],
        times: PredictionTimes,
        max_cost: float,
    ) -> ModelLibrary:
        """The candidates' predictions for a split; ValueError if none is cheap enough."""
        costs = {r.trial_id: 1000 * times.seconds_per_image(r.run) for r in candidates}
        if min(costs.values()) > max_cost:
            raise ValueError(
                f"--max-seconds-per-1000 {max_cost:g} is less than the fastest candidate takes here, "
                f"{min(costs.values()):.2f} s; allow more"
            )
        probs = {r.trial_id: study.predictions(r.trial_id, split).aligned(list(labels)) for r in candidates}
        truth = np.array(list(labels.values()))
        return cls(study.metric, probs, truth, study.groups(labels), costs, max_cost)

    @property
    def all_rows(self) -> np.ndarray:
        return np.arange(len(self.truth))

    def choose(self, until: float) -> EnsembleChoice:
        """The ensemble, or the best model alone if the nested check shows no gain."""
        selection, check = self.select(self.all_rows), self.check(until)
        single = {selection.single: 1.0}
        return EnsembleChoice(
            weights=selection.weights if check.helps else single,
            gains=selection.gains if check.helps else dict.fromkeys(single, 0.0),
            check=check,
            sentence=_sentence(selection, check),
        )

    def temperatures(self, rows: np.ndarray) -> dict[str, float]:
        """Each candidate's temperature, fitted on these rows. All models of a fold set share one."""
        return {name: fit_temperature(p.probs[rows], self.truth[rows]) for name, p in self.probs.items()}

    def tempered(self, rows: np.ndarray) -> dict[str, Predictions]:
        """Calibrated predictions of all rows, with temperatures fitted on `rows`."""
        temperatures = self.temperatures(rows)
        return {name: with_temperature(p, temperatures[name]) for name, p in self.probs.items()}

    def select(self, rows: np.ndarray) -> Selection:
        """The ensemble chosen on these rows alone."""
        return self._selected(self.tempered(rows), rows)

    def _selected(self, tempered: Mapping[str, Predictions], rows: np.ndarray) -> Selection:
        part = {name: p.take(rows) for name, p in tempered.items()}
        return select_ensemble(
            part, self.truth[rows], metric=self.metric, costs=self.costs, max_cost=self.max_cost
        )

    def check(self, until: float) -> NestedCheck:
        """Nested check: an ensemble chosen on half of the rows against the best model, on the rest."""

        def choose(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            tempered = self.tempered(rows)
            selection = self._selected(tempered, rows)
            members = [tempered[name] for name in selection.weights]
            blended = blend(members, list(selection.weights.values()))
            return blended.probs, tempered[selection.single].probs

        return nested_check(choose, self.truth, metric=self.metric, groups=self.groups, until=until)

    def score(self, name: str) -> float:
        """A candidate's score alone, calibrated as in the ensemble."""
        return METRICS[self.metric].score(self.tempered(self.all_rows)[name].probs, self.truth)

    def best_single(self, names: Sequence[str]) -> str:
        """The best of the named candidates that are cheap enough, calibrated as in the ensemble."""
        tempered = self.tempered(self.all_rows)
        affordable = {name: tempered[name] for name in names if self.costs[name] <= self.max_cost}
        return select_ensemble(affordable, self.truth, metric=self.metric, rounds=0, max_members=1).single


def _sentence(selection: Selection, check: NestedCheck) -> str:
    """The decision and the nested check's scores in words."""
    halves = f"chosen on one half of val, the ensemble has {check.chosen:.4f} on the other, the best model "
    halves += f"{check.before:.4f} ({check.gain:+.4f}, mean of {len(check.gains)} cuts)"
    if len(selection.weights) == 1:
        return f"One model is the ensemble, no other helps on val; {halves}"
    return f"The ensemble is {'kept' if check.helps else 'left out for the best model'}: {halves}"


def _member_rows(
    study: Study,
    record: TrialRecord,
    weight: float,
    gains: Mapping[str, float],
    members: EnsembleMembers,
    library: ModelLibrary,
) -> list[dict[str, Any]]:
    """Rows of ensemble.json for one member. Each model of a fold set has a row with its share."""
    models = folds.member_models(study, record)
    return [
        {
            "trial_id": model.trial_id,
            "title": model.config.title,
            "stage": model.stage,
            "weight": weight / len(models),
            "gain": gains[record.trial_id] / len(models),
            "val": library.score(record.trial_id),
            "temperature": members.temperatures[record.trial_id],
            "seconds_per_1000": library.costs[record.trial_id] / len(models),
        }
        for model in models
    ]


def _soup_row(record: TrialRecord) -> dict[str, Any]:
    return {
        "trial_id": record.trial_id,
        "title": record.config.title,
        "of": list(record.ingredients),
        "val": record.value,
    }


def _submission_summary(study: Study, names: Sequence[str], test: Predictions) -> dict[str, Any]:
    """The submission's file name, number of rows and rows per predicted class."""
    counts = np.bincount(test.probs.argmax(1), minlength=len(names)).tolist()
    classes = [
        {"class": c, "name": n, "rows": k} for c, n, k in zip(test.classes, names, counts, strict=True)
    ]
    return {"file": study.submission_file.name, "rows": len(test.ids), "classes": classes}


def _holdout_results(study: Study, ensembled: Predictions, single: str) -> dict[str, Any]:
    """Holdout scores of ensemble, best single trial and baseline, with 95 % intervals."""
    labels = study.labels("holdout")
    truth = np.array(list(labels.values()))
    probs = {"ensemble": ensembled.aligned(list(labels)).probs}
    baselines = (r.trial_id for r in study.leaderboard() if r.baseline)
    scored = (b for b in baselines if all(study.has_predictions(b, split) for split in ("val", "holdout")))
    baseline = next(scored, None)
    metric, named = study.metric, {"single": single} | ({"baseline": baseline} if baseline else {})
    probs |= {name: _calibrated(study, trial_id, "holdout") for name, trial_id in named.items()}
    groups = study.groups(labels)
    scores: dict[str, Any] = {
        name: asdict(score_interval(metric, p, truth, groups=groups)) for name, p in probs.items()
    }
    for name in named:
        gain = paired_gain(metric, probs["ensemble"], probs[name], truth, groups=groups)
        scores[f"gain_over_{name}"] = asdict(gain)
    return {**scores, "images": len(truth)}


def _calibrated(study: Study, trial_id: str, split: str) -> np.ndarray:
    """A trial's probabilities (N, C), with the temperature that fits it on val, as the ensemble has one."""
    temperature = fit_temperature(*study.probs_and_labels(trial_id, "val"))
    probs, _ = study.probs_and_labels(trial_id, split)
    return apply_temperature(probs, temperature)


def _expected_test_score(study: Study, holdout: Predictions, images: int) -> dict[str, Any]:
    """The submission's expected score: a 95 % prediction interval from holdout."""
    labels = study.labels("holdout")
    truth = np.array(list(labels.values()))
    probs = holdout.aligned(list(labels)).probs
    interval = score_prediction_interval(study.metric, probs, truth, images, groups=study.groups(labels))
    return {**asdict(interval), "images": images}

"""Cross-validation: one configuration trained once per fold of train and val.

A fold set is all fold models of a configuration. It is one ensemble member with its own record. On train and
val it predicts out of fold: each image by the model that was not trained on it. On holdout and test it is the
mean of all fold models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from carmodels.data.dataset import Splits
from carmodels.data.resplit import hold_out_fold
from carmodels.data.splits import Split
from carmodels.evaluation.metrics import METRICS
from carmodels.evaluation.predictions import Predictions, blend
from carmodels.models.classifier import weights_damage
from carmodels.records import FOLD, FOLDS, State, TrialRecord
from carmodels.study import Study
from carmodels.training.held_out import splits_for
from carmodels.training.run import Run
from tune.optim.standings import standings_of
from tune.runtime.job import Job, as_task, results_of

MOST_FOLDED = 3  # configurations


def check_fold_count(splits: Splits, folds: int, seed: int) -> None:
    """Raises ValueError if a fold would have no images."""
    hold_out_fold(splits, folds=folds, fold=0, seed=seed)


def fold_runs(run: Run, folds: int) -> list[Run]:
    """One run per fold, without patience: the held-out fold never influences selection."""
    return [run.with_config(patience=0).with_origin(folds=folds, fold=fold) for fold in range(folds)]


def fold_set(run: Run) -> Run:
    """The run that identifies the fold set of a fold's run."""
    return run.with_origin(fold=None)


def fold_records(study: Study, run: Run) -> list[TrialRecord]:
    """The complete fold runs of the fold set `run`, in order of fold."""
    complete = (r for r in study.records() if r.stage == FOLD and r.state is State.COMPLETE)
    return sorted((r for r in complete if fold_set(r.run) == run), key=lambda r: r.origin.fold or 0)


def record_complete_folds(study: Study) -> list[TrialRecord]:
    """Record each complete fold set with its predictions; the new records.

    Its value is the out-of-fold score on val. A set is recorded again if one of its folds was trained again,
    or if its predictions are missing or damaged.
    """
    fold_sets: dict[Run, list[TrialRecord]] = defaultdict(list)
    for record in study.records():
        if record.stage == FOLD and record.state is State.COMPLETE:
            fold_sets[fold_set(record.run)].append(record)
    positions = {r.trial_id: position for position, r in enumerate(study.records())}

    def complete(run: Run, parts: Sequence[TrialRecord]) -> bool:
        predicted = all(study.has_predictions(r.trial_id, "oof") for r in parts)
        return len(parts) == run.origin.folds and predicted

    def outdated(run: Run, parts: Sequence[TrialRecord]) -> bool:
        retrained = positions.get(run.id, -1) < max(positions[r.trial_id] for r in parts)
        return retrained or not study.has_predictions(run.id, "oof")

    return [
        _record_fold_set(study, run)
        for run, parts in fold_sets.items()
        if complete(run, parts) and outdated(run, parts)
    ]


def recompute_fold_predictions(job: Job) -> None:
    """Recompute missing or damaged predictions of complete folds whose weights are intact."""
    study, splits = job.study, job.splits
    runs = [r for r in study.records() if r.stage == FOLD and r.state is State.COMPLETE]
    names = ["oof", *(name for name in ("holdout", "test") if len(getattr(splits, name)))]
    wanted = ((r, name) for r in runs if not weights_damage(study.weights_file(r.trial_id)) for name in names)
    missing = [(r, name) for r, name in wanted if not study.has_predictions(r.trial_id, name)]
    if not missing:
        return
    task = as_task(_predict_fold, job.workers)
    results = results_of([task.remote(job, run, name) for run, name in missing], "predicting with folds")
    for (run, name), predictions in zip(missing, results, strict=True):
        predictions.save(study.predictions_file(run.trial_id, name))


def _predict_fold(job: Job, run: TrialRecord, name: str) -> Predictions:
    """Predictions of one fold's model for the named split; `oof` is the held-out fold."""
    images = splits_for(run.origin, job.splits).val if name == "oof" else getattr(job.splits, name)
    return job.predict_again(run, images, ("plain",))[0]


def _record_fold_set(study: Study, run: Run) -> TrialRecord:
    parts, metric = fold_records(study, run), METRICS[study.metric]
    study.delete_predictions(run.id)
    on_val = study.labels("val")
    labels = study.labels("train") | on_val
    oof = concatenated([study.predictions(r.trial_id, "oof") for r in parts]).aligned(list(labels))
    val = Predictions(tuple(on_val), oof.classes, oof.probs[[name in on_val for name in labels]])
    by_split = {"oof": oof, "val": val}
    for split in ("holdout", "test"):
        if all(study.has_predictions(r.trial_id, split) for r in parts):
            by_split[split] = blend([study.predictions(r.trial_id, split) for r in parts])
    for split, predictions in by_split.items():
        predictions.save(study.predictions_file(run.id, split))
    score = metric.score(oof.probs, np.array(list(labels.values())))
    record = TrialRecord(
        trial_id=run.id,
        config=run.config,
        origin=run.origin,
        state=State.COMPLETE,
        epochs_run=parts[0].epochs_run,
        value=metric.score(val.probs, np.array([on_val[name] for name in val.ids])),
        seconds=0.0,  # the folds' records have them
        reason=f"all {run.origin.folds} folds are there",
        stage=FOLDS,
        repeats=parts[0].repeats,
        note=f"{len(parts)} folds of {parts[0].repeats}; out of fold on train and val {score:.4f}",
        at=max(r.at for r in parts),
    )
    study.append(record)
    return record


def concatenated(parts: Sequence[Predictions]) -> Predictions:
    """Predictions for different images as one."""
    ids = tuple(i for part in parts for i in part.ids)
    return Predictions(ids, parts[0].classes, np.concatenate([part.probs for part in parts]))


def usable_fold_sets(study: Study) -> list[TrialRecord]:
    """Fold sets whose folds all have intact weights, best first."""
    fold_sets = [r for r in study.leaderboard() if r.stage == FOLDS]
    return [
        r
        for r in fold_sets
        if study.has_predictions(r.trial_id, "oof")
        and len(runs := fold_records(study, r.run)) == r.origin.folds  # one may be training again
        and not any(weights_damage(study.weights_file(f.trial_id)) for f in runs)
    ]


def ensemble_candidates(
    study: Study, candidates: Sequence[TrialRecord], folded: Sequence[TrialRecord]
) -> tuple[list[TrialRecord], str, dict[str, int]]:
    """(ensemble candidates, the split to choose them on, that split's labels).

    If several configurations have fold sets and the best configuration is one of them, only the fold sets,
    chosen out of fold on train and val. Otherwise everything, chosen on val. `folded`: the usable fold sets.
    """
    parents, best = {record.repeats for record in folded}, standings_of(study)[:1]
    if len(parents) > 1 and best and best[0].record.trial_id in parents:
        return [*folded], "oof", study.labels("train") | study.labels("val")
    return [*candidates, *folded], "val", study.labels("val")


def member_models(study: Study, record: TrialRecord) -> list[TrialRecord]:
    """The records whose weights an ensemble member uses: its folds', or its own."""
    return fold_records(study, record.run) if record.stage == FOLDS else [record]


def predict_with_folds(job: Job, record: TrialRecord, split: str, views: Sequence[str]) -> list[Predictions]:
    """Predictions of a fold set for a split, one per view. On val each image by its out-of-fold model."""
    images: Split = getattr(job.splits, split)
    by_fold = []
    for run in fold_records(job.study, record.run):
        part = _held_out_images(job, run, images) if split == "val" else images
        if len(part):
            by_fold.append(job.predict_again(run, part, views))
    if split == "val":
        return [concatenated(parts).aligned(images.ids) for parts in zip(*by_fold, strict=True)]
    return [blend(parts) for parts in zip(*by_fold, strict=True)]


def _held_out_images(job: Job, run: TrialRecord, images: Split) -> Split:
    """The images that this fold's model was not trained on."""
    held_out = set(splits_for(run.origin, job.splits).val.ids)
    return images.subset(np.array([name in held_out for name in images.ids], bool))

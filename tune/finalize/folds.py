"""Folds: a configuration trained once for each part of train and val, which that run is then scored on.

The models of all folds are one member of an ensemble: on train and val each image has the answer of the
model that has not seen it, on holdout and test the mean of all. They are a record of their own in the study.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import ray

from carmodels.data.dataset import Splits
from carmodels.data.resplit import with_fold
from carmodels.data.splits import Split
from carmodels.evaluation.metrics import METRICS
from carmodels.evaluation.predictions import Predictions, blend
from carmodels.models.classifier import weights_damage
from carmodels.records import FOLD, FOLDS, State, TrialRecord
from carmodels.study import Study
from carmodels.training.held_out import splits_for
from carmodels.training.run import Run
from tune.optim.standings import judged
from tune.runtime.job import Job, as_task

MOST_FOLDED = 3  # configurations


def check_filled(splits: Splits, folds: int, seed: int) -> None:
    """Raises ValueError where the images do not fill so many folds."""
    with_fold(splits, folds=folds, fold=0, seed=seed)


def folds_of(run: Run, folds: int) -> list[Run]:
    """A run for each fold, without patience: the held-out fold never influences selection."""
    return [run.with_config(patience=0).with_origin(folds=folds, fold=fold) for fold in range(folds)]


def all_folds(run: Run) -> Run:
    """What the models of all folds together are called by."""
    return run.with_origin(fold=None)


def fold_records(study: Study, run: Run) -> list[TrialRecord]:
    """The complete runs of single folds, fold by fold, of what all of them together are called by."""
    found = [r for r in study.records() if r.stage == FOLD and r.state is State.COMPLETE]
    return sorted((r for r in found if all_folds(r.run) == run), key=lambda r: r.origin.fold or 0)


def gather(study: Study) -> list[TrialRecord]:
    """Write down each configuration whose folds are all finished, with its probabilities; those that are new.

    Its value is that of val, as for other trials, from answers of models that have not seen an image. It is
    new as well where one of its folds, cut short before, has been trained again since, or where its
    probabilities are missing or damaged.
    """
    found: dict[Run, list[TrialRecord]] = defaultdict(list)
    for record in study.records():
        if record.stage == FOLD and record.state is State.COMPLETE:
            found[all_folds(record.run)].append(record)
    places = {r.trial_id: place for place, r in enumerate(study.records())}

    def new(run: Run, parts: Sequence[TrialRecord]) -> bool:
        trained = places.get(run.id, -1) < max(places[r.trial_id] for r in parts)
        return trained or not study.has_predictions(run.id, "oof")

    def there(run: Run, parts: Sequence[TrialRecord]) -> bool:
        answered = all(study.has_predictions(r.trial_id, "oof") for r in parts)
        return len(parts) == run.origin.folds and answered

    return [_gathered(study, run) for run, parts in found.items() if there(run, parts) and new(run, parts)]


def restore(job: Job) -> None:
    """Make anew what finished folds with intact weights have said, where it was lost or damaged."""
    study, splits = job.study, job.splits
    runs = [r for r in study.records() if r.stage == FOLD and r.state is State.COMPLETE]
    names = ["oof", *(name for name in ("holdout", "test") if len(getattr(splits, name)))]
    wanted = ((r, name) for r in runs if not weights_damage(study.weights_file(r.trial_id)) for name in names)
    lost = [(r, name) for r, name in wanted if not study.has_predictions(r.trial_id, name)]
    if not lost:
        return
    task = as_task(_said, job.workers)
    for (run, name), said in zip(lost, ray.get([task.remote(job, *one) for one in lost]), strict=True):
        said.save(study.predictions_file(run.trial_id, name))


def _said(job: Job, run: TrialRecord, name: str) -> Predictions:
    images = splits_for(run.origin, job.splits).val if name == "oof" else getattr(job.splits, name)
    return job.predict_again(run, images, ("plain",))[0]


def _gathered(study: Study, run: Run) -> TrialRecord:
    parts, metric = fold_records(study, run), METRICS[study.metric]
    study.delete_predictions(run.id)
    on_val = study.labels("val")
    labels = study.labels("train") | on_val
    oof = joined([study.predictions(r.trial_id, "oof") for r in parts]).aligned(list(labels))
    val = Predictions(tuple(on_val), oof.classes, oof.probs[[name in on_val for name in labels]])
    answers = {"oof": oof, "val": val}
    for split in ("holdout", "test"):
        if all(study.has_predictions(r.trial_id, split) for r in parts):
            answers[split] = blend([study.predictions(r.trial_id, split) for r in parts])
    for split, predictions in answers.items():
        predictions.save(study.predictions_file(run.id, split))
    score = metric.score(oof.probs, np.array(list(labels.values())))
    record = TrialRecord(
        trial_id=run.id,
        config=run.config,
        origin=run.origin,
        state=State.COMPLETE,
        epochs_run=parts[0].epochs_run,
        value=metric.score(val.probs, np.array([on_val[name] for name in val.ids])),
        seconds=0.0,  # those of its folds are theirs
        reason=f"all {run.origin.folds} folds are there",
        stage=FOLDS,
        repeats=parts[0].repeats,
        note=f"{len(parts)} folds of {parts[0].repeats}; out of fold on train and val {score:.4f}",
        at=max(r.at for r in parts),
    )
    study.append(record)
    return record


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of different images as one."""
    ids = tuple(i for part in parts for i in part.ids)
    return Predictions(ids, parts[0].classes, np.concatenate([part.probs for part in parts]))


def ready(study: Study) -> list[TrialRecord]:
    """Configurations whose folds have all left their weights, and intact, best first."""
    found = [r for r in study.leaderboard() if r.stage == FOLDS]
    return [
        r
        for r in found
        if study.has_predictions(r.trial_id, "oof")
        and len(runs := fold_records(study, r.run)) == r.origin.folds  # one may be in training once more
        and not any(weights_damage(study.weights_file(f.trial_id)) for f in runs)
    ]


def judged_on(
    study: Study, candidates: Sequence[TrialRecord], folded: Sequence[TrialRecord]
) -> tuple[list[TrialRecord], str, dict[str, int]]:
    """The candidates of an ensemble, the split that it is chosen on, and the labels there.

    Where several configurations have folds, the best one, too, these alone, on all of train and val; else on
    val, with what each image's own fold says of it. `folded`: those that are ready and not too dear.
    """
    parents, best = {record.repeats for record in folded}, judged(study)[:1]
    if len(parents) > 1 and best and best[0].record.trial_id in parents:
        return [*folded], "oof", study.labels("train") | study.labels("val")
    return [*candidates, *folded], "val", study.labels("val")


def models_of(study: Study, record: TrialRecord) -> list[TrialRecord]:
    """The records whose weights a member of an ensemble has: its folds, or itself."""
    return fold_records(study, record.run) if record.stage == FOLDS else [record]


def shown(job: Job, record: TrialRecord, split: str, views: Sequence[str]) -> list[Predictions]:
    """What the models of all folds say of a split through each view: on val each of its own fold alone."""
    images: Split = getattr(job.splits, split)
    said = []
    for run in fold_records(job.study, record.run):
        own = _held_out(job, run, images) if split == "val" else images
        if len(own):
            said.append(job.predict_again(run, own, views))
    if split == "val":
        return [joined(parts).aligned(images.ids) for parts in zip(*said, strict=True)]
    return [blend(parts) for parts in zip(*said, strict=True)]


def _held_out(job: Job, run: TrialRecord, images: Split) -> Split:
    """Those of the images that one fold's model has not learnt from."""
    held_out = set(splits_for(run.origin, job.splits).val.ids)
    return images.part(np.array([name in held_out for name in images.ids], bool))

"""Weight soups of a study's models: each is a record of its own, and a further candidate for the ensemble."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Hashable, Sequence

import ray
import torch

from carmodels.ensembling.soup import Ingredient, greedy_soup, soup_key
from carmodels.evaluation.metrics import METRICS
from carmodels.models.classifier import save_weights, weights_damage
from carmodels.records import State, TrialRecord
from tune.runtime.job import Job, as_task

STAGE = "soup"
MOST = 8  # models that a soup is tried from


def cook(job: Job, candidates: Sequence[TrialRecord], *, until: float) -> list[TrialRecord]:
    """The soups of these trained models, best first; those that are there, and whole, are not made again.

    Kinds side by side, until `until`, time.time(). A new soup is written down like a trial, under an id of
    its own: record, weights and probabilities.
    """
    study = job.study
    there = {r.trial_id: r for r in study.records() if not weights_damage(study.weights_file(r.trial_id))}
    groups = {soup_id(group): group for group in _kinds(candidates)}
    whole = {name for name, record in there.items() if not record.cut_short or time.time() > until}
    missing = {name: group for name, group in groups.items() if name not in whole}
    task = as_task(_cook, job.workers)
    for record in ray.get([task.remote(job, *item, until) for item in missing.items()]):
        if record is not None:
            study.append(record)
            there[record.trial_id] = record
    return [there[name] for name in groups if name in there]


def soup_id(candidates: Sequence[TrialRecord]) -> str:
    """12 hex digits of what a soup is tried from."""
    content = " ".join([STAGE, *(record.trial_id for record in candidates)])
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _kinds(candidates: Sequence[TrialRecord]) -> list[list[TrialRecord]]:
    """The best few of each kind of which there are two at least."""
    found: dict[Hashable, list[TrialRecord]] = defaultdict(list)
    for record in candidates:
        if (key := soup_key(record.run)) is not None:
            found[key].append(record)
    return [group[:MOST] for group in found.values() if len(group) > 1]


def _cook(job: Job, name: str, group: Sequence[TrialRecord], until: float) -> TrialRecord | None:
    """The soup of one kind, in a worker, with what it leaves in the study; None where none is better."""
    job.workers.take()
    started = time.time()
    study, splits, workers = job.study, job.splits, job.workers
    ingredients = [
        Ingredient(r.trial_id, r.run, study.weights_file(r.trial_id), study.predictions(r.trial_id, "val"))
        for r in group
    ]
    try:
        soup = greedy_soup(
            ingredients, splits, device=workers.device, processes=workers.processes, until=until
        )
    except torch.OutOfMemoryError:  # of BatchNorm's pass over whole batches
        return None
    if soup is None:
        return None
    config = group[0].config
    soup.val.save(study.predictions_file(name, "val"))
    for split in (splits.holdout, splits.test):
        if len(split):
            job.predict(soup.model, config, split).save(study.predictions_file(name, split.name))
    save_weights(soup.model, study.weights_file(name))
    assert splits.val.labels is not None
    members = tuple(ingredient.trial_id for ingredient in soup.ingredients)
    cut_short = soup.tried < len(group)
    cut = f", the time was up after {soup.tried} of them" if cut_short else ""
    return TrialRecord(
        trial_id=name,
        config=config,
        origin=group[0].origin,
        state=State.COMPLETE,
        cut_short=cut_short,
        epochs_run=0,
        value=METRICS[study.metric].score(soup.val.aligned(splits.val.ids).probs, splits.val.labels),
        seconds=time.time() - started,
        reason=f"the mean of the weights of {len(soup.ingredients)} models of {len(group)}{cut}",
        stage=STAGE,
        ingredients=members,
        note=f"soup of {', '.join(members)}",
    )

"""Weight soups of a study's models. Each has its own record and is a candidate for the ensemble."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

from carmodels.ensembling.soup import Ingredient, greedy_soup, soup_key
from carmodels.evaluation.metrics import METRICS
from carmodels.models.classifier import save_weights, weights_damage
from carmodels.records import State, TrialRecord
from carmodels.steady_clock import steady_time
from tune.runtime.job import Job, as_task, results_of

SOUP = "soup"
MAX_INGREDIENTS = 8  # models of one kind to try, best first


def make_soups(job: Job, candidates: Sequence[TrialRecord], *, until: float) -> list[TrialRecord]:
    """Make the missing soups of the candidates, which are sorted best first; records of all their soups.

    Kinds run side by side until `until`, steady_time(). A soup that was cut short is tried again if there is
    time. Each new soup leaves a record, weights and predictions under its own id.
    """
    study = job.study
    existing = {r.trial_id: r for r in study.records() if not weights_damage(study.weights_file(r.trial_id))}
    groups = {soup_id(group): group for group in _by_kind(candidates)}
    done = {name for name, record in existing.items() if not record.cut_short or steady_time() > until}
    missing = {name: group for name, group in groups.items() if name not in done}
    task = as_task(_make_soup, job.workers)
    for record in results_of([task.remote(job, *item, until) for item in missing.items()], "making a soup"):
        if record is not None:
            study.append(record)
            existing[record.trial_id] = record
    return [existing[name] for name in groups if name in existing]


def soup_id(candidates: Sequence[TrialRecord]) -> str:
    """Id of the soup of these candidates: 12 hex digits of a hash."""
    content = " ".join([SOUP, *(record.trial_id for record in candidates)])
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _by_kind(candidates: Sequence[TrialRecord]) -> list[list[TrialRecord]]:
    """The best `MAX_INGREDIENTS` candidates of each kind that has at least two."""
    groups: dict[Hashable, list[TrialRecord]] = defaultdict(list)
    for record in candidates:
        if (key := soup_key(record.run)) is not None:
            groups[key].append(record)
    return [group[:MAX_INGREDIENTS] for group in groups.values() if len(group) > 1]


def _make_soup(job: Job, name: str, group: Sequence[TrialRecord], until: float) -> TrialRecord | None:
    """Make and save the soup of one kind, in a worker; None if no soup is better than the best model."""
    job.begin()
    started = steady_time()
    study, splits, workers = job.study, job.splits, job.workers
    ingredients = [
        Ingredient(r.trial_id, r.run, study.weights_file(r.trial_id), study.predictions(r.trial_id, "val"))
        for r in group
    ]
    try:
        soup = greedy_soup(
            ingredients, splits, device=workers.device, processes=workers.processes, until=until
        )
    except torch.OutOfMemoryError:  # in the pass over train for BatchNorm
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
        seconds=steady_time() - started,
        reason=f"the mean of the weights of {len(soup.ingredients)} models of {len(group)}{cut}",
        stage=SOUP,
        ingredients=members,
        note=f"soup of {', '.join(members)}",
    )

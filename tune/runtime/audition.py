"""The audition, before the first trial: linear probes of frozen features rank the backbones of a space."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from carmodels.data.splits import Split
from carmodels.files import read_json, write_json
from carmodels.formatting import duration
from carmodels.models.classifier import Classifier, create_classifier
from carmodels.models.facts import facts_of
from carmodels.space import Space, unfrozen_configs
from carmodels.steady_clock import steady_time
from carmodels.training.config import TrialConfig
from carmodels.training.probing import Probed, extract_features, probe, stratified_order
from tune.budget.clock import Clock
from tune.budget.plan import TRIAL_SHARE
from tune.optim.shortlist import SHORTLIST, ProbeScore, best_per_backbone, shortlist
from tune.runtime.job import Job, Say, as_task, results_of

AUDITION_SHARE = 0.05  # of the time, for all probes together
MOST_IMAGES = 2000
LEAST_PER_CLASS = 10  # images
_LEAST_IMAGES = 200
_SIZES = 2  # image sizes a backbone
_GROWTH = 3  # factor of the images, and divisor of the backbones, from one round to the next
_TIMED = 16  # images by which a backbone's speed is measured
TRAINING_PASSES = 3.0  # forward passes that a training step costs (forward, and backward twice that)

Key = tuple[str, int]  # backbone and image size
Rows = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A backbone at the image sizes at which it can be trained in the time there is."""

    configs: Sequence[TrialConfig]  # one an image size, largest first
    known: dict[int, Probed]  # by image size, of earlier rounds


def shortlisted(
    job: Job, space: Space, clock: Clock, *, seed: int, say: Say
) -> tuple[Space, list[dict[str, Any]]]:
    """The space with the short-listed backbones alone, and the audition's rows in JSON's types, best first.

    The rows are kept in the study: a resumed search reads them. A space with few backbones stays as it is.
    """
    path = job.study.audition_file
    if len(space.backbones) <= SHORTLIST:
        return space, []
    if path.is_file():
        rows: Rows = read_json(path)["backbones"]
    else:
        begun = steady_time()
        seconds = TRIAL_SHARE * (clock.at(clock.search) - begun)
        scores = audition(
            job,
            space,
            until=begun + AUDITION_SHARE * clock.seconds,
            seconds_per_image=seconds / (int(space.fixed["epochs"]) * len(job.splits.train)),
            seed=seed,
        )
        rows = _rows(scores)
        write_json(path, {"backbones": rows})
        say(f"Audition: linear probes of {len(rows)} backbones, {duration(steady_time() - begun)}.")
    return space.with_backbones(tuple(row["backbone"] for row in rows if row["listed"])), rows


def _rows(scores: Sequence[ProbeScore]) -> Rows:
    """Each backbone at its best size, those on the short list first, in the order in which to try them."""
    known = {s.backbone: facts_of(s.backbone).top1 for s in scores}
    listed = shortlist(scores, {backbone: top1 for backbone, top1 in known.items() if top1})
    rest = [s for s in best_per_backbone(scores) if s.backbone not in {one.backbone for one in listed}]
    return [
        {
            "backbone": score.backbone,
            "image_size": score.image_size,
            "images": len(score.right),
            "accuracy": score.accuracy,
            "seconds_per_image": score.seconds,
            "imagenet": known[score.backbone] or None,
            "listed": score in listed,
        }
        for score in [*listed, *rest]
    ]


def audition(
    job: Job, space: Space, *, until: float, seconds_per_image: float = math.inf, seed: int = 0
) -> list[ProbeScore]:
    """Linear probes of the space's backbones, on a sample of train that grows while the best third stays.

    That is successive halving (Jamieson and Talwalkar, 2016) over images. `until`: steady_time() after which
    no probe starts; a backbone whose turn had not come is not in the result. `seconds_per_image`: the most
    that training may take; each backbone is probed at its two largest sizes within it. Returns the last
    scores of each backbone and size.
    """
    train = job.splits.train
    assert train.labels is not None
    order = stratified_order(train.labels, seed)
    most = min(len(train), max(MOST_IMAGES, LEAST_PER_CLASS * len(job.splits.classes)))
    images = min(most, max(_LEAST_IMAGES, LEAST_PER_CLASS * len(job.splits.classes)))
    candidates = [Candidate(configs, {}) for configs in unfrozen_configs(space).values()]
    scores: dict[Key, ProbeScore] = {}
    while candidates:
        sample = _take(train, order[:images])
        call = _remote_probe(job, sample, seconds_per_image, seed)
        probed = _run_until(call, candidates, job.workers.count, until)
        for candidate, found in probed:
            for size, result in found.items():
                backbone = candidate.configs[0].backbone
                scores[backbone, size] = ProbeScore(backbone, size, result.right, result.seconds)
        if images == most or steady_time() > until:
            break
        candidates = _survivors(probed)
        images = min(most, _GROWTH * images)
    return list(scores.values())


def _take(split: Split, positions: np.ndarray) -> Split:
    """The images at these positions, in this order."""
    ids = tuple(split.ids[position] for position in positions)
    assert split.labels is not None
    return replace(split, ids=ids, labels=split.labels[positions], rows=split.rows[positions])


def _survivors(probed: Sequence[tuple[Candidate, dict[int, Probed]]]) -> list[Candidate]:
    """The best third, at least one more than the short list holds, each with what is known of it."""
    by_backbone = {candidate.configs[0].backbone: (candidate, found) for candidate, found in probed}
    ranked = best_per_backbone(
        [
            ProbeScore(backbone, size, result.right, result.seconds)
            for backbone, (_, found) in by_backbone.items()
            for size, result in found.items()
        ]
    )
    kept = ranked[: max(SHORTLIST + 1, math.ceil(len(ranked) / _GROWTH))]
    chosen = (by_backbone[score.backbone] for score in kept)
    return [replace(candidate, known=found) for candidate, found in chosen]


def _remote_probe(
    job: Job, sample: Split, seconds_per_image: float, seed: int
) -> Callable[[Candidate], ray.ObjectRef]:
    task, shared = as_task(_probe, job.workers), ray.put((job, sample))
    return lambda candidate: task.remote(shared, candidate, seconds_per_image, seed)


def _run_until(
    call: Callable[[Candidate], Any], candidates: Sequence[Candidate], at_once: int, until: float
) -> list[tuple[Candidate, dict[int, Probed]]]:
    """Probe the candidates in their order, `at_once` at a time; none starts after `until`, but the first."""
    waiting: Iterator[Candidate] = iter(candidates)
    running: dict[Any, Candidate] = {}
    results: dict[str, tuple[Candidate, dict[int, Probed]]] = {}

    def start() -> None:
        if (results or running) and steady_time() > until:
            return
        if (candidate := next(waiting, None)) is not None:
            running[call(candidate)] = candidate

    for _ in range(at_once):
        start()
    while running:
        (done, *_), _ = ray.wait(list(running))
        candidate = running.pop(done)
        backbone = candidate.configs[0].backbone
        results[backbone] = (candidate, results_of([done], f"the audition of {backbone}")[0])
        start()
    order = [candidate.configs[0].backbone for candidate in candidates]
    return sorted(results.values(), key=lambda result: order.index(result[0].configs[0].backbone))


def _probe(
    shared: tuple[Job, Split], candidate: Candidate, seconds_per_image: float, seed: int
) -> dict[int, Probed]:
    """Probe a backbone at its sizes; sizes that memory does not hold are left out."""
    job, sample = shared
    job.begin()
    configs = [c for c in candidate.configs if c.image_size in candidate.known]
    found: dict[int, Probed] = {}
    for config in configs or _affordable(job, candidate.configs, sample, seconds_per_image):
        with suppress(torch.OutOfMemoryError):
            found[config.image_size] = probe(
                _model(job, config),
                job.splits,
                sample,
                image_size=config.image_size,
                seed=seed,
                device=job.workers.device,
                processes=job.workers.processes,
                known=candidate.known.get(config.image_size),
            )
    return found


def _affordable(
    job: Job, configs: Sequence[TrialConfig], sample: Split, seconds_per_image: float
) -> Sequence[TrialConfig]:
    """The configurations of the largest sizes that can be trained in time; of the smallest if none can.

    Seconds grow with an image's area (convolutions; attention costs more).
    """
    if math.isinf(seconds_per_image):
        return configs[:_SIZES]
    smallest = configs[-1]
    model, few = _model(job, smallest), sample.subset(np.arange(len(sample)) < _TIMED)
    for _ in range(2):  # the first pass sets things up
        started = time.monotonic()
        extract_features(
            model,
            job.splits,
            few,
            image_size=smallest.image_size,
            device=job.workers.device,
        )
        seconds = (time.monotonic() - started) / len(few)
    per_area = TRAINING_PASSES * seconds / smallest.image_size**2
    within = [c for c in configs if per_area * c.image_size**2 <= seconds_per_image]
    return within[:_SIZES] or configs[-1:]


def _model(job: Job, config: TrialConfig) -> Classifier:
    return create_classifier(config, classes=len(job.splits.classes), weights=job.weights)

"""The stages of the whole job, each from study folder to study folder: search, retrain, ensemble."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import optuna
from ray.tune.schedulers import FIFOScheduler

from carmodels.catalog import UNFREEZE, VIEWS
from carmodels.predictions import (
    METRICS,
    Interval,
    Predictions,
    accuracy_interval,
    fit_temperature,
    paired_gain,
    score_interval,
    select_ensemble,
    with_temperature,
)
from carmodels.space import Space, baseline
from carmodels.study import Status, Study, TrialRecord, read_json, write_json
from carmodels.submission import write_submission
from tune.plan import Packing, make_plan
from tune.scheduler import Deadline, Scheduler
from tune.searcher import Draws, Queue
from tune.trials import WEIGHTS_KEPT, Job, Watch, run_trials
from tune.views import Members, judge_views

Say = Callable[[str], None]

SEARCH_SHARE = 0.70  # of the whole time, by when the search has ended
RETRAIN_SHARE = 0.88  # likewise for retraining; the rest is the ensemble's
LATE_SHARE = 0.2  # of the retraining's time that trials may take which turn out slower than planned
BASELINE_SHARE = 0.2  # of the search's core-time that the competitor's recipe may take
RECIPE = "the competitor's recipe"


@dataclass(frozen=True)
class Clock:
    """When the command began and how long it may take."""

    begun: float  # time.time()
    seconds: float = math.inf

    def at(self, share: float) -> float:
        """The moment, in time.time(), when this share of the time is over."""
        return self.begun + share * self.seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.begun + self.seconds - time.time()


def search(
    job: Job,
    space: Space,
    *,
    stamp: dict[str, Any],
    trials: int | None,
    clock: Clock,
    seed: int,
    watch: Watch,
    say: Say,
) -> bool:
    """Search the space within `trials` configurations and its share of the clock; False if interrupted."""
    study, metric = job.study, stamp["metric"]
    mode = METRICS[metric].mode
    records = [r for r in study.records() if r.stage == "search"]
    again = [r for r in records if _to_run_again(r)]
    known = [r for r in records if not _to_run_again(r)]
    notes = {r.trial_id: r.note for r in records if r.note}
    queue = [r.config for r in again]
    end = clock.at(SEARCH_SHARE)
    late = end + LATE_SHARE * (clock.at(RETRAIN_SHARE) - end) if math.isfinite(end) else end
    grace = grace_period(int(space.fixed["epochs"]))
    plan = make_plan(job, space, end)
    job = replace(job, costs=plan.costs)
    if not notes:
        recipe, changed = plan.affordable(
            replace(baseline(space), **stamp), space.image_sizes, BASELINE_SHARE
        )
        queue.insert(0, recipe)
        notes[recipe.id] = RECIPE + changed
        say(f"First trial: {notes[recipe.id]}: {recipe.title}, {recipe.epochs} epochs.")
    if math.isfinite(end):
        say(f"The time for searching buys about {plan.trials(space, grace)} trials.")
    if records:
        say(f"Resumed: {len(known)} trials kept, {len(again)} queued again.")
    scheduler = Scheduler(
        metric=metric,
        mode=mode,
        epochs=int(space.fixed["epochs"]),
        grace_period=grace,
        deadline=Deadline(draw_until=end, end=late),
        protect=notes,
    )
    scheduler.replay(known)
    study.optuna_file.unlink(missing_ok=True)  # it repeats what trials.jsonl says, and is rebuilt from that
    draws = Draws(
        space,
        stamp=stamp,
        metric=metric,
        mode=mode,
        seed=seed,
        limit=trials,
        fits=plan.fits,
        queue=queue,
        known=known,
        storage=optuna.storages.RDBStorage(f"sqlite:///{study.optuna_file}"),
    )
    complete = trials is not None and len(known) >= trials and not queue
    packing = Packing(plan.costs, plan.gpu_bytes, job.workers.cpus) if plan.costs and plan.gpu_bytes else None
    completed = complete or run_trials(
        job,
        stage="search",
        begun=clock.begun,
        end=late,
        search_alg=draws,
        scheduler=scheduler,
        notes=notes,
        watch=watch,
        packing=packing,
    )
    study.write_table()
    return completed


def _to_run_again(record: TrialRecord) -> bool:
    """Whether a trial of an earlier run is queued once more: it was cut off, or is the recipe, unfinished."""
    cut_off = record.status is Status.INTERRUPTED
    return cut_off or (record.note != "" and record.status in (Status.STOPPED, Status.FAILED))


def grace_period(epochs: int) -> int:
    """Epochs before a trial can be stopped: those in which a slow starter trains only its head, plus two."""
    head_only = max(row.head_only_epochs or 0 for row in UNFREEZE.values())
    return min(epochs, head_only + 2)


def retrain(
    job: Job,
    *,
    clock: Clock,
    watch: Watch,
    say: Say,
    trial_id: str | None = None,
    seeds: int = 3,
    epochs: int | None = None,
) -> bool:
    """Train the best (or the named) configuration from new seeds, side by side; False if interrupted."""
    study = job.study
    job = replace(job, workers=replace(job.workers, packed=0))  # the best one has a GPU of its own
    chosen = _chosen(study, trial_id)
    wanted = epochs or chosen.config.epochs
    per_epoch = 1.15 * chosen.seconds / chosen.epochs_run
    seeds, planned = _fitting(
        seeds, wanted, per_epoch, clock.at(RETRAIN_SHARE) - time.time(), job.workers.count
    )
    if not seeds:
        say("Retraining is left out: the time that is left does not hold one run of it.")
        return True
    first = chosen.config.seed + 1
    configs = [replace(chosen.config, seed=first + i, epochs=planned) for i in range(seeds)]
    done = {r.trial_id for r in study.records() if r.status is Status.FINISHED}
    queue = [c for c in configs if c.id not in done]
    say(
        f"Retraining {chosen.config.title} ({chosen.trial_id}) with {len(queue)} new seeds, "
        f"{planned} epochs each."
    )
    metric = chosen.config.metric
    end = clock.at(RETRAIN_SHARE)
    late = end + 0.3 * (clock.at(1) - end) if clock.seconds < math.inf else math.inf
    completed = not queue or run_trials(
        replace(job, until=end),
        stage="retrain",
        begun=clock.begun,
        end=late,
        search_alg=Queue(queue, metric=metric, mode=METRICS[metric].mode),
        scheduler=FIFOScheduler(),
        notes={c.id: f"seed {c.seed} of {chosen.trial_id}" for c in configs},
        watch=watch,
    )
    finished = [r for r in study.leaderboard() if r.trial_id in {c.id for c in configs}]
    study.write_table()
    write_json(
        study.best_file,
        {
            "trial_id": chosen.trial_id,
            "config": asdict(replace(chosen.config, epochs=planned)),
            "metric": metric,
            "val": chosen.value,
            "retrained": {r.trial_id: {"seed": r.config.seed, "val": r.value} for r in finished},
        },
    )
    return completed


def _chosen(study: Study, trial_id: str | None) -> TrialRecord:
    candidates = [r for r in study.leaderboard() if r.stage == "search"]
    if trial_id is not None:
        candidates = [r for r in candidates if r.trial_id == trial_id]
        if not candidates:
            raise ValueError(
                f"--trial {trial_id}: no finished trial of {study.folder} has this id; see trials.csv"
            )
    if not candidates:
        reasons = [r.reason for r in study.records() if r.status is not Status.FINISHED]
        last = f" (the last one: {reasons[-1]})" if reasons else ""
        raise ValueError(f"{study.folder} has no finished trial{last}; --resume goes on, with more --hours")
    return candidates[0]


def _fitting(seeds: int, epochs: int, per_epoch: float, seconds: float, workers: int) -> tuple[int, int]:
    """Seeds and epochs that fit into `seconds`: whole schedules if one fits, else a round of shorter ones."""
    if math.isinf(seconds) or per_epoch <= 0:
        return seeds, epochs
    rounds = int(seconds / (per_epoch * epochs))
    if rounds:
        return min(seeds, rounds * workers), epochs
    shorter = int(seconds / per_epoch)
    return (min(seeds, workers), shorter) if shorter >= max(2, epochs // 2) else (0, 0)


def ensemble(
    job: Job, *, clock: Clock, say: Say, top: int = WEIGHTS_KEPT, views: int = len(VIEWS)
) -> dict[str, Any]:
    """Choose members, views and temperature on val, score once on audit, write ensemble and submission."""
    study, metric = job.study, job.study.metric
    ready = [r for r in study.leaderboard() if study.weights_file(r.trial_id).is_file()]
    candidates = [r for r in ready if r.stage == "search"][:top] + [r for r in ready if r.stage != "search"]
    if not candidates:
        raise ValueError(f"{study.folder} has no finished trial to make a submission from; --resume goes on")
    labels = study.labels("val")
    truth = np.array(list(labels.values()))
    library = {r.trial_id: study.predictions(r.trial_id, "val").aligned(list(labels)) for r in candidates}
    selection = select_ensemble(library, truth, metric=metric)
    records = {r.trial_id: r for r in candidates}
    members = Members(job, {records[i]: weight for i, weight in selection.weights.items()})
    verdict = judge_views(members, labels, limit=views, seconds=clock.left)
    say(f"Test-time augmentation: {verdict.sentence}.")
    temperature = fit_temperature(members.blended("val", verdict.views).aligned(list(labels)).probs, truth)
    blended = {
        split.name: with_temperature(members.blended(split.name, verdict.views), temperature)
        for split in (job.splits.val, job.splits.audit, job.splits.test)
        if len(split)
    }
    for split, predictions in blended.items():
        predictions.save(study.predictions_file("ensemble", split))
    results = {
        "metric": metric,
        "members": [_member(r, weight, selection.gains) for r, weight in members.weights.items()],
        "temperature": temperature,
        "tta": asdict(verdict),
        "val": {
            "ensemble": METRICS[metric].score(blended["val"].aligned(list(labels)).probs, truth),
            "single": {"trial_id": selection.single, "value": selection.single_score},
        },
        "audit": _audit(study, metric, blended["audit"], selection.single),
    }
    if "test" in blended:
        write_submission(blended["test"], study.submission_file, sample=job.splits.sample_file)
        results["submission"] = _described(study, job.splits.class_names, blended["test"])
    write_json(study.ensemble_file, results)
    return results


def _member(record: TrialRecord, weight: float, gains: Mapping[str, float]) -> dict[str, Any]:
    return {
        "trial_id": record.trial_id,
        "title": record.config.title,
        "stage": record.stage,
        "weight": weight,
        "gain": gains[record.trial_id],
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
    scores: dict[str, Any] = {name: asdict(_interval(metric, p, truth)) for name, p in probs.items()}
    for name in named:
        scores[f"gain_over_{name}"] = asdict(paired_gain(metric, probs["ensemble"], probs[name], truth))
    looks = 1 + (read_json(study.ensemble_file)["audit"]["looks"] if study.ensemble_file.is_file() else 0)
    return {**scores, "pictures": len(truth), "looks": looks}


def _interval(metric: str, probs: np.ndarray, labels: np.ndarray) -> Interval:
    """95 %: Wilson's for accuracy, which holds near 1 as well; by bootstrap for the other metrics."""
    return accuracy_interval(probs, labels) if metric == "accuracy" else score_interval(metric, probs, labels)

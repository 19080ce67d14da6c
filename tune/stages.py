"""Stages of the whole job, each from study folder to study folder: search, confirm, ensemble."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
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
    hidden_score,
    paired_gain,
    score_interval,
    select_ensemble,
    with_temperature,
)
from carmodels.space import Space, baseline
from carmodels.study import CUT_OFF, Status, Study, TrialRecord, read_json, write_json
from carmodels.submission import write_submission
from tune import folds, stops
from tune.confirm import RERUNS, Reruns, expected_seconds
from tune.plan import Packing, make_plan
from tune.scheduler import Deadline, Scheduler
from tune.searcher import Draws, Queue, useful
from tune.trials import WEIGHTS_KEPT, Job, Watch, run_trials
from tune.views import Members, judge_views

Say = Callable[[str], None]

SEARCH_SHARE = 0.62  # of the whole time, by when the search has ended
CONFIRM_SHARE = 0.74  # likewise for running the best few again
RETRAIN_SHARE = 0.88  # likewise for retraining; the rest is the ensemble's
UNCONFIRMED_SHARE = 0.08  # of the time, more for the search where nothing is run again
STOPS_SHARE = 0.10  # of the time, less for the search where its stops are audited
LATE_SHARE = 0.2  # of the retraining's time that trials may take which turn out slower than planned
BASELINE_SHARE = 0.2  # of the search's core-time that the competitor's recipe may take
RECIPE = "the competitor's recipe"


@dataclass(frozen=True)
class Clock:
    """When the command began and how long it may take."""

    begun: float  # time.time()
    seconds: float = math.inf
    search: float = SEARCH_SHARE  # by what share of the time the search has ended

    def at(self, share: float) -> float:
        """The moment, in time.time(), when this share of the time is over."""
        return self.begun + share * self.seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.begun + self.seconds - time.time()


def search_share(*, confirm: int, audit_stops: int) -> float:
    """By what share of the time the search has ended, with so many runs of the other stages asked for."""
    return SEARCH_SHARE + (0 if confirm else UNCONFIRMED_SHARE) - (STOPS_SHARE if audit_stops else 0)


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
    end = clock.at(clock.search)
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
    earlier = study.earlier()
    for folder, found in earlier.items():
        say(f"Warm start: {len(useful(found, space))} of {len(found)} trials of {folder} are of this space.")
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
        earlier=list(earlier.values()),
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
    cut_off = record.status in CUT_OFF
    return cut_off or (record.note != "" and record.status in (Status.STOPPED, Status.FAILED))


def grace_period(epochs: int) -> int:
    """Epochs before a trial can be stopped: those in which a slow starter trains only its head, plus two."""
    head_only = max(row.head_only_epochs or 0 for row in UNFREEZE.values())
    return min(epochs, head_only + 2)


def audit_stops(
    job: Job, *, count: int, seed: int, clock: Clock, watching: Callable[[Study], Watch], say: Say
) -> bool:
    """Finish `count` of the stopped trials after all and write what came of it; False if interrupted.

    They are a study of their own: nothing they come to is known to the other stages.
    """
    study, inner = job.study, job.study.begin_stops()
    stopped = stops.at_rungs(study.records())
    chosen = stops.drawn(stopped, count, seed)
    done = {r.trial_id for r in inner.records() if r.status is Status.FINISHED}
    todo = {r.trial_id: r for r in chosen if r.trial_id not in done}
    end = clock.at(clock.search + STOPS_SHARE)
    say(f"Audit of stops: {len(chosen)} of {len(stopped)} trials stopped at a rung are finished after all.")
    completed = not todo or run_trials(
        replace(job, study=inner, workers=replace(job.workers, packed=0)),
        stage="audit",
        begun=clock.begun,
        end=end,
        search_alg=Queue(
            [r.config for r in todo.values()],
            metric=study.metric,
            mode=METRICS[study.metric].mode,
            fits=lambda config: time.time() + expected_seconds(todo[config.id]) <= end,
        ),
        scheduler=FIFOScheduler(),
        notes={r.trial_id: f"stopped after epoch {r.epochs_run}" for r in chosen},
        watch=watching(inner),
    )
    for record in chosen:
        inner.weights_file(record.trial_id).unlink(missing_ok=True)  # nobody uses them
    finished = {r.trial_id: r for r in inner.leaderboard()}
    board = [r for r in study.leaderboard() if r.stage == "search"]
    results = stops.audited(chosen, finished, board, metric=study.metric, stopped=len(stopped))
    write_json(study.stops_file, results)
    return completed


def confirm(job: Job, *, clock: Clock, watch: Watch, say: Say, most: int = RERUNS) -> bool:
    """Run the best few again with new seeds until it is clear who is best; False if interrupted."""
    notes: dict[str, str] = {}
    end = clock.at(CONFIRM_SHARE)
    late = end + LATE_SHARE * (clock.at(RETRAIN_SHARE) - end) if math.isfinite(end) else end
    reruns = Reruns(job.study, most=most, end=end, notes=notes)
    if reruns.next() is None:
        return True
    say(f"Running the best few again with new seeds, at most {most} runs.")
    completed = run_trials(
        replace(job, workers=replace(job.workers, packed=0), until=late),
        stage="confirm",
        begun=clock.begun,
        end=late,
        search_alg=reruns,
        scheduler=FIFOScheduler(),
        notes=notes,
        watch=watch,
    )
    job.study.write_table()
    return completed


def ensemble(
    job: Job, *, clock: Clock, say: Say, top: int = WEIGHTS_KEPT, views: int = len(VIEWS)
) -> dict[str, Any]:
    """Choose members, views and temperature on val, score once on audit, write ensemble and submission."""
    study, metric = job.study, job.study.metric
    ready = [r for r in study.leaderboard() if study.weights_file(r.trial_id).is_file()]
    candidates = [r for r in ready if r.stage == "search"][:top] + [r for r in ready if r.stage != "search"]
    if not candidates:
        raise ValueError(f"{study.folder} has no finished trial to make a submission from; --resume goes on")
    candidates, on, asked = folds.judged_on(study, candidates)
    library = {r.trial_id: study.predictions(r.trial_id, on).aligned(list(asked)) for r in candidates}
    selection = select_ensemble(library, np.array(list(asked.values())), metric=metric)
    labels = study.labels("val")
    truth = np.array(list(labels.values()))
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
        "members": [
            _member(one, record, weight / len(models), selection.gains[record.trial_id] / len(models))
            for record, weight in members.weights.items()
            for models in [folds.models_of(study, record)]
            for one in models
        ],
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
        results["hidden"] = _expected(study, metric, blended["audit"], len(blended["test"].ids))
    write_json(study.ensemble_file, results)
    return results


def _member(one: TrialRecord, record: TrialRecord, weight: float, gain: float) -> dict[str, Any]:
    """A model, which is what was chosen, or one of its folds."""
    return {
        "trial_id": one.trial_id,
        "title": one.config.title,
        "stage": one.stage,
        "weight": weight,
        "gain": gain,
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


def _expected(study: Study, metric: str, audit: Predictions, pictures: int) -> dict[str, Any]:
    """What the submission is going to score: a 95 % prediction interval, from audit alone."""
    labels = study.labels("audit")
    truth = np.array(list(labels.values()))
    found = hidden_score(metric, audit.aligned(list(labels)).probs, truth, pictures)
    return {**asdict(found), "pictures": pictures}


def _interval(metric: str, probs: np.ndarray, labels: np.ndarray) -> Interval:
    """95 %: Wilson's for accuracy, which holds near 1 as well; by bootstrap for the other metrics."""
    return accuracy_interval(probs, labels) if metric == "accuracy" else score_interval(metric, probs, labels)

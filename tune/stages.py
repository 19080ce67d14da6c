"""The stages of the search, each from study folder to study folder: search, audit of stops, confirm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna

from carmodels.catalog import UNFREEZE
from carmodels.predictions import METRICS
from carmodels.space import Space, baseline
from carmodels.study import CUT_OFF, RECIPE, Status, Study, TrialRecord, write_json
from tune import stops
from tune.clock import LATE_SHARE, STOPS_SHARE, Clock
from tune.confirm import CONTENDERS, RERUNS, Reruns, expected_seconds, judged
from tune.plan import Packing, Plan, make_plan
from tune.retraining import least_seconds
from tune.scheduler import Deadline, Scheduler
from tune.searcher import Draws, Queue, useful
from tune.trials import Job, Say, Watch, run_trials

BASELINE_SHARE = 0.2  # of the search's core-time that the competitor's recipe may take


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
    resumed: bool = True,
) -> bool:
    """Search the space within `trials` configurations and its share of the clock; False if interrupted.

    What the study has of it is gone on with; `resumed`: as it was left by another command.
    """
    study, metric = job.study, stamp["metric"]
    mode = METRICS[metric].mode
    end, late = clock.at(clock.search), clock.late(clock.search, clock.retrain, LATE_SHARE)
    grace = grace_period(int(space.fixed["epochs"]))
    plan = make_plan(job, space, time.time() if resumed else clock.begun, end)
    if not resumed:
        plan = _with_time_for_what_follows(plan, study, clock)
    records = [r for r in study.records() if r.stage == "search"]
    again = [r for r in records if _to_run_again(r, plan)]
    known = [r for r in records if r not in again]
    notes = {r.trial_id: r.note for r in records if r.note}
    queue = [r.config for r in again]
    if not notes:
        recipe, changed = plan.affordable(
            replace(baseline(space), **stamp), space.image_sizes, BASELINE_SHARE
        )
        queue.insert(0, recipe)
        notes[recipe.id] = RECIPE + changed
        say(f"First trial: {notes[recipe.id]}: {recipe.title}, {recipe.epochs} epochs.")
    if math.isfinite(end):
        say(f"The time for searching buys about {plan.trials(space, grace)} trials.")
    if records and resumed:
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
    for folder, found in earlier.items() if resumed else ():
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
        optional={r.trial_id for r in again if stops.by_the_clock(r) and not r.is_recipe},
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


def _with_time_for_what_follows(plan: Plan, study: Study, clock: Clock) -> Plan:
    """For a longer search: no trial that confirming and retraining would have no time left for."""
    if plan.costs is None:
        return plan
    dearest = max(plan.seconds(standing.record.config) for standing in judged(study)[:CONTENDERS])
    later = clock.at(clock.retrain) - clock.at(clock.search)
    return replace(plan, longest=min(plan.longest, max(dearest, later / 2)))


def _to_run_again(record: TrialRecord, plan: Plan) -> bool:
    """Whether a trial of an earlier run is queued once more.

    It was cut off, or stopped for want of time that there is now, or is the recipe, unfinished.
    """
    cut_off = record.status in CUT_OFF or (stops.by_the_clock(record) and plan.fits(record.config))
    return cut_off or (record.is_recipe and record.status in (Status.STOPPED, Status.FAILED))


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
    end, costs = clock.at(clock.search + STOPS_SHARE), job.costs if job.workers.packed else None
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
            fits=lambda config: time.time() + expected_seconds(todo[config.id], costs) <= end,
        ),
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
    end, late = clock.at(clock.confirm), clock.late(clock.confirm, clock.retrain, LATE_SHARE)
    latest = clock.at(clock.retrain) - least_seconds(job)  # for retraining to begin
    if latest > time.time():
        end, late = min(end, latest), min(late, latest)
    costs = job.costs if job.workers.packed else None
    reruns = Reruns(job.study, most=most, end=end, notes=notes, costs=costs)
    if reruns.next() is None:
        return True
    say(f"Running the best few again with new seeds, at most {most} runs.")
    completed = run_trials(
        replace(job, workers=replace(job.workers, packed=0), until=late),
        stage="confirm",
        begun=clock.begun,
        end=late,
        search_alg=reruns,
        notes=notes,
        watch=watch,
    )
    job.study.write_table()
    return completed

"""The search stage: queues, draws, prunes and runs trials again."""

from __future__ import annotations

import math
from dataclasses import replace

from carmodels.evaluation.metrics import METRICS
from carmodels.presets import baseline
from carmodels.records import Role, State, TrialRecord
from carmodels.space import Space
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from carmodels.training.run import Origin, Run
from tune.budget.clock import LATE_SHARE, Clock
from tune.budget.plan import Plan, make_plan
from tune.optim.optuna_file import OptunaFile
from tune.optim.optuna_records import transferable_trials
from tune.optim.scheduler import AshaScheduler, TimeLimit, grace_period
from tune.optim.searcher import OptunaSearcher
from tune.optim.standings import CONTENDERS, standings_of
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Say
from tune.runtime.packing import Packing
from tune.runtime.profiling import shared_gpu_bytes
from tune.runtime.runner import run_trials

BASELINE_SHARE = 0.2  # largest share of the search's core-time for the baseline


def search(
    job: Job,
    space: Space,
    *,
    origin: Origin,
    trials: int | None,
    clock: Clock,
    seed: int,
    watch: ProgressCallback,
    say: Say,
    resumed: bool = True,
) -> bool:
    """Search the space within `trials` configurations and the clock's search time. False if interrupted.

    Continues the study's own search. `resumed`: False if this command has run the stage before.
    """
    study, metric = job.study, origin.metric
    mode = METRICS[metric].mode
    end, late = clock.at(clock.search), clock.late(clock.search, clock.retrain, LATE_SHARE)
    grace = grace_period(int(space.fixed["epochs"]))
    plan = make_plan(
        job.costs,
        job.workers.count,
        space,
        steady_time() if resumed else clock.begun,
        end,
        shared_gpu_bytes(job) if job.costs else 0.0,
    )
    if not resumed:
        plan = _with_time_for_what_follows(plan, study, clock)
    records = [r for r in study.records() if r.stage == "search"]
    again = [r for r in records if _to_run_again(r, plan)]
    known = [r for r in records if r not in again]
    roles = {r.trial_id: Role(baseline=True, note=r.note) for r in records if r.baseline}
    queue = [r.run for r in again]
    if not roles:
        config, changed = plan.shrink_to_fit(baseline(space), space.image_sizes, BASELINE_SHARE)
        first = Run(config, origin)
        queue.insert(0, first)
        roles[first.id] = Role(baseline=True, note=f"baseline{changed}")
        say(f"First trial: the {roles[first.id].note}: {first.title}, {config.epochs} epochs.")
    if math.isfinite(end):
        say(f"The time for searching buys about {plan.trials(space, grace)} trials.")
    if records and resumed:
        say(f"Resumed: {len(known)} trials kept, {len(again)} queued again.")
    scheduler = AshaScheduler(
        metric=metric,
        mode=mode,
        epochs=int(space.fixed["epochs"]),
        grace_period=grace,
        time_limit=TimeLimit(soft=end, hard=late),
        protect=roles,
    )
    scheduler.replay(known)
    earlier = study.earlier()
    for folder, found in earlier.items() if resumed else ():
        count = len(transferable_trials(found, space))
        say(f"Warm start: {count} of {len(found)} trials of {folder} are of this space.")
    copy = OptunaFile(study.optuna_file, say)
    searcher = OptunaSearcher(
        space,
        origin=origin,
        metric=metric,
        mode=mode,
        seed=seed,
        limit=trials,
        fits=plan.fits,
        queue=queue,
        optional={r.trial_id for r in again if r.state is State.OUT_OF_TIME and not r.baseline},
        known=known,
        earlier=list(earlier.values()),
        causes=scheduler.causes,
        copy=copy,
    )
    complete = trials is not None and len(known) >= trials and not queue
    packing = Packing(plan.costs, plan.gpu_bytes, job.workers.cpus) if plan.costs and plan.gpu_bytes else None
    completed = complete or run_trials(
        job,
        stage="search",
        begun=clock.begun,
        end=late,
        search_alg=searcher,
        scheduler=scheduler,
        roles=roles,
        watch=watch,
        packing=packing,
    )
    copy.end()
    study.write_table()
    return completed


def _with_time_for_what_follows(plan: Plan, study: Study, clock: Clock) -> Plan:
    """For an extended search: the plan without trials too long to confirm and retrain afterwards."""
    if plan.costs is None:
        return plan
    dearest = max(plan.seconds(standing.record.config) for standing in standings_of(study)[:CONTENDERS])
    later = clock.at(clock.retrain) - clock.at(clock.search)
    return replace(plan, max_trial_seconds=min(plan.max_trial_seconds, max(dearest, later / 2)))


def _to_run_again(record: TrialRecord, plan: Plan) -> bool:
    """Whether a trial of an earlier run is queued again.

    True for a trial that was interrupted or lost its machine, or that ran out of time and now fits. The
    baseline also runs again if it was pruned, ran out of time or failed, but not if it diverged.
    """
    if record.baseline:
        return record.resumable or record.state in (State.OUT_OF_TIME, State.PRUNED) or _failed(record)
    return record.resumable or (record.state is State.OUT_OF_TIME and plan.fits(record.config))


def _failed(record: TrialRecord) -> bool:
    return record.state is State.FAILED and not record.diverged

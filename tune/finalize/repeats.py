"""Retraining the best configuration from new seeds, and what all kinds of retraining share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from carmodels.evaluation.metrics import METRICS
from carmodels.files import write_json
from carmodels.models.classifier import weights_damage
from carmodels.records import TRAIN_SPLIT_STAGES, Role, State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.run import Run
from tune.budget.clock import LATE_RETRAIN_SHARE, Clock
from tune.finalize.schedules import DEFAULT_OPTIONS, RetrainOptions, TimeBudget
from tune.optim.searcher import QueueSearcher
from tune.optim.standings import CONTENDERS, standings_json, standings_of, without_seed
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Say
from tune.runtime.runner import run_trials

SEEDS = 3  # runs of the best configuration


def retrain_new_seeds(
    job: Job,
    *,
    clock: Clock,
    watch: ProgressCallback,
    say: Say,
    trial_id: str | None = None,
    seeds: int = SEEDS,
    options: RetrainOptions = DEFAULT_OPTIONS,
    reserved: float = 0.0,  # share of the time to leave for what follows
) -> bool:
    """Train the best (or the named) configuration from new seeds, side by side; False if interrupted.

    The runs start in turn from the weights of the configuration's earlier runs, with a new schedule (a warm
    restart, Loshchilov and Hutter, 2017) of up to RETRAIN_EPOCHS_RATIO times the trial's epochs. Without such
    weights, or with `options.epochs`, they are new models. A frozen backbone is unfrozen (linear probing,
    then fine-tuning; Kumar et al., 2022). Existing runs of the same schedule count. The remaining time goes
    to the next best configurations.
    """
    study, options = job.study, options.for_study(job.study)
    budget = TimeBudget.until(clock.at(clock.retrain - reserved), job)
    best = chosen_trial(study, trial_id)
    others = [] if trial_id or math.isinf(budget.seconds_left) else near_best(study)
    chosen = next((r for r in (best, *others) if _fits_budget(study, r, seeds, options, budget)), best)
    runs, template = _plan_repeats(study, chosen, seeds, options, budget)
    if chosen != best:
        say(f"The time that is left does not hold one run of {best.config.title} ({best.trial_id}).")
    say(_announcement(chosen, len(runs), len(_existing_repeats(study, chosen, template)), template))
    owners = dict.fromkeys(runs, chosen)
    if trial_id is None:
        owners |= _runner_up_runs(study, chosen, runs, options, budget)
    for run, record in owners.items():
        if record != chosen:
            name = f"{record.config.title} ({record.trial_id})"
            say(f"Beside it, as there is time for it: {name}, {describe_changes(record.config, run)}.")
    roles = {run.id: repeat_role(record, f"seed {run.origin.seed}") for run, record in owners.items()}
    share = clock.retrain - reserved
    completed = train_runs(
        job, list(owners), stage="retrain", roles=roles, clock=clock, share=share, watch=watch
    )
    repeats = _existing_repeats(study, chosen, template)
    rows = {r.trial_id: {"seed": r.origin.seed, "val": r.value} for r in repeats}
    write_best(study, chosen, template if rows else chosen.run, rows)
    return completed


def chosen_trial(study: Study, trial_id: str | None) -> TrialRecord:
    """The named trial, else the one whose configuration is best over all its runs; ValueError for none."""
    candidates = [r for r in study.leaderboard() if r.stage == "search"]
    if trial_id is not None:
        candidates = [r for r in candidates if r.trial_id == trial_id]
        if not candidates:
            raise ValueError(
                f"--trial {trial_id}: no finished trial of {study.folder} has this id; see trials.csv"
            )
        return candidates[0]
    if not candidates:
        raise ValueError(_why_none_finished(study))
    ranked = standings_of(study)
    return ranked[0].record if ranked else candidates[0]


def _why_none_finished(study: Study) -> str:
    ended = [r for r in study.records() if r.stage == "search"]
    if failed := [r for r in ended if r.state is State.FAILED]:
        return (
            f"{study.folder}: none of {len(ended)} trials has finished, the first failed by: "
            f"{failed[0].reason}; mend that, then search.py --resume goes on"
        )
    last = f" (the last one: {ended[-1].reason})" if ended else ""
    return f"{study.folder} has no finished trial{last}; search.py --resume goes on, with more --hours"


def near_best(study: Study) -> list[TrialRecord]:
    """The contenders that are not clearly worse than the best, best first."""
    return [standing.record for standing in standings_of(study)[:CONTENDERS] if not standing.clearly_worse]


def train_runs(
    job: Job,
    runs: Sequence[Run],
    *,
    stage: str,
    roles: dict[str, Role],
    clock: Clock,
    share: float,
    watch: ProgressCallback,
) -> bool:
    """Train the runs side by side, each on a GPU of its own, until `share` of the time; False if interrupted.

    A run that was cut short before keeps its old record unless it gets at least as far this time.
    """
    study, end = job.study, clock.at(share)
    ids = {run.id for run in runs}
    before = {r.trial_id: r for r in study.records() if r.trial_id in ids and r.state is State.COMPLETE}
    try:
        completed = not runs or run_trials(
            replace(job, workers=replace(job.workers, packed=0), until=end),
            stage=stage,
            begun=clock.begun,
            end=clock.late(share, 1.0, LATE_RETRAIN_SHARE),
            search_alg=QueueSearcher(runs, metric=study.metric, mode=METRICS[study.metric].mode),
            roles=roles,
            watch=watch,
        )
    finally:
        for record in study.records():
            if (old := before.get(record.trial_id)) and not _as_long_as(record, old):
                study.append(old)
    study.write_table()
    return completed


def _as_long_as(new: TrialRecord, old: TrialRecord) -> bool:
    return new.state is State.COMPLETE and (not new.cut_short or new.epochs_run >= old.epochs_run)


def write_best(study: Study, chosen: TrialRecord, best: Run, retrained: dict[str, Any]) -> None:
    """Write best.json: the run that was retrained, or the trial's, and the retrained runs by trial id."""
    content = {
        "trial_id": chosen.trial_id,
        **best.to_dict(),
        "metric": study.metric,
        "val": chosen.value,
        "retrained": retrained,
        "standings": standings_json(standings_of(study)),
    }
    write_json(study.best_file, content)


def repeat_role(trial: TrialRecord, what: str) -> Role:
    """The role of a repeat of `trial`; `what` is its seed or fold."""
    return Role(repeats=trial.trial_id, note=f"{what} of {trial.trial_id}")


def assign_runs(busy: Sequence[float], runs: int, seconds: float) -> list[float]:
    """Seconds of work per worker once `runs` more, of `seconds` each, go to the least busy ones in turn."""
    loads = list(busy)
    for _ in range(runs):
        loads[loads.index(min(loads))] += seconds
    return loads


def weights_lost(study: Study, record: TrialRecord) -> bool:
    """Whether the weights of a complete run are missing or damaged."""
    return bool(weights_damage(study.weights_file(record.trial_id)))


def _fits_budget(
    study: Study, record: TrialRecord, seeds: int, options: RetrainOptions, budget: TimeBudget
) -> bool:
    """Whether the configuration has repeats already or a run of it fits."""
    runs, template = _plan_repeats(study, record, seeds, options, budget)
    return bool(runs or _existing_repeats(study, record, template))


def _plan_repeats(
    study: Study, chosen: TrialRecord, seeds: int, options: RetrainOptions, budget: TimeBudget
) -> tuple[list[Run], Run]:
    """The missing runs that fit the budget, and their template: the same run apart from the seed."""
    first = chosen.origin.seed + 1
    parents = _parents(study, chosen)
    if options.must_continue and not parents:
        raise ValueError(
            f"--onward: {study.folder} has no weights of {chosen.trial_id}; leave it out, or name another "
            "with --trial"
        )
    existing: Run | None = None  # the longest template that has runs already
    for longest in options.candidate_runs(chosen.run, [record.trial_id for record in parents]):
        template = longest.with_origin(head_seed=chosen.origin.init_seed)  # so that they make a soup
        repeats = _existing_repeats(study, chosen, template)
        done = {r.origin.seed for r in repeats if not r.cut_short and not weights_lost(study, r)}
        existing = existing or (template if repeats else None)
        cut_short = {r.origin.seed for r in repeats if r.cut_short}  # kept; other seeds run in full
        free = (seed for seed in itertools.count(first) if seed not in cut_short)
        used_up = done | _diverged_seeds(study, template)
        runs = [template.with_origin(seed=seed) for seed in itertools.islice(free, seeds)]
        if template.origin.continues:
            runs = [_continuing(r, parents[i % len(parents)]) for i, r in enumerate(runs)]
        missing = [r for r in runs if r.origin.seed not in used_up]
        count, epochs = budget.fitting_runs(chosen, template.config, len(missing))
        if not missing or (count and epochs == template.config.epochs):
            return missing[:count], template
        if done:
            return [], existing or template  # full runs exist: no shorter ones beside them
    for length in range(template.config.epochs - 1, max(epochs, 1) - 1, -1):
        shorter = template.with_config(epochs=length)  # from an earlier command that had little time
        if done := {r.origin.seed for r in _existing_repeats(study, chosen, shorter) if not r.cut_short}:
            remaining = [r.with_config(epochs=length) for r in missing[:count] if r.origin.seed not in done]
            return remaining if epochs >= length else [], shorter
    if not count:
        return [], existing or template
    return [r.with_config(epochs=epochs) for r in missing[:count]], template.with_config(epochs=epochs)


def _diverged_seeds(study: Study, template: Run) -> set[int]:
    """Seeds with which the same run diverged; it would diverge again."""
    diverged = (r.run for r in study.records() if r.diverged and r.stage in TRAIN_SPLIT_STAGES)
    origin = {name: getattr(template.origin, name) for name in ("seed", "head_seed", "continues")}
    return {run.origin.seed for run in diverged if run.with_origin(**origin) == template}


def _continuing(run: Run, parent: TrialRecord) -> Run:
    """The run started from the parent's weights. Its head seed is the parent's: soups group models by it."""
    return run.with_origin(continues=parent.trial_id, head_seed=parent.origin.init_seed)


def _runner_up_runs(
    study: Study, chosen: TrialRecord, first: Sequence[Run], options: RetrainOptions, budget: TimeBudget
) -> dict[Run, TrialRecord]:
    """One run of each further contender that fits beside the runs `first`, as ensemble members; by run.

    Only contenders that are not clearly worse. None without a time limit.
    """
    runs: dict[Run, TrialRecord] = {}
    busy = [0.0] * budget.workers  # seconds of work per worker
    if first:
        busy = assign_runs(busy, len(first), budget.training_seconds(chosen, first[0].config))
    for standing in standings_of(study) if math.isfinite(budget.seconds_left) else ():
        record = standing.record
        if record == chosen or standing.clearly_worse or len(runs) == CONTENDERS - 1:
            continue
        remaining = replace(budget, seconds_left=budget.seconds_left - min(busy), workers=1)
        for run in _plan_repeats(study, record, 1, options, remaining)[0]:
            if run.config.epochs >= record.config.epochs:  # a shorter one would hardly be a better member
                runs[run] = record
                busy = assign_runs(busy, 1, budget.training_seconds(record, run.config))
    return runs


def _parents(study: Study, chosen: TrialRecord) -> list[TrialRecord]:
    """Runs of the configuration with intact weights to start from, the trial itself first."""
    runs = sorted(_search_runs(study, chosen), key=lambda r: r.trial_id != chosen.trial_id)
    return [r for r in runs if not weights_damage(study.weights_file(r.trial_id))]


def _search_runs(study: Study, chosen: TrialRecord) -> list[TrialRecord]:
    """Complete runs of the configuration from the search and reruns, best first."""
    template = without_seed(chosen.run)
    board = (r for r in study.leaderboard() if r.stage in ("search", "confirm"))
    return [r for r in board if without_seed(r.run) == template]


def _existing_repeats(study: Study, chosen: TrialRecord, template: Run) -> list[TrialRecord]:
    """Complete runs of the template with other seeds than the trial's, best first."""
    board = (
        r for r in study.leaderboard() if r.stage in TRAIN_SPLIT_STAGES and r.trial_id != chosen.trial_id
    )
    start = template.origin
    parents = {r.trial_id for r in _search_runs(study, chosen)} if start.continues else set()

    def repeats(run: Run) -> bool:
        parent = start.continues if run.origin.continues in parents else run.origin.continues
        return run.with_origin(seed=start.seed, head_seed=start.head_seed, continues=parent) == template

    return [r for r in board if repeats(r.run)]


def _announcement(chosen: TrialRecord, missing: int, done: int, template: Run) -> str:
    """One line for the terminal: what is retrained, or why nothing is."""
    name = f"{chosen.config.title} ({chosen.trial_id})"
    if missing:
        existing = f", {done} more are there" if done else ""
        changes = describe_changes(chosen.config, template)
        return f"Retraining {name}, new seeds: {missing}{existing}; {changes}."
    if done:
        return f"Retraining {name} is left out, new seeds that are there: {done}."
    return "Retraining is left out: the time that is left does not hold one run of it."


def describe_changes(old: TrialConfig, run: Run) -> str:
    """How the run differs from the trial, in words: its epochs, and each changed hyperparameter."""
    new = run.config
    instead = f" instead of {old.epochs}" if new.epochs != old.epochs else ""
    words = [f"{new.epochs} epochs each{instead}"]
    if run.origin.continues:
        words = [f"{new.epochs} epochs more each, on from its weights"]
    before = vars(old)
    for name, value in vars(new).items():
        if name not in ("epochs", "patience") and value != before[name]:
            words.append(f"{name} {value} instead of {before[name]}")
    return ", ".join(words)

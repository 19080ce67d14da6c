"""Retraining once the search has ended: from new seeds, over folds, or on all labelled images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from carmodels.data.dataset import Splits
from carmodels.evaluation.predictions import blend
from carmodels.records import FOLD, FOLD_IN, State, TrialRecord
from carmodels.study import Study
from carmodels.submission import write_submission
from carmodels.training.run import Run
from tune.budget.clock import Clock
from tune.finalize.folds import (
    MOST_FOLDED,
    fold_records,
    fold_runs,
    fold_set,
    recompute_fold_predictions,
    record_complete_folds,
    usable_fold_sets,
)
from tune.finalize.repeats import (
    SEEDS,
    assign_runs,
    chosen_trial,
    describe_changes,
    near_best,
    repeat_role,
    retrain_new_seeds,
    train_runs,
    weights_lost,
    write_best,
)
from tune.finalize.schedules import DEFAULT_OPTIONS, RetrainOptions, TimeBudget, min_epochs
from tune.optim.standings import CONTENDERS, standings_of
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Say

FOLD_IN_SHARE = 0.06  # of the time, taken from retraining for a last run on all labelled images


def retrain_all(
    job: Job,
    *,
    clock: Clock,
    watch: ProgressCallback,
    say: Say,
    trial_id: str | None = None,
    seeds: int = SEEDS,
    options: RetrainOptions = DEFAULT_OPTIONS,
    folds: int = 0,
    fold_in: bool = False,
) -> bool:
    """Retrain from new seeds or over folds, then with `fold_in` on all labels; False if interrupted."""
    if fold_in:
        check_has_test(job.splits)
    reserved = FOLD_IN_SHARE if fold_in else 0.0
    if folds:
        completed = retrain_folds(
            job,
            folds=folds,
            clock=clock,
            watch=watch,
            say=say,
            trial_id=trial_id,
            options=options,
            reserved=reserved,
        )
    else:
        completed = retrain_new_seeds(
            job,
            clock=clock,
            watch=watch,
            say=say,
            trial_id=trial_id,
            seeds=seeds,
            options=options,
            reserved=reserved,
        )
    if not (completed and fold_in):
        return completed
    return retrain_on_all_labelled(
        job, clock=clock, watch=watch, say=say, trial_id=trial_id, seeds=seeds, options=options
    )


def retraining_seconds(job: Job, *, within: float = math.inf, folds: int = 0) -> float:
    """Upper bound on the seconds retraining takes, given today's best configurations.

    0 if not even the shortest run of any of them fits in `within` seconds; infinite without trials. The run
    on all labelled images is not included: it has `FOLD_IN_SHARE`.
    """
    study, splits = job.study, job.splits
    budget = TimeBudget.until(math.inf, job)
    options = DEFAULT_OPTIONS.for_study(study)
    if shortest_retraining_seconds(job) > within:
        return 0.0
    best = [standing.record for standing in standings_of(study)[:CONTENDERS]]
    longest = ((record, options.new_model_runs(record.run)[0].config) for record in best)
    seconds = max((budget.training_seconds(*run) for run in longest), default=math.inf)
    runs = folds * MOST_FOLDED if folds else SEEDS + CONTENDERS - 1
    image_ratio = 1 + len(splits.val) / len(splits.train) if folds else 1.0  # upper bound
    return seconds * image_ratio * math.ceil(runs / budget.workers)


def shortest_retraining_seconds(job: Job) -> float:
    """Seconds of the shortest run of any contender that is not clearly worse; 0 without trials."""
    budget = TimeBudget.until(math.inf, job)
    options = DEFAULT_OPTIONS.for_study(job.study)
    shortest = ((record, options.new_model_runs(record.run)[-1].config) for record in near_best(job.study))
    return min(
        (budget.training_seconds(r, c) * min_epochs(c.epochs) / c.epochs for r, c in shortest), default=0.0
    )


def retrained_backbones(study: Study, trial_id: str | None = None) -> set[str]:
    """Backbones of the contenders, or of the named trial."""
    best = [] if trial_id else [standing.record for standing in standings_of(study)[:CONTENDERS]]
    return {record.config.backbone for record in (chosen_trial(study, trial_id), *best)}


def retrain_folds(
    job: Job,
    *,
    folds: int,
    clock: Clock,
    watch: ProgressCallback,
    say: Say,
    trial_id: str | None = None,
    options: RetrainOptions = DEFAULT_OPTIONS,
    reserved: float = 0.0,  # share of the time to leave for what follows
) -> bool:
    """Train the best few configurations (or the named one) once per fold; False if interrupted.

    As many configurations as fit, the best first; if none fits, the best is retrained from new seeds instead.
    Complete folds are kept, except those that were cut short. Holdout is not used.
    """
    study, splits = job.study, job.splits
    options = options.for_study(study)
    chosen = [chosen_trial(study, trial_id)]
    if trial_id is None:
        chosen += _runners_up(study, chosen[0], options, say)
    image_ratio = (len(splits.train) + len(splits.val)) * (folds - 1) / folds / len(splits.train)
    budget = TimeBudget.until(clock.at(clock.retrain - reserved), job)
    planned = _plan_folds(study, chosen, folds, options, budget, image_ratio)
    for record, template in planned.items():
        say(
            f"Over {folds} folds of train and val: {record.config.title} ({record.trial_id}), "
            f"{describe_changes(record.config, template)}."
        )
    templates = (template for r in chosen for template in _fold_templates(study, r, folds, options))
    if not planned and not any(_all_folds_complete(study, template, folds) for template in templates):
        say(
            f"Folds are left out: the time that is left does not hold {folds} runs of the best. New seeds "
            "take their place."
        )
        return retrain_new_seeds(
            job, clock=clock, watch=watch, say=say, trial_id=trial_id, options=options, reserved=reserved
        )
    missing = {m: r for r, template in planned.items() for m in _missing_folds(study, template, folds)}
    roles = {m.id: repeat_role(r, f"fold {1 + (m.origin.fold or 0)} of {folds}") for m, r in missing.items()}
    completed = train_runs(
        job, list(missing), stage=FOLD, roles=roles, clock=clock, share=clock.retrain - reserved, watch=watch
    )
    recompute_fold_predictions(job)
    for record in record_complete_folds(study):
        say(f"{record.trial_id}: {record.note} ({len(splits.train) + len(splits.val)} images).")
    study.write_table()
    fold_sets = [r for r in usable_fold_sets(study) if r.repeats == chosen[0].trial_id]
    diverged = any(_has_diverged_fold(study, template, folds) for template in planned.values())
    if completed and diverged and not fold_sets:
        say("A fold diverged, so that there is no whole set of the best: new seeds take their place.")
        return retrain_new_seeds(
            job, clock=clock, watch=watch, say=say, trial_id=trial_id, options=options, reserved=reserved
        )
    best = fold_sets[0].run.with_origin(folds=0) if fold_sets else chosen[0].run
    write_best(study, chosen[0], best, {r.trial_id: {"val": r.value} for r in fold_sets})
    return completed


def _runners_up(study: Study, best: TrialRecord, options: RetrainOptions, say: Say) -> list[TrialRecord]:
    """The next best configurations, without those that the options do not fit."""
    records = []
    for standing in standings_of(study)[:MOST_FOLDED]:
        record = standing.record
        if record == best:
            continue
        try:
            options.new_model_runs(record.run)
        except ValueError as error:
            say(f"{record.config.title} ({record.trial_id}) is left out: {error}.")
            continue
        records.append(record)
    return records


def _complete_ids(study: Study) -> set[str]:
    """Ids of the runs that are complete and were not cut short."""
    return {r.trial_id for r in study.records() if r.state is State.COMPLETE and not r.cut_short}


def _has_diverged_fold(study: Study, template: Run, folds: int) -> bool:
    """Whether a fold of the template diverged; it would diverge again."""
    ids = {run.id for run in fold_runs(template, folds)}
    return any(r.trial_id in ids and r.diverged for r in study.records())


def _missing_folds(study: Study, template: Run, folds: int) -> list[Run]:
    """Folds of the template that are not complete, were cut short or lost their weights."""
    done, records = _complete_ids(study), {r.trial_id: r for r in study.records()}
    wanted = fold_runs(template, folds)
    return [r for r in wanted if r.id not in done or weights_lost(study, records[r.id])]


def _all_folds_complete(study: Study, template: Run, folds: int) -> bool:
    """Whether every fold of the template is complete, cut short or not."""
    return len(fold_records(study, fold_set(fold_runs(template, folds)[0]))) == folds


def _started_templates(study: Study, record: TrialRecord, folds: int, options: RetrainOptions) -> list[Run]:
    """Templates of other lengths, from commands with less time, that still lack some of their folds."""
    template = options.new_model_runs(record.run)[0].with_config(patience=0)
    if options.epochs:
        return []
    epochs = template.config.epochs
    fold_models = (r.run for r in study.records() if r.stage == FOLD and r.origin.folds == folds)
    started = {run.with_origin(folds=0, fold=None) for run in fold_models}
    alike = [run for run in started if run.with_config(epochs=epochs) == template]
    return [run for run in alike if _missing_folds(study, run, folds)]


def _fold_templates(study: Study, record: TrialRecord, folds: int, options: RetrainOptions) -> list[Run]:
    """Possible templates for the folds of a configuration, those with existing folds first."""
    templates = [*options.new_model_runs(record.run), *_started_templates(study, record, folds, options)]
    templates = [template for template in templates if not _has_diverged_fold(study, template, folds)]
    return sorted(templates, key=lambda template: len(_missing_folds(study, template, folds)) == folds)


def _plan_folds(
    study: Study,
    chosen: Sequence[TrialRecord],
    folds: int,
    options: RetrainOptions,
    budget: TimeBudget,
    image_ratio: float,
) -> dict[TrialRecord, Run]:
    """The template for the folds of each configuration that fits the budget; `chosen` is best first."""
    planned: dict[TrialRecord, Run] = {}
    busy = [0.0] * budget.workers  # seconds of work per worker
    for record in chosen:
        templates = _fold_templates(study, record, folds, options)
        complete = [template for template in templates if _all_folds_complete(study, template, folds)]
        for template in complete[:1] or templates:  # complete sets are not replaced by other lengths
            seconds = budget.training_seconds(record, template.config, image_ratio)
            loads = assign_runs(busy, len(_missing_folds(study, template, folds)), seconds)
            if max(loads) <= budget.seconds_left:
                planned[record], busy = template, loads
                break
        else:
            if record == chosen[0] and not complete:
                if not templates:
                    return {}
                return _plan_shorter_folds(study, record, folds, options, budget, image_ratio)
    return planned


def _plan_shorter_folds(
    study: Study,
    best: TrialRecord,
    folds: int,
    options: RetrainOptions,
    budget: TimeBudget,
    image_ratio: float,
) -> dict[TrialRecord, Run]:
    """A shorter template of the best configuration when no full one fits, unless it has folds already."""
    template = options.new_model_runs(best.run)[-1]
    per_epoch = budget.training_seconds(best, template.config, image_ratio) / template.config.epochs
    shorter = int(budget.seconds_left / (math.ceil(folds / budget.workers) * per_epoch))
    existing = fold_records(study, fold_set(fold_runs(template, folds)[0]))
    candidate = template.with_config(epochs=max(1, shorter))
    too_short = shorter < min_epochs(template.config.epochs)
    if existing or too_short or _has_diverged_fold(study, candidate, folds):
        return {}
    return {best: candidate}


def check_has_test(splits: Splits) -> None:
    """Raises ValueError without test images: all others are in the training data of --fold-in."""
    if not len(splits.test):
        raise ValueError("--fold-in: there are no test images to answer; leave it out")


def retrain_on_all_labelled(
    job: Job,
    *,
    clock: Clock,
    watch: ProgressCallback,
    say: Say,
    trial_id: str | None = None,
    seeds: int = SEEDS,
    options: RetrainOptions = DEFAULT_OPTIONS,
) -> bool:
    """Train the best (or the named) configuration on all labelled images, holdout too; False if interrupted.

    Writes the mean of the models' test predictions as a separate submission. It has no score: no labelled
    image is left to measure it on.
    """
    study, splits = job.study, job.splits
    check_has_test(splits)
    chosen = chosen_trial(study, trial_id)
    image_ratio = sum(len(s) for s in (splits.train, splits.val, splits.holdout)) / len(splits.train)
    budget = TimeBudget.until(clock.at(clock.retrain), job)
    options = options.for_study(study)
    missing, accepted = _plan_all_labelled(study, chosen, seeds, options, budget, image_ratio)
    name = f"{chosen.config.title} ({chosen.trial_id})"
    if missing:
        difference = describe_changes(chosen.config, missing[0])
        say(f"Training {name} on all labelled images, holdout too, seeds: {len(missing)}; {difference}.")
    roles = {r.id: repeat_role(chosen, f"seed {r.origin.seed}, all labelled images") for r in missing}
    completed = train_runs(
        job, missing, stage=FOLD_IN, roles=roles, clock=clock, share=clock.retrain, watch=watch
    )
    records = [r for r in study.records() if r.trial_id in accepted and r.state is State.COMPLETE]
    records = [
        r for r in records if not r.cut_short
    ] or records  # there is no val score to weed out short runs
    answers = [r.trial_id for r in records if study.has_predictions(r.trial_id, "test")]
    if not answers and not missing:
        say(f"A last run of {name} on everything is left out: there is no time for it.")
    if answers:
        blended = blend([study.predictions(i, "test") for i in answers])
        write_submission(blended, study.fold_in_file, sample=splits.sample_file)
        say(
            f"{study.fold_in_file}: the mean of {len(answers)} models that learnt from everything. No score "
            "goes with it: nothing is left that they have not seen."
        )
    return completed


def _plan_all_labelled(
    study: Study,
    chosen: TrialRecord,
    seeds: int,
    options: RetrainOptions,
    budget: TimeBudget,
    image_ratio: float,
) -> tuple[list[Run], set[str]]:
    """(missing runs that fit the budget, ids of all accepted runs, of any length)."""
    done, accepted = {i for i in _complete_ids(study) if study.has_predictions(i, "test")}, set[str]()
    for longest in options.new_model_runs(chosen.run):
        template = longest.with_config(patience=0).with_origin(fold_in=True)
        runs = [template.with_origin(seed=template.origin.seed + 1 + i) for i in range(seeds)]
        accepted |= {r.id for r in runs}
        missing = [r for r in runs if r.id not in done]
        count, planned = budget.fitting_runs(chosen, template.config, len(missing), image_ratio)
        if not missing or (count and planned == template.config.epochs):
            break
    others = [r for r in study.records() if r.stage == FOLD_IN and r.state is State.COMPLETE]
    epochs, seed = template.config.epochs, template.origin.seed
    shorter = {r.run for r in others if r.run.with_config(epochs=epochs).with_origin(seed=seed) == template}
    accepted |= {r.id for r in shorter}
    if planned < epochs:  # existing runs of at least as many epochs are enough
        existing = {r.origin.seed for r in shorter if r.config.epochs >= planned and r.id in done}
        missing = [r for r in missing if r.origin.seed not in existing]
        count -= len(existing)
    missing = [r.with_config(epochs=planned) for r in missing[: max(0, count)]]
    return missing, accepted | {r.id for r in missing}

"""Work of tune/retrain.py: retrains a configuration with new seeds, on folds or on all images."""

from __future__ import annotations

import argparse

from carmodels.files import user_path
from carmodels.models.backbones import fetch_weights
from carmodels.models.weights import Weights
from carmodels.records import State
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from carmodels.training.config import parse_assignment
from tune.budget.clock import Clock
from tune.cli import session
from tune.finalize import folds, repeats, retraining, schedules
from tune.monitor.terminal import Screen


def run(options: argparse.Namespace, screen: Screen) -> int:
    """Retrain and print the table."""
    changes = dict(parse_assignment(text) for text in options.set)
    retrain_options = schedules.RetrainOptions(options.epochs, changes, options.onward)
    new_head = sorted(schedules.HEAD_FIELDS & changes.keys())
    if new_head and options.onward:
        raise ValueError(f"--set {new_head[0]}: the weights of the trial have another; leave out --onward")
    study = Study(user_path(options.study))
    clock = Clock(steady_time())
    with session.open_job(study, options, screen) as job:
        Weights.parse(job.weights.source)  # its folder may be gone
        if options.folds:
            folds.check_fold_count(job.splits, options.folds, study.metadata["seed"])
        if options.folds or options.fold_in or (options.epochs and not options.onward) or new_head:
            fetch_weights(job.weights, retraining.retrained_backbones(study, options.trial))  # for new models
        before = study.records()
        completed = retraining.retrain_all(
            job,
            clock=clock,
            watch=session.watched(job, clock, None, screen),
            say=screen.say,
            trial_id=options.trial,
            seeds=options.seeds or repeats.SEEDS,
            options=retrain_options,
            folds=options.folds,
            fold_in=options.fold_in,
        )
    screen.rest()
    screen.table(study)
    new_records = [r for r in study.records() if r not in before]
    if new_records and all(r.state is State.FAILED for r in new_records):
        raise ValueError(
            f"none of {len(new_records)} runs has finished, the first failed by: {new_records[0].reason}"
        )
    return 0 if completed else 130

"""python tune/retrain.py results/demo --seeds 3

Train the best configuration of a study (or the one named) again from new seeds, or with --folds once for each
fold of train and val; with --fold-in a last time on everything that has a label.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from carmodels.files import user_path
from carmodels.models.backbones import fetch_weights
from carmodels.models.weights import Weights
from carmodels.records import State
from carmodels.study import Study
from carmodels.training.config import parse_assignment
from tune.budget.clock import Clock
from tune.cli import session
from tune.cli.options import Parser, add_fold_options, add_machine_options, check_folds, guarded
from tune.finalize import folds, retraining
from tune.monitor.terminal import Screen

MOST_SEEDS = 1000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", metavar="STUDY_DIR", type=Path, help="a folder under results/")
    p.add_argument("--trial", metavar="ID", help="the trial whose configuration is retrained (the best)")
    p.add_argument("--seeds", type=int, metavar="N", help="how many new seeds (3)")
    p.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="length of the schedule of new models (without: on from the trial's weights, twice as long)",
    )
    p.add_argument(
        "--onward",
        action="store_true",
        help="go on from the trial's weights with --epochs, too; an error where there are none",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=V",
        help="a hyperparameter to change, such as ema=0.998 or eval_image_size=224",
    )
    add_fold_options(p)
    add_machine_options(p)
    return p


def run(options: argparse.Namespace, screen: Screen) -> int:
    """Retrain and print the table."""
    for name in ("seeds", "epochs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    check_folds(options)
    if options.folds and options.seeds:
        raise ValueError(f"--seeds {options.seeds} does not go with --folds: each fold is a run of its own")
    if options.seeds is not None and options.seeds > MOST_SEEDS:
        raise ValueError(f"--seeds {options.seeds} must be at most {MOST_SEEDS}")
    changes = dict(parse_assignment(text) for text in options.set)
    way = retraining.Way(options.epochs, changes, options.onward)
    if options.onward and (options.folds or options.fold_in):
        raise ValueError("--onward: what folds hold out the trial has learnt from; leave one of them out")
    if "patience" in changes and (options.folds or options.fold_in):
        raise ValueError("--set patience: what is held out must not end training; leave it out")
    new_head = sorted(retraining.NEW_HEAD & changes.keys())
    if new_head and options.onward:
        raise ValueError(f"--set {new_head[0]}: the weights of the trial have another; leave out --onward")
    for name in ("backbone", "image_size", "epochs"):
        if name in way.changes:
            raise ValueError(f"--set {name}: that is another configuration; give --trial ID or --epochs N")
    study = Study(user_path(options.study))
    clock = Clock(time.time())
    with session.open_job(study, options, screen) as job:
        Weights.parse(job.weights.source)  # a folder may have gone since
        if options.folds:
            folds.check_filled(job.splits, options.folds, study.metadata["seed"])
        if options.folds or options.fold_in or (options.epochs and not options.onward) or new_head:
            fetch_weights(job.weights, retraining.backbones(study, options.trial))  # for new models
        before = study.records()
        completed = retraining.retrain_all(
            job,
            clock=clock,
            watch=session.watched(job, clock, None, screen),
            say=screen.say,
            trial_id=options.trial,
            seeds=options.seeds or retraining.SEEDS,
            way=way,
            folds=options.folds,
            fold_in=options.fold_in,
        )
    screen.rest()
    screen.table(study)
    made = [r for r in study.records() if r not in before]
    if made and all(r.state is State.FAILED and not r.diverged for r in made):
        raise ValueError(f"none of {len(made)} runs has finished, the last one failed by: {made[-1].reason}")
    return 0 if completed else 130


if __name__ == "__main__":
    sys.exit(guarded(run, parser().parse_args()))

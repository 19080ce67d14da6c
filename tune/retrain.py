"""python tune/retrain.py results/demo --seeds 3

Train the best configuration of a study (or the one named) again from new seeds, or with --folds once for each
fold of train and val; with --fold-in a last time on everything that has a label.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while imports last ends it without a traceback

import argparse
import sys

from carmodels.training.config import BOUNDS, parse_assignment, refuse_repeated
from tune.cli.entry import start
from tune.cli.options import (
    Parser,
    add_fold_options,
    add_machine_options,
    check_folds,
    check_machine_options,
    check_start,
    path,
)

MOST_SEEDS = 1000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(__doc__)
    p.add_argument("study", metavar="STUDY_DIR", type=path, help="a folder under results/")
    training = p.add_argument_group("training")
    add = training.add_argument
    add("--trial", metavar="ID", help="the trial whose configuration is retrained (the best)")
    add("--seeds", type=int, metavar="N", help="number of new seeds (3)")
    add(
        "--epochs",
        type=int,
        metavar="N",
        help="train new models for N epochs (without: on from the trial's weights, up to twice as long)",
    )
    add("--onward", action="store_true", help="go on from the trial's weights with --epochs, too; needs them")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=V",
        help="change a hyperparameter, such as ema=0.998 or eval_image_size=224; may be repeated",
    )
    add_fold_options(training)
    add_machine_options(p.add_argument_group("machine"))
    return p


def run(options: argparse.Namespace) -> int:
    """Check the options, then import the command, which takes seconds, and run it."""
    check(options)
    from tune.commands import run_retrain
    from tune.monitor.terminal import Screen

    with Screen(plain=options.plain) as screen:
        return run_retrain.run(options, screen)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for an option that is wrong for any study and machine."""
    for name in ("seeds", "epochs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    check_folds(options)
    if options.folds and options.seeds:
        raise ValueError(f"--seeds {options.seeds} does not go with --folds: each fold is a run of its own")
    for name, most in (("seeds", MOST_SEEDS), ("epochs", int(BOUNDS["epochs"][1]))):
        if (getattr(options, name) or 0) > most:
            raise ValueError(f"--{name} {getattr(options, name)} must be at most {most}")
    if options.onward and (options.folds or options.fold_in):
        raise ValueError("--onward: what folds hold out the trial has learnt from; leave one of them out")
    refuse_repeated(options.set)
    changes = dict(parse_assignment(text) for text in options.set)
    if "patience" in changes and (options.folds or options.fold_in):
        raise ValueError("--set patience: what is held out must not end training; leave it out")
    for name in ("backbone", "image_size", "epochs"):
        if name in changes:
            raise ValueError(f"--set {name}: that is another configuration; give --trial ID or --epochs N")
    check_machine_options(options)
    check_start(options, report=False)


if __name__ == "__main__":
    sys.exit(start(parser, run))

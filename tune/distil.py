"""python tune/distil.py results/demo

Distil a study's ensemble into one small model: the fastest backbone there are weights for, as measured, or
the one named, learns what the ensemble says of train. Says what is kept of its accuracy and gained in speed;
tune/predict.py --student answers with it.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while imports last ends it without a traceback

import argparse
import sys
from pathlib import Path

from carmodels.training.config import BOUNDS
from tune.budget.stages import STUDENT_EPOCHS
from tune.cli.entry import start
from tune.cli.options import Parser, add_cache_options, check_address_space, check_cache_limit


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(__doc__)
    add = p.add_argument
    add("study", metavar="STUDY_DIR", type=Path, help="a folder under results/")
    add("--backbone", metavar="NAME", help="timm name of the student's backbone (the fastest)")
    add("--epochs", type=int, metavar="N", help=f"epochs of the student ({STUDENT_EPOCHS} times a trial's)")
    add_cache_options(p)
    return p


def run(options: argparse.Namespace) -> int:
    """Check the options, then import the command, which takes seconds, and run it."""
    check(options)
    from tune.commands import run_distil
    from tune.monitor.terminal import Screen

    with Screen() as screen:
        return run_distil.run(options, screen)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for an option that is wrong for any study."""
    most = int(BOUNDS["epochs"][1])
    if options.epochs is not None and not 1 <= options.epochs <= most:
        raise ValueError(f"--epochs {options.epochs} must be from 1 to {most}")
    check_cache_limit(options)
    check_address_space()


if __name__ == "__main__":
    sys.exit(start(parser, run))

"""python tune/ensemble.py results/demo

Choose an ensemble of a study's complete trials on val, score it once on holdout, write submission and report.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while imports last ends it without a traceback

import argparse
import sys

from carmodels.catalog import VIEWS
from tune.budget.stages import MOST_VIEWS, WEIGHTS_KEPT
from tune.cli.entry import start
from tune.cli.options import (
    Parser,
    add_cost_option,
    add_machine_options,
    check_machine_options,
    check_start,
    cost_limit,
    out_file,
    path,
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(__doc__)
    p.add_argument("study", metavar="STUDY_DIR", type=path, help="a folder under results/")
    chosen = p.add_argument_group("ensemble")
    add = chosen.add_argument
    add("--top", type=int, default=12, metavar="K", help="choose from the best K trials of the search (12)")
    add(
        "--tta",
        type=int,
        default=MOST_VIEWS,
        metavar="N",
        help=f"the most views of an image that are averaged ({MOST_VIEWS}; 1: off)",
    )
    add_cost_option(chosen)
    add("--out", type=path, metavar="CSV", help="copy the submission to this file as well")
    add_machine_options(p.add_argument_group("machine"))
    return p


def run(options: argparse.Namespace) -> int:
    """Check the options, then import the command, which takes seconds, and run it."""
    check(options)
    from tune.commands import run_ensemble
    from tune.monitor.terminal import Screen

    with Screen(plain=options.plain) as screen:
        return run_ensemble.run(options, screen)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for an option that is wrong for any study and machine."""
    if not 1 <= options.top <= WEIGHTS_KEPT:
        raise ValueError(
            f"--top {options.top} must be from 1 to {WEIGHTS_KEPT}, whose weights a search keeps"
        )
    if not 1 <= options.tta <= len(VIEWS):
        raise ValueError(f"--tta {options.tta} must be from 1 to {len(VIEWS)}, the number of views there are")
    cost_limit(options)
    out_file(options)
    check_machine_options(options)
    check_start(options, report=True)


if __name__ == "__main__":
    sys.exit(start(parser, run))

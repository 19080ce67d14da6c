"""python tune/ensemble.py results/demo

Choose an ensemble of a study's finished trials on val, score it once on holdout, write submission and report.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from carmodels.catalog import VIEWS
from carmodels.files import user_path, write_atomic
from carmodels.study import Study
from tune.budget.clock import Clock
from tune.cli import session
from tune.cli.options import Parser, add_cost_option, add_machine_options, cost_limit, guarded, out_file
from tune.finalize.blending import ensemble
from tune.finalize.views import MOST_VIEWS
from tune.monitor.terminal import Screen
from tune.reporting.page import write_report
from tune.runtime.recorder import WEIGHTS_KEPT


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", metavar="STUDY_DIR", type=Path, help="a folder under results/")
    p.add_argument(
        "--top", type=int, default=12, metavar="K", help="best trials of the search to choose from (12)"
    )
    p.add_argument(
        "--tta",
        type=int,
        default=MOST_VIEWS,
        metavar="N",
        help=f"most views an image ({MOST_VIEWS}; 1: off)",
    )
    add_cost_option(p)
    p.add_argument("--out", type=Path, metavar="CSV", help="a further place to write the submission to")
    add_machine_options(p)
    return p


def run(options: argparse.Namespace, screen: Screen) -> int:
    """Ensemble and print the answer."""
    if not 1 <= options.top <= WEIGHTS_KEPT:
        raise ValueError(
            f"--top {options.top} must be from 1 to {WEIGHTS_KEPT}, whose weights a search keeps"
        )
    if not 1 <= options.tta <= len(VIEWS):
        raise ValueError(f"--tta {options.tta} must be from 1 to {len(VIEWS)}, the number of views there are")
    max_seconds = cost_limit(options)
    study = Study(user_path(options.study))
    out = out_file(options)
    with session.open_job(study, options, screen) as job:
        if out and not len(job.splits.test):
            raise ValueError(f"--out {options.out}: there are no test images to answer; leave it out")
        results = ensemble(
            job,
            clock=Clock(time.time()),
            say=screen.say,
            top=options.top,
            views=options.tta,
            max_seconds=max_seconds,
        )
    screen.answer(results, study)
    screen.say(f"Report: {write_report(study)}")
    if out:
        write_atomic(out, study.submission_file.read_bytes())
        screen.say(f"Copied to {options.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(run, parser().parse_args()))

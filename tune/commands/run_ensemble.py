"""Work of tune/ensemble.py: chooses an ensemble, scores it on holdout, writes submission and report."""

from __future__ import annotations

import argparse

from carmodels.files import user_path, write_atomic
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from tune.budget.clock import Clock
from tune.cli import session
from tune.cli.options import cost_limit, out_file
from tune.finalize.blending import ensemble
from tune.monitor.terminal import Screen
from tune.reporting.page import write_report


def run(options: argparse.Namespace, screen: Screen) -> int:
    """Build the ensemble and print its results."""
    study = Study(user_path(options.study))
    if out := out_file(options):
        study.refuse_own(out)
    with session.open_job(study, options, screen) as job:
        if out and not len(job.splits.test):
            raise ValueError(f"--out {options.out}: there are no test images to answer; leave it out")
        results = ensemble(
            job,
            clock=Clock(steady_time()),
            say=screen.say,
            top=options.top,
            views=options.tta,
            max_seconds=cost_limit(options),
        )
    screen.answer(results, study)
    screen.say(f"Report: {write_report(study)}")
    if out:
        write_atomic(out, study.submission_file.read_bytes())
        screen.say(f"Copied to {options.out}.")
    return 0

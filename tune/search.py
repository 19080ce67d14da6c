"""python tune/search.py

Search for the best image classifier that the hardware and the hours can buy: search, run the best few again
with new seeds, retrain the best, ensemble the top trials, write the submission and a report. Without
arguments it draws a small data set of its own and shows the whole job.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while imports last ends it without a traceback

import argparse
import re
import sys

from carmodels.models.weights import Weights
from carmodels.presets import SPACES
from carmodels.space import read_override
from carmodels.training.config import METRIC_NAMES, refuse_repeated
from tune.budget.stages import CPU_HOURS, GPU_HOURS, RERUNS, STAGES
from tune.cli.entry import start
from tune.cli.options import (
    LONGEST_NAME,
    Parser,
    add_cost_option,
    add_fold_options,
    add_machine_options,
    check_folds,
    check_machine_options,
    check_start,
    cost_limit,
    guarded,
    written,
)

MOST_SEED = 2_000_000_000  # leaves room for the seeds of retraining
EXAMPLES = """\
examples:
  python tune/search.py
      The demo: draws images of cars and runs every stage on them, in a few minutes.
  python tune/search.py --data IMAGES --hours 4
      Your own images, one folder for each class; all of it takes four hours at most.
  python tune/search.py --data cars/sf-dl-car-classification.zip --study cars --hours 4
      The competition's zip as it is downloaded; results/cars/submission.csv is the answer."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(__doc__, EXAMPLES)
    add = p.add_argument_group("data").add_argument
    add("--data", metavar="DIR|ZIP", help="images by class, or the competition's files (without: the demo)")
    add("--weights", metavar="hub|none|DIR", help="where pretrained weights come from (hub)")

    add = p.add_argument_group("search").add_argument
    add("--preset", choices=tuple(SPACES), help="the search space (gpu where there is CUDA, else cpu)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=...",
        help="change a dimension of the space to V, V1,V2,... or LOW:HIGH; may be repeated",
    )
    add(
        "--audition",
        choices=("on", "off"),
        default="off",
        help="before the first trial, let linear probes choose the three backbones that are tried (off)",
    )
    add("--metric", choices=METRIC_NAMES, default="accuracy", help="what the search improves (accuracy)")
    add(
        "--warm-start",
        nargs="+",
        default=[],
        metavar="STUDY_DIR",
        help="earlier studies, of any data, whose trials tell where to begin",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the split, the draws and the training (0)")

    budget = f"without --hours and --trials {CPU_HOURS:g} hours on CPUs, {GPU_HOURS:g} on GPUs"
    add = p.add_argument_group("budget", budget).add_argument
    add("--hours", type=float, metavar="H", help="the most hours that the whole command takes")
    add("--trials", type=int, metavar="N", help="the number of trials, those of a resumed study included")

    later = p.add_argument_group("later stages")
    later.add_argument(
        "--until", choices=STAGES, default=STAGES[-1], help=f"the last stage to run ({STAGES[-1]})"
    )
    later.add_argument(
        "--confirm",
        type=int,
        default=RERUNS,
        metavar="N",
        help=f"run the best few again with new seeds, N runs at most ({RERUNS}; 0: off)",
    )
    later.add_argument(
        "--check-stops",
        type=int,
        default=0,
        metavar="K",
        help="finish K pruned trials, drawn at random, to see whether the stops were right (0: off)",
    )
    add_fold_options(later)
    add_cost_option(later)
    later.add_argument(
        "--thumbnails",
        action="store_true",
        help="show images of the most confident mistakes in the report (the demo always does)",
    )

    study = p.add_argument_group("study")
    study.add_argument("--study", metavar="NAME", help="name of the study (the name of the data)")
    study.add_argument("--results", metavar="DIR", default="results", help="folder of all studies (results)")
    study.add_argument(
        "--check", action="store_true", help="look for what would stop the search, and start nothing"
    )
    again = study.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with a study that exists")
    again.add_argument("--overwrite", action="store_true", help="delete a study that exists, and start again")

    add_machine_options(p.add_argument_group("machine"))
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    return guarded(run, parser().parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    """Check the options, then import the command, which takes seconds, and run it."""
    check(options)
    from tune.commands import run_search
    from tune.monitor.terminal import Screen

    with Screen(plain=options.plain) as screen:
        return run_search.run(options, list(written(parser(), options)), screen)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for an option that is wrong for any data and machine."""
    if options.trials is not None and options.trials < 1:
        raise ValueError(f"--trials {options.trials} must be at least 1")
    if options.hours is not None and not 0 < options.hours < 24 * 365:
        raise ValueError(f"--hours {options.hours} must be above 0 and below a year")
    for name in ("confirm", "check_stops"):
        if (value := getattr(options, name)) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 0, which leaves it out")
    if not 0 <= options.seed <= MOST_SEED:
        raise ValueError(f"--seed {options.seed} must be from 0 to {MOST_SEED}")
    name = options.study
    if name is not None and not (re.fullmatch(r"\w[\w.-]*", name) and len(name) <= LONGEST_NAME):
        raise ValueError(
            f"--study {name!r} must be a plain name of letters, digits, '.', '_' and '-', "
            f"{LONGEST_NAME} characters at most"
        )
    check_folds(options)
    cost_limit(options)
    check_until(options)
    check_machine_options(options)
    refuse_repeated(options.set)
    for text in options.set:
        read_override(text)
    if options.weights is not None:
        Weights.parse(options.weights)
    check_start(options, report=options.until == "report")


def check_until(options: argparse.Namespace) -> None:
    """Raises ValueError for an option of a stage after --until."""
    if options.thumbnails and options.until != "report":
        raise ValueError(f"--thumbnails is for the report, which --until {options.until} leaves out")
    until = STAGES.index(options.until)
    for name, stage in (("folds", "retrain"), ("fold_in", "retrain"), ("max_seconds_per_1000", "ensemble")):
        if getattr(options, name) and until < STAGES.index(stage):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is for what --until {options.until} leaves out; leave out one of them")


if __name__ == "__main__":
    sys.exit(start(parser, run))

"""The options that scripts share, and one line for an error."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from platformdirs import user_cache_path

from carmodels.files import user_path
from tune.monitor.terminal import Screen

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
CACHE_LIMIT, MOST_CACHE = 100.0, 1e6  # GB
MOST_FOLDS = 20


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the options\n")


def guarded(run: Callable[[argparse.Namespace, Screen], int], options: argparse.Namespace) -> int:
    """Run a script's job; one line on standard error for what a user can mend. Returns the exit code."""
    screen = Screen(plain=getattr(options, "plain", False))  # report.py has no live view to leave out
    try:
        _refuse_empty(options)
        return run(options, screen)
    except (ValueError, OSError) as error:
        screen.rest()
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        screen.rest()
        print("stopped at once; search.py --resume goes on with what was recorded", file=sys.stderr)
        return 130
    finally:
        screen.rest()


def _refuse_empty(options: argparse.Namespace) -> None:
    """An empty text is a shell variable that was not set, not the wish for a default."""
    for name, value in vars(options).items():
        if value == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty: give a value, or leave it out")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what a command may use of this machine or cluster."""
    add = parser.add_argument
    add(
        "--gpus-per-trial",
        default="1",
        metavar="F|auto",
        help="share of a GPU for each trial (1); auto: as small a one as its memory needs",
    )
    add("--workers", type=int, metavar="N", help="trials side by side (as many as GPUs or cores hold)")
    add("--address", metavar="ADDR", help="join this Ray cluster instead of starting Ray here")
    add_cache_options(parser)
    add("--plain", action="store_true", help="plain lines, on a terminal, too, in place of the live view")


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where decoded images are kept."""
    add = parser.add_argument
    add("--cache", metavar="DIR", help="where decoded images are kept (the user's cache folder)")
    add(
        "--cache-limit",
        type=float,
        default=CACHE_LIMIT,
        metavar="GB",
        help=f"most that they may take ({CACHE_LIMIT:g})",
    )


def add_fold_options(parser: argparse.ArgumentParser) -> None:
    """The options of retraining that change what is learnt from."""
    parser.add_argument(
        "--folds",
        type=int,
        default=0,
        metavar="K",
        help="retrain the best few once for each of K folds of train and val, not from new seeds (0: off)",
    )
    parser.add_argument(
        "--fold-in",
        action="store_true",
        help="train the best a last time on all labelled images, holdout too: a submission without a score",
    )


def check_folds(options: argparse.Namespace) -> None:
    """Raises ValueError for a number of folds that makes no sense."""
    if options.folds and not 2 <= options.folds <= MOST_FOLDS:
        raise ValueError(f"--folds {options.folds} must be 0, which leaves it out, or from 2 to {MOST_FOLDS}")


def add_cost_option(parser: argparse.ArgumentParser) -> None:
    """The option that says what answers may cost."""
    parser.add_argument(
        "--max-seconds-per-1000",
        type=float,
        metavar="S",
        help="most that the ensemble with its views may take a worker here for 1,000 images (no limit)",
    )


def cost_limit(options: argparse.Namespace) -> float:
    """What 1,000 images may take; infinite where nothing was said. ValueError for a limit that is none."""
    given = options.max_seconds_per_1000
    if given is not None and not given > 0:
        raise ValueError(f"--max-seconds-per-1000 {given:g} must be above 0")
    return math.inf if given is None else float(given)


def out_file(options: argparse.Namespace) -> Path | None:
    """The absolute path that --out names, None without; ValueError where no file can be written."""
    if options.out is None:
        return None
    path = user_path(options.out)
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise ValueError(f"--out {options.out} must name a file in a folder that exists")
    return path


def cache_folder(options: argparse.Namespace) -> Path:
    """What `--cache` says, else the user's cache folder."""
    return user_path(options.cache) if options.cache else user_cache_path("carmodels")

"""Options shared by the scripts, and one-line errors.

A script checks its options before it imports torch and Ray, which takes seconds. This module and its imports
must stay light.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from platformdirs import user_cache_path

from carmodels.files import user_path
from tune.runtime.findings import Finding, address_space_findings, head_findings, start_findings

CACHE_LIMIT, MOST_CACHE = 100.0, 1e6  # GB
MOST_FOLDS = 20
_STREAMS = (Path("/dev"), Path("/dev/fd"))  # folders that hold no files
LONGEST_NAME = 100  # characters of a study's name; file systems end at 255 bytes


class Parser(argparse.ArgumentParser):
    """Command line of a script. The script's docstring is an example, an empty line and a description.

    An error takes one line.
    """

    def __init__(self, docstring: str | None, examples: str = "") -> None:
        example, _, description = (docstring or "").partition("\n\n")
        super().__init__(
            description=description,
            epilog=examples or f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the options\n")


def path(text: str) -> Path:
    """The path of an option. Empty text is refused: Path would make it the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a path")
    return Path(text)


class Group(Protocol):
    """Takes options: a parser, or a group with its own heading."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action: ...


def guarded(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a script. Prints one line on standard error for a user's mistake. Returns the exit code."""
    try:
        _refuse_lost_folder()
        _refuse_other_encoding()
        _refuse_no_docstrings()
        _refuse_empty(options)
        return run(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"stopped at once{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130


def _refuse_lost_folder() -> None:
    """Raises ValueError if the current folder was deleted: paths that users give start there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the current folder was deleted: cd to one that exists") from None


def _refuse_other_encoding() -> None:
    """Raises ValueError if file names are not read as UTF-8, as other programs here read them."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise ValueError(f"file names are read as {encoding} here, must be as utf-8: export PYTHONUTF8=1")


def _refuse_no_docstrings() -> None:
    """Raises ValueError if Python drops docstrings, which Ray edits as it is imported."""
    if sys.flags.optimize > 1:
        raise ValueError("Python drops docstrings here, Ray needs them: unset PYTHONOPTIMIZE, leave -OO out")


def _refuse_empty(options: argparse.Namespace) -> None:
    """Raises ValueError for an empty option: an unset shell variable, not a wish for the default."""
    for name, value in vars(options).items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise ValueError(f"--{name.replace('_', '-')} is empty: give a value, or leave it out")


def add_machine_options(group: Group) -> None:
    """Add the options for the resources that a command may use."""
    add = group.add_argument
    add("--workers", type=int, metavar="N", help="trials side by side (as many as GPUs or cores hold)")
    add(
        "--gpus-per-trial",
        default="1",
        metavar="F|auto",
        help="share of a GPU for each trial (1); auto: the smallest share whose memory holds the trial",
    )
    add(
        "--address",
        metavar="HOST:PORT",
        help="join the Ray cluster with this head instead of starting Ray here",
    )
    add_cache_options(group)
    add("--plain", action="store_true", help="print plain lines on a terminal, too, not the live view")


def check_machine_options(options: argparse.Namespace) -> None:
    """Raises ValueError for options that are wrong on any machine."""
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers {options.workers} must be at least 1")
    if options.gpus_per_trial != "auto":
        gpu_share(options)
    check_cache_limit(options)


def check_start(options: argparse.Namespace, *, report: bool) -> None:
    """Raises ValueError for what keeps Ray from starting here, or from joining --address.

    `report`: whether the command writes one, which takes more addresses.
    """
    found = head_findings(options.address) if options.address else start_findings()
    _refuse([*address_space_findings(), *address_space_findings(report=report), *found])


def check_address_space(*, report: bool = False) -> None:
    """Raises ValueError if this process may not have enough addresses for torch, or for a report."""
    _refuse(address_space_findings(report=report))


def _refuse(found: Sequence[Finding]) -> None:
    for finding in found:
        raise ValueError(finding.words)


def gpu_share(options: argparse.Namespace) -> float:
    """The value of --gpus-per-trial. Raises ValueError unless it is above 0 and at most 1."""
    try:
        share = float(options.gpus_per_trial)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(
            f"--gpus-per-trial {options.gpus_per_trial} must be above 0 and at most 1, or auto: "
            "a trial trains on one GPU"
        )
    return share


def add_cache_options(group: Group) -> None:
    """Add the options for the cache of decoded images."""
    add = group.add_argument
    add("--cache", metavar="DIR", help="folder for decoded images (the user's cache folder)")
    add(
        "--cache-limit",
        type=float,
        default=CACHE_LIMIT,
        metavar="GB",
        help=f"the most disk space that decoded images take ({CACHE_LIMIT:g})",
    )


def check_cache_limit(options: argparse.Namespace) -> None:
    """Raises ValueError for a cache limit out of range."""
    if not 0 < options.cache_limit < MOST_CACHE:
        raise ValueError(
            f"--cache-limit {options.cache_limit:g} must be above 0 and below {MOST_CACHE:,.0f} GB"
        )


def add_fold_options(group: Group) -> None:
    """Add the options for the images that retraining uses."""
    group.add_argument(
        "--folds",
        type=int,
        default=0,
        metavar="K",
        help="retrain the best few on K folds of train and val, instead of from new seeds (0: off)",
    )
    group.add_argument(
        "--fold-in",
        action="store_true",
        help="then train the best on all labelled images, holdout too: a second submission, without a score",
    )


def check_folds(options: argparse.Namespace) -> None:
    """Raises ValueError for a number of folds out of range."""
    if options.folds and not 2 <= options.folds <= MOST_FOLDS:
        raise ValueError(f"--folds {options.folds} must be 0, which leaves it out, or from 2 to {MOST_FOLDS}")


def add_cost_option(group: Group) -> None:
    """Add the option that limits the ensemble's prediction time."""
    group.add_argument(
        "--max-seconds-per-1000",
        type=float,
        metavar="S",
        help="the most seconds that the ensemble takes for 1,000 images on one worker here (no limit)",
    )


def cost_limit(options: argparse.Namespace) -> float:
    """Most seconds per 1,000 images; infinite by default. Raises ValueError unless it is above 0."""
    given = options.max_seconds_per_1000
    if given is not None and not given > 0:
        raise ValueError(f"--max-seconds-per-1000 {given:g} must be above 0")
    return math.inf if given is None else float(given)


def out_file(options: argparse.Namespace) -> Path | None:
    """Absolute path of --out, or None. Raises ValueError if no file can be written there.

    A link is followed: the file is written atomically, which would replace the link.
    """
    if options.out is None:
        return None
    path = user_path(options.out)
    target = Path(os.path.realpath(path))
    stream = path.is_relative_to("/proc") or path.parent in _STREAMS  # such as /dev/stdout
    if stream or not target.parent.is_dir() or (target.exists() and not target.is_file()):
        raise ValueError(f"--out {options.out} must name a file in a folder that exists")
    return target


def cache_folder(options: argparse.Namespace) -> Path:
    """The folder of `--cache`, by default the user's cache folder."""
    return user_path(options.cache) if options.cache else user_cache_path("carmodels")


def written(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Iterator[str]:
    """The options that differ from their defaults, as shell text."""
    for name, value in vars(options).items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            yield flag
        elif isinstance(value, list):  # one --set for each value, one --warm-start for all
            groups = [value] if name == "warm_start" else [[item] for item in value]
            yield from (shlex.join([flag, *map(str, group)]) for group in groups if group)
        elif value is not None and value is not False and value != parser.get_default(name):
            yield shlex.join([flag, str(value)])

"""What every script needs first: its share of the machine, the data, a running Ray, one line for an error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import ray
import torch
from platformdirs import user_cache_path

from carmodels.data import Splits, open_dataset
from carmodels.models import Weights
from carmodels.study import Study
from tune.console import Screen
from tune.trials import Job, Workers, start_ray


def guarded(run: Callable[[argparse.Namespace, Screen], int], options: argparse.Namespace) -> int:
    """Run a script's job; one line on standard error for what a user can mend. Returns the exit code."""
    screen = Screen()
    try:
        return run(options, screen)
    except ValueError as error:
        screen.rest()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        screen.rest()
        print("stopped at once; search.py --resume goes on with what was recorded", file=sys.stderr)
        return 130


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what a command may use of this machine or cluster."""
    add = parser.add_argument
    add("--gpus-per-trial", type=float, default=1.0, metavar="F", help="share of a GPU for each trial (1)")
    add("--workers", type=int, metavar="N", help="trials side by side (as many as GPUs or cores hold)")
    add("--address", metavar="ADDR", help="join this Ray cluster instead of starting Ray here")
    add("--cache", metavar="DIR", help="where decoded pictures are kept (the user's cache folder)")


def device() -> str:
    """`cuda` where there is a GPU that torch can use, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen_workers(options: argparse.Namespace, device: str) -> Workers:
    """As many trials side by side as the GPUs, or else the cores, hold; ValueError if asked for more."""
    share, cores = options.gpus_per_trial, os.cpu_count() or 1
    if not share > 0 or (share > 1 and share != int(share)):
        raise ValueError(
            f"--gpus-per-trial {share:g} must be a share of one GPU, like 0.5, or a whole number of them"
        )
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers {options.workers} must be at least 1")
    if options.address:
        return Workers(options.workers or 1, 1, share if device == "cuda" else 0.0)
    if device == "cpu":
        count = options.workers or cores
        if count > cores:
            raise ValueError(f"--workers {count} is more than the {cores} cores of this machine")
        return Workers(count, cores // count, 0.0)
    gpus = torch.cuda.device_count()
    fits = gpus // int(share) if share >= 1 else gpus * int(1 / share + 1e-9)
    count = options.workers or fits
    if not 1 <= count <= fits:
        raise ValueError(
            f"--workers {count} with --gpus-per-trial {share:g} needs more than the {gpus} GPUs "
            "of this machine"
        )
    return Workers(count, max(1, cores // count), share)


def open_data(data: Path, cache: str | None, max_size: int, seed: int, screen: Screen) -> Splits:
    """The data set, decoded once for every size up to `max_size` pixels."""
    cache_dir = Path(cache).expanduser() if cache else user_cache_path("carmodels")
    progress, on_progress = screen.decoding()
    with progress:
        return open_dataset(data, cache_dir=cache_dir, max_size=max_size, seed=seed, on_progress=on_progress)


def reopened(study: Study, options: argparse.Namespace, screen: Screen) -> Job:
    """The job of a study that exists. Raises ValueError where its data set is no longer what it was."""
    facts = study.facts
    data, weights = study.resolved(facts["data"]), facts["weights"]
    splits = open_data(data, options.cache, facts["max_size"], facts["seed"], screen)
    if (splits.fingerprint, splits.split_hash) != (facts["fingerprint"], facts["split_hash"]):
        raise ValueError(
            f"{data} is no longer the data set that {study.folder} was made with; bring that one back"
        )
    source = weights if weights in ("hub", "none") else str(study.resolved(weights))
    return Job(study, splits, Weights.parse(source), chosen_workers(options, device()))


@contextmanager
def ray_running(address: str | None, workers: Workers, screen: Screen) -> Iterator[None]:
    """Ray, from here to the end of the block, with its dashboard's address printed."""
    dashboard = start_ray(address=address, workers=workers)
    if dashboard:
        screen.say(f"Ray dashboard: {dashboard}")
    try:
        yield
    finally:
        ray.shutdown()

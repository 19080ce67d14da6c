"""python tests/benchmarks/bench_real.py --data IMAGES --weights DIR --tutorial SCRIPT

Real searches of the same length over the same space, from several splits: the tutorial's script; its search
(TPE, ASHA with Ray's defaults, no retraining) over our training; ours. Scored on each split's holdout images,
which no side has seen. A run is kept in results/search/real-runs.csv as it ends, and is not made again; what
all of them come to is in results/search/real.csv.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
OUTSIDE = dict(os.environ)  # before our own settings for Ray, by which the tutorial finds no results

import optuna
from rich.console import Console
from rich.table import Table

from carmodels.data.dataset import open_dataset
from carmodels.evaluation.intervals import Interval, proportion_interval
from carmodels.files import read_json
from carmodels.records import State
from carmodels.study import Study
from tune import search
from tune.commands import run_search
from tune.finalize import confirmation, retraining
from tune.optim.scheduler import AshaScheduler, TimeLimit
from tune.optim.searcher import OptunaSearcher
from tune.runtime import search_stage

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "results" / "search"
ARMS = ("tutorial", "tutorial's search, our training", "ours")
SPACE = (  # the tutorial's; it has three backbones, those of `--weights`
    "image_size=96,128,160",
    "lr=1e-5:1e-2",
    "head_depth=0,1,2",
    "unfreeze=frozen,full,head_first,gradual",
    "dropout=0.25",
    "lr_ratio=1.0",
    "augment=color",
    "label_smoothing=0.0",
)
MODELS = ("single", "ensemble")
SEARCH_SHARE = 0.97  # of the time, for a search that nothing but an ensemble follows
_ONE = "--only-theirs"  # runs the second arm, in a process of its own


def main() -> None:
    """Make the runs that are missing, then print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--tutorial", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most", type=int, help="end after so many runs")
    options = parser.parse_args()
    jobs = [(seed, arm) for seed in range(options.seeds) for arm in ARMS]
    done = {(int(r["seed"]), r["arm"]) for r in runs(options.minutes)}
    missing = [job for job in jobs if job not in done]
    for seed, arm in missing[: options.most]:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = run(arm, seed, options, Path(folder))
        wall = round(time.monotonic() - started)
        keep({"arm": arm, "seed": seed, "minutes": options.minutes, **found, "wall": wall})
    report(runs(options.minutes))


def run(arm: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One search in a process of its own; what it came to."""
    if arm == "tutorial":
        return run_tutorial(seed, options, folder)
    script = [str(ROOT / "tune" / "search.py")] if arm == "ours" else [__file__, _ONE]
    command = [
        sys.executable,
        *script,
        *("--data", str(options.data.absolute()), "--weights", str(options.weights.absolute())),
        *("--preset", "cpu", "--hours", f"{options.minutes / 60:.5f}", "--seed", str(seed)),
        *("--results", str(folder), "--study", "study", "--cache", str(folder / "cache")),
        *(part for text in SPACE for part in ("--set", text)),
        *(() if arm == "ours" else ("--confirm", "0")),
    ]
    subprocess.run(command, cwd=folder, check=True)
    study = Study(folder / "study")
    results = read_json(study.ensemble_file)
    holdout, records = results["holdout"], [r for r in study.records() if r.stage == "search"]
    images = holdout["images"]
    return {
        "trials": len(records),
        "whole": sum(r.state is State.COMPLETE for r in records),
        "images": images,
        **{f"{name} right": round(holdout[name]["value"] * images) for name in MODELS},
    }


def run_tutorial(seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The script, which leaves the holdout images of our split out of its training and is scored on them."""
    splits = open_dataset(options.data.absolute(), cache_dir=folder / "cache", max_size=32, seed=seed)
    holdout = splits.holdout
    assert holdout.labels is not None
    labels = folder / "holdout.csv"
    with labels.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Id", "Category"])
        writer.writerows((i, splits.classes[k]) for i, k in zip(holdout.ids, holdout.labels, strict=True))
    places = [str(path.absolute()) for path in (options.tutorial, options.data, options.weights)]
    command = [sys.executable, *places, str(labels), str(60 * options.minutes), str(seed)]
    ended = subprocess.run(
        command,
        cwd=folder,
        env=OUTSIDE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    line = re.search(r"trials (\d+) .* whole (\d+) .* hidden ([\d.]+)", ended.stdout)
    if ended.returncode or line is None:
        raise ValueError(f"{options.tutorial}: exit code {ended.returncode}, {ended.stdout[-2000:]}")
    right = round(float(line[3]) * len(holdout))
    return {
        "trials": int(line[1]),
        "whole": int(line[2]),
        "images": len(holdout),
        "single right": right,
        "ensemble right": "",
    }


class TutorialSearcher(OptunaSearcher):
    """TPE as Ray's tutorials use it, with no baseline first."""

    def __init__(self, *arguments: Any, seed: int, **named: Any) -> None:
        super().__init__(*arguments, seed=seed, **{**named, "queue": (), "fits": lambda config: True})
        self._ot_study.sampler = optuna.samplers.TPESampler(seed=seed)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A stopped trial is told as complete with its last value, as Ray's OptunaSearch does."""
        stopped = bool(result) and not error and not (result or {}).get("state")
        if stopped and trial_id in self._ot_trials and result and self.metric in result:
            self.on_trial_result(trial_id, result)
            self._tell(trial_id, result[self.metric])
        else:
            super().on_trial_complete(trial_id, result, error)


class TutorialScheduler(AshaScheduler):
    """ASHA with the tutorials' grace period, no clock, nobody protected."""

    def __init__(self, **named: Any) -> None:
        endless = TimeLimit(soft=math.inf, hard=math.inf)
        super().__init__(**{**named, "grace_period": 1, "time_limit": endless, "protect": ()})


def search_as_the_tutorial(arguments: list[str]) -> int:
    """`tune/search.py` with that search, and no stage but the ensemble after it."""
    search_stage.OptunaSearcher = TutorialSearcher  # type: ignore[misc]
    search_stage.AshaScheduler = TutorialScheduler  # type: ignore[misc]
    run_search.search_share = lambda **asked: SEARCH_SHARE
    confirmation.LATE_SHARE = 0.0  # no stage follows whose time a slow trial could have
    retraining.retrain_all = lambda *given, **named: True
    return search.main(arguments)


def runs(minutes: float | None = None) -> list[dict[str, str]]:
    """The runs that were made, or those of this length."""
    path = FOLDER / "real-runs.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if minutes in (None, float(row["minutes"]))]


def keep(found: dict[str, Any]) -> None:
    """Add a run to the file."""
    known = runs()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "real-runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*known, found])


def report(made: Iterable[Mapping[str, str]]) -> None:
    """Print and write right answers pooled over the splits, with 95 % intervals."""
    counts: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for row in made:
        for name in MODELS:
            if row[f"{name} right"]:
                counts[row["arm"], name].append((int(row[f"{name} right"]), int(row["images"])))
    shares = {
        key: proportion_interval(*(sum(column) for column in zip(*found, strict=True)))
        for key, found in counts.items()
    }
    names = ["arm", "model", "splits", "images", "holdout accuracy", "gain on the tutorial, points"]
    table, rows = Table(*names), []
    base = shares.get((ARMS[0], "single"))
    for (arm, name), found in counts.items():
        share = shares[arm, name]
        gain = described(difference(share, base)) if base and share is not base else ""
        images = sum(among for _, among in found)
        rows.append([arm, name, str(len(found)), str(images), described(share), gain])
        table.add_row(*rows[-1])
    Console(width=140).print(table)
    with (FOLDER / "real.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)


def difference(a: Interval, b: Interval) -> Interval:
    """a - b of independent shares, from their Wilson intervals (Newcombe, 1998, method 10)."""
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    return Interval(value, low, value + math.hypot(a.high - a.value, b.value - b.low))


def described(interval: Interval) -> str:
    """In points."""
    value, low, high = (100 * part for part in (interval.value, interval.low, interval.high))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    if _ONE in sys.argv:
        sys.exit(search_as_the_tutorial([a for a in sys.argv[1:] if a != _ONE]))
    main()

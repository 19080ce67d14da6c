"""python tests/benchmarks/bench_anytime.py --data ../shared/data/cars9 --weights ../shared/weights

Whole jobs of the same length: ours against an expert who does not search (expert.py). A quarter of the
labelled images is a test set that no arm sees. Both arms of a split run one after the other, with the machine
to themselves. Right answers are kept in results/anytime/answers.csv as a run ends, and it is not made again;
results/anytime/anytime.csv holds the differences, with intervals by bootstrap over splits, and over images
within each.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from bench_final import interval
from pseudo_test import make_pseudo_test, right_answers
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "results" / "anytime"
COLUMNS = ["data", "minutes", "split", "arm", "commit", "seconds", "id", "right"]
BLOCK = ["data", "minutes"]
EXPERT, OURS = "expert", "ours"


def main() -> None:
    """Make the runs that are missing, then print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="leave out to print the table of the runs that are there")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--splits", default="0,1,2,3,4", help="seeds of the test sets")
    parser.add_argument("--arms", default=f"{EXPERT},{OURS}")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", help="the expert's")
    parser.add_argument("--expert", type=Path, default=ROOT / "tests/benchmarks/expert.py")
    parser.add_argument("--suffix", default="", help="of the arms' names, where something was changed")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "bench-anytime")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the studies there")
    parser.add_argument("more", nargs="*", help="options of search.py, after --")
    options = parser.parse_args()
    if options.data:
        for split in map(int, options.splits.split(",")):
            make_missing(split, options)
    report(kept())


def kept() -> pd.DataFrame:
    """A row an image and run."""
    path = FOLDER / "answers.csv"
    return pd.read_csv(path, dtype={"id": str}) if path.is_file() else pd.DataFrame(columns=COLUMNS)


def make_missing(split: int, options: argparse.Namespace) -> None:
    """The arms of a split that were not run yet."""
    known = kept()
    same = (known["data"] == options.data.name) & (known["minutes"] == options.minutes)
    done = set(known[same & (known["split"] == split)]["arm"])
    missing = [arm for arm in options.arms.split(",") if arm + options.suffix not in done]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answers = make_pseudo_test(options.data, folder / "data", split=split, cache=options.cache)
        for arm in missing:
            started = time.monotonic()
            submissions = {EXPERT: run_expert, OURS: run_ours}[arm](folder, split, options)
            seconds = time.monotonic() - started
            found = [
                pd.DataFrame(
                    {
                        "data": options.data.name,
                        "minutes": options.minutes,
                        "split": split,
                        "arm": arm + what + options.suffix,
                        "commit": commit(),
                        "seconds": round(seconds),
                        "id": list(answers),
                        "right": right_answers(file, answers),
                    }
                )
                for what, file in submissions.items()
            ]
            FOLDER.mkdir(parents=True, exist_ok=True)
            pd.concat([kept(), *found]).to_csv(FOLDER / "answers.csv", index=False, lineterminator="\n")
            for part in found:
                print(f"{part['arm'][0]}: {100 * part['right'].mean():.1f} %, {seconds:.0f} s", flush=True)


def run_expert(folder: Path, split: int, options: argparse.Namespace) -> dict[str, Path]:
    """The expert's submission, under "" as the name's ending."""
    out = folder / "expert.csv"
    command = [
        *(sys.executable, str(options.expert), "--data", str(folder / "data")),
        *("--weights", str(options.weights.absolute()), "--minutes", str(options.minutes)),
        *("--backbone", options.backbone, "--seed", str(split), "--out", str(out)),
    ]
    subprocess.run(command, cwd=folder, check=True)
    return {"": out}


def run_ours(folder: Path, split: int, options: argparse.Namespace) -> dict[str, Path]:
    """Our submissions, by the ending of the arm's name. Nothing is cached from an earlier run."""
    name = f"{options.data.name}-{options.minutes:g}-{split}{options.suffix}"
    results = options.keep.absolute() if options.keep else folder / "results"
    command = [
        *(sys.executable, str(ROOT / "tune" / "search.py"), "--plain", "--seed", str(split)),
        *("--hours", str(options.minutes / 60), "--data", str(folder / "data")),
        *("--weights", str(options.weights.absolute()), "--results", str(results), "--study", name),
        *("--cache", str(folder / "cache"), *options.more),
    ]
    subprocess.run(command, cwd=folder, check=True)
    return {"": results / name / "submission.csv"}


def commit() -> str:
    """The commit that runs, short; with a + where files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def report(known: pd.DataFrame) -> None:
    """Print and write each arm's share of right answers, and its difference to the expert's, in points."""
    names = [*BLOCK, "arm", "splits", "right", "less the expert", "95 % interval", "by split"]
    rows = []
    for block, part in known.groupby(BLOCK):
        wide = part.pivot_table(index=["split", "id"], columns="arm", values="right")
        for arm in wide:
            row = [*map(str, block), arm, "", f"{100 * wide[arm].mean():.1f}", "", "", ""]
            row[3] = str(wide[arm].dropna().index.get_level_values("split").nunique())
            if arm != EXPERT and EXPERT in wide:
                gain = (wide[arm] - wide[EXPERT]).dropna()
                by_split = [100 * g.to_numpy() for _, g in gain.groupby(level="split")]
                found = interval(by_split)
                row[5:] = [f"{found.value:+.1f}", f"{found.low:+.1f} to {found.high:+.1f}", ""]
                row[7] = ", ".join(f"{g.mean():+.1f}" for g in by_split)
            rows.append(row)
    table = Table(*names)
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "anytime.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)


if __name__ == "__main__":
    main()

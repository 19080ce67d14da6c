"""python tests/benchmarks/bench_final.py --data ../shared/data/cars9 --weights ../shared/weights

Whole jobs of the same length from several splits: is the ensemble better than the search's best trial and
than the best single model, which may be a retrained one, and by how much than the baseline? Each
is chosen on val. Right and wrong answers on each split's holdout images are kept in results/final/answers.csv
as a run ends, and a run of this length is not made again; results/final/final.csv holds what all of them come
to. Intervals are by bootstrap over splits, and over images within each.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from carmodels.evaluation.intervals import Interval
from carmodels.files import read_json
from carmodels.study import Study

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "results" / "final"
MODELS = ("ensemble", "single", "trial", "baseline")
COMPARED = (  # and the target
    ("ensemble", "trial", 0.0),
    ("ensemble", "single", None),
    ("ensemble", "baseline", 3.0),
    ("trial", "baseline", None),
)
RESAMPLES = 10_000


def main() -> None:
    """Make the runs that are missing, then print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--most", type=int, help="end after so many runs")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the studies there")
    parser.add_argument("--only-report", action="store_true", help="no runs, only the table")
    options = parser.parse_args()
    kept = answers()
    known, others = kept[kept["hours"] == options.hours], kept[kept["hours"] != options.hours]
    missing = [seed for seed in range(options.seeds) if seed not in set(known["seed"])]
    for seed in [] if options.only_report else missing[: options.most]:
        with tempfile.TemporaryDirectory() as folder:
            found = run(seed, options, Path(folder))
            known = pd.concat([known, found])
            FOLDER.mkdir(parents=True, exist_ok=True)
            both = pd.concat([others, known])
            both.to_csv(FOLDER / "answers.csv", index=False, lineterminator="\n")
            if options.keep:
                shutil.copytree(Path(folder) / "study", options.keep / f"seed-{seed}", dirs_exist_ok=True)
    if len(known):
        usual = options.hours == parser.get_default("hours")
        report(known, "final" if usual else f"final-{options.hours:g}-hours")


def answers() -> pd.DataFrame:
    """A row an image and split: 1 where the model's answer was right, else 0."""
    path = FOLDER / "answers.csv"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["seed", "hours", "id", *MODELS])


def run(seed: int, options: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """One whole job in a process of its own; which of its holdout images each model that it has got right."""
    command = [
        *(sys.executable, str(ROOT / "tune" / "search.py"), "--plain", "--hours", str(options.hours)),
        *("--data", str(options.data.absolute()), "--weights", str(options.weights.absolute())),
        *(
            "--seed",
            str(seed),
            "--results",
            str(folder),
            "--study",
            "study",
            "--cache",
            str(folder / "cache"),
        ),
    ]
    subprocess.run(command, cwd=folder, check=True)
    study = Study(folder / "study")
    labels = study.labels("holdout")
    ranked = study.leaderboard()
    reference = next((r.trial_id for r in ranked if r.baseline), None)
    trial = next(r.trial_id for r in ranked if r.stage == "search")
    single = read_json(study.ensemble_file)["val"]["single"]["trial_id"]
    found = pd.DataFrame({"seed": seed, "hours": options.hours, "id": list(labels)})
    for model, name in zip(MODELS, ("ensemble", single, trial, reference), strict=True):
        if name is None:
            found[model] = np.nan
            continue
        probs = study.predictions(name, "holdout").aligned(list(labels)).probs
        found[model] = (probs.argmax(axis=1) == np.array(list(labels.values()))).astype(int)
    return found


def report(known: pd.DataFrame, name: str) -> None:
    """Print and write shares of right answers over all splits and their differences, in points."""
    names = ["what", "splits", "answers", "points", "95 % interval", "by split", "target"]
    rows = []
    for model in MODELS:
        rows.append([model, *described(known, known[model], "")])
    for better, worse, target in COMPARED:
        aim = "" if target is None else f"low end above {target:g}" if target == 0 else f"at least {target:g}"
        rows.append([f"{better} less {worse}", *described(known, known[better] - known[worse], aim)])
    table = Table(*names)
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    with (FOLDER / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)


def described(known: pd.DataFrame, values: pd.Series, target: str) -> list[str]:
    """The cells of a row."""
    by_split = [100 * part.to_numpy(float) for _, part in values.groupby(known["seed"])]
    found = interval(by_split)
    means = ", ".join(f"{part.mean():.1f}" for part in by_split)
    counts = [str(len(by_split)), str(len(known))]
    return [*counts, f"{found.value:.1f}", f"{found.low:.1f} to {found.high:.1f}", means, target]


def interval(by_split: Sequence[np.ndarray]) -> Interval:
    """Mean over all answers, with a 95 % bootstrap interval over splits, and images within each.

    What another job would come to and what other images would are both in it (Davison and Hinkley, 1997,
    section 3.8).
    """
    rng = np.random.default_rng(0)
    means = [
        np.mean(
            [
                rng.choice(by_split[k], len(by_split[k])).mean()
                for k in rng.integers(0, len(by_split), len(by_split))
            ]
        )
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(np.concatenate(by_split).mean()), float(low), float(high))


if __name__ == "__main__":
    main()

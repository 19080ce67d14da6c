"""What every benchmark ends with: a table on the screen and a CSV that says on what it was measured."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tune.runtime.environment import MALLOC

FOLDER = Path(__file__).parents[2] / "results" / "benchmarks"


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` is how many times better ours is; empty where a row only reports."""

    case: str
    ours: float
    theirs: float | str
    ratio: float | str
    target: float | str
    runs: int
    unit: str


def as_in_a_worker() -> None:
    """Start this script again with what the workers of a search are started with, unless that was done."""
    if os.environ.get("CARMODELS_BENCHMARK") != "1":
        environment = {**os.environ, **MALLOC, "CARMODELS_BENCHMARK": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def asked(doc: str | None, add: Callable[[argparse.ArgumentParser], object]) -> argparse.Namespace:
    """A script's options: those that `add` adds, and --data with --weights, which go together."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="images to measure on instead of the demo's")
    parser.add_argument("--weights", help="folder of pretrained weights for them")
    add(parser)
    options = parser.parse_args()
    if (options.data is None) != (options.weights is None):
        parser.error("--data and --weights go together")
    return options


def measured_on(*packages: str) -> dict[str, str]:
    """The last columns of every table: hardware, and versions of the packages."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    return {"hardware": f"{os.cpu_count()} cores, {processor()}", "versions": versions}


def finish(name: str, rows: Sequence[Row]) -> None:
    """Print the rows and write them to results/benchmarks/<name>.csv; cases not measured now stay there."""
    on = measured_on("torch", "timm", "albumentations", "ray")
    table = Table(title=f"{name}: {on['hardware']}, {on['versions']}", title_justify="left")
    names = [f.name for f in fields(Row)]
    for column in names:
        table.add_column(column)
    path = FOLDER / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _written(path)
    for row in rows:
        shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in asdict(row).items()}
        known[row.case] = {**shown, **on}
        table.add_row(*shown.values())
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, *on], lineterminator="\n")
        writer.writeheader()
        writer.writerows(known.values())
    Console(width=150).print(table)


def _written(path: Path) -> dict[str, dict[str, str]]:
    """The rows of an earlier run, by case."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if os.name == "posix" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

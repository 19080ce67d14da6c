"""A script answers --help and a wrong option at once: each stage imports what is heavy for itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("search", "retrain", "ensemble", "report", "predict", "distil")
HEAVY = {
    "albumentations",
    "altair",
    "cv2",
    "huggingface_hub",
    "imagehash",
    "jinja2",
    "numpy",
    "optuna",
    "pandas",
    "PIL",
    "ray",
    "rich",
    "scipy",
    "sklearn",
    "timm",
    "torch",
    "torchvision",
    "vl_convert",
}
RUN = """
import json, runpy, sys
path, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_path(path, run_name="__main__")
except SystemExit as end:
    print(json.dumps([end.code, list(sys.modules)]), file=sys.stderr)
"""
OPTIONS = "carmodels.presets", "carmodels.space", "carmodels.catalog", "carmodels.training.config"
WORKER = "tune.runtime.worker", "tune.runtime.profiling", "tune.finalize.soups", "tune.finalize.views"


def python(*arguments: str) -> tuple[str, str]:
    """What a process of its own prints, and its errors."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True, timeout=200)
    return done.stdout, done.stderr


def packages(modules: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def ended(script: str, *arguments: str) -> tuple[int, set[str], list[str]]:
    """Exit code of a script that ends early, the packages it has imported, and the lines it prints."""
    printed, errors = python("-c", RUN, str(ROOT / "tune" / f"{script}.py"), *arguments)
    *lines, last = errors.splitlines()
    code, modules = json.loads(last)
    return code, packages(modules), [*printed.splitlines(), *lines]


def imported_by(*modules: str) -> set[str]:
    """The packages that a process has imported once it has imported these modules."""
    printed, _ = python("-c", f"import sys, {', '.join(modules)}; print(*sys.modules)")
    return packages(printed.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy_and_ends_with_an_example(script: str) -> None:
    code, imported, lines = ended(script, "--help")
    assert code == 0
    assert not imported & HEAVY
    assert [line for line in lines if line.startswith(f"  python tune/{script}.py")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistyped_option_imports_nothing_heavy_and_is_one_line(script: str) -> None:
    study = [] if script == "search" else ["results/none"]
    code, imported, lines = ended(script, *study, "--frobnicate")
    assert (code, lines) == (2, ["error: unrecognized arguments: --frobnicate; --help lists the options"])
    assert not imported & HEAVY


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("search --hours -1", "--hours -1.0 must be above 0"),
        ("search --workers 0", "--workers 0 must be at least 1"),
        ("search --gpus-per-trial 2", "--gpus-per-trial 2 must be above 0"),
        ("search --cache-limit 0", "--cache-limit 0 must be above 0"),
        ("search --weights /no/such", "--weights /no/such is no folder"),
        ("search --set colour=red", "--set colour=red: expected NAME=V"),
        ("search --set lr=fast", "--set lr: 'fast' is no float"),
        ("retrain results/none --seeds 0", "--seeds 0 must be at least 1"),
        ("retrain results/none --set tempo=2", "--set tempo=2: expected NAME=V"),
        ("ensemble results/none --top 0", "--top 0 must be from 1 to 12"),
        ("ensemble results/none --out /no/such/file", "--out /no/such/file must name a file"),
        ("report results/none --port 80", "--port 80 is for --serve"),
        ("predict results/none", "there is nothing to do"),
        ("distil results/none --epochs 0", "--epochs 0 must be from 1 to 10000"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_before_anything_heavy_is_imported(
    command: str, words: str
) -> None:
    code, imported, lines = ended(*command.split())
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {words}")
    assert not imported & HEAVY


def test_what_options_are_made_of_needs_nothing_heavy() -> None:
    assert not imported_by(*OPTIONS) & HEAVY


def test_a_report_without_thumbnails_needs_neither_torch_nor_ray() -> None:
    assert not imported_by("tune.commands.run_report") & {"albumentations", "cv2", "ray", "timm", "torch"}


def test_a_worker_imports_what_it_trains_with_and_no_more() -> None:
    imported = imported_by(*WORKER)
    assert {"albumentations", "ray", "timm", "torch"} <= imported
    assert not imported & {"altair", "imagehash", "jinja2", "optuna", "tensorboardX", "vl_convert"}
    assert "rich" not in imported - imported_by("ray.tune")  # which imports it for its own progress bars

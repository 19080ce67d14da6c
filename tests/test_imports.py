"""The house rules of who may import whom, held by reading the imports."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "carmodels").glob("*.py"))
SCRIPTS = ("search", "retrain", "ensemble", "report", "predict", "distil", "pretrain_demo")
NEVER = {
    "space": {"numpy", "torch"},
    "predictions": {"torch"},
    "study": {"torch"},
    "submission": {"torch"},
    "demo": {"torch"},
    "data": {"timm"},
    "images": {"timm"},
    "models": {"carmodels.data"},
    "training": {"carmodels.study", "carmodels.submission"},
}


def imported(path: Path) -> set[str]:
    """Every module a file imports, by its full dotted name and its first part."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names | {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_library_knows_nothing_of_ray_optuna_or_command_lines(path: Path) -> None:
    assert not imported(path) & {"ray", "optuna", "argparse", "tune"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_library_never_prints(path: Path) -> None:
    calls = [n.func for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert "print" not in {f.id for f in calls if isinstance(f, ast.Name)}


@pytest.mark.parametrize("stem", NEVER)
def test_module_leaves_alone_what_is_not_its_business(stem: str) -> None:
    assert not imported(ROOT / "carmodels" / f"{stem}.py") & NEVER[stem]


def test_catalog_needs_nothing_but_the_standard_library() -> None:
    assert {n.split(".")[0] for n in imported(ROOT / "carmodels/catalog.py")} <= sys.stdlib_module_names


@pytest.mark.parametrize("path", sorted((ROOT / "tune").glob("*.py")), ids=lambda p: p.stem)
def test_nothing_imports_the_scripts(path: Path) -> None:
    assert not imported(path) & {f"tune.{name}" for name in SCRIPTS}


@pytest.mark.parametrize("path", sorted((ROOT / "tune").glob("*.py")), ids=lambda p: p.stem)
def test_ray_tune_is_never_imported_under_our_own_name(path: Path) -> None:
    assert "ray.tune" not in {
        f"{n.module}.{a.name}"
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.ImportFrom)
        for a in n.names
        if (a.asname or a.name) == "tune"
    }

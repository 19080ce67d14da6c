"""The house rules: who may import whom, held by reading the imports."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "carmodels").rglob("*.py"))
TUNE = sorted((ROOT / "tune").rglob("*.py"))
SCRIPTS = ("search", "retrain", "ensemble", "report", "predict", "distil")
ABOVE = {  # the packages of tune/ that each may import, beside carmodels and its own
    "optim": set(),
    "budget": {"optim"},
    "runtime": {"optim", "budget"},
    "finalize": {"optim", "budget", "runtime"},
    "serving": set(),
    "monitor": {"optim", "budget", "runtime"},
    "reporting": {"optim"},
    "cli": {"optim", "budget", "runtime", "finalize", "monitor"},
    "commands": {"optim", "budget", "runtime", "finalize", "serving", "monitor", "reporting", "cli"},
}
PROVIDED_BY = importlib.metadata.packages_distributions()  # names of distributions by module
NEVER = {
    "space": {"numpy", "torch"},
    "catalog": {"numpy", "torch"},
    "training/config": {"numpy", "torch"},
    "records": {"torch"},
    "study": {"torch"},
    "submission": {"torch"},
    "evaluation": {"torch", "timm"},
    "demo": {"torch"},
    "data": {"timm"},
    "models": {"carmodels.data", "carmodels.study"},
    "training": {"carmodels.study", "carmodels.submission"},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def imported(path: Path) -> set[str]:
    """Every module a file imports, by its full dotted name and each part of it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.rsplit(".", n)[0] for name in names for n in range(name.count(".") + 1)}


def files_of(place: str) -> list[Path]:
    folder = ROOT / "carmodels" / place
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_knows_nothing_of_ray_optuna_or_command_lines(path: Path) -> None:
    assert not imported(path) & {"ray", "optuna", "argparse", "tune"}


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_never_prints(path: Path) -> None:
    calls = [n.func for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert "print" not in {f.id for f in calls if isinstance(f, ast.Name)}


@pytest.mark.parametrize("place", NEVER)
def test_module_leaves_alone_what_is_not_its_business(place: str) -> None:
    for path in files_of(place):
        assert not imported(path) & NEVER[place], path


def test_catalog_needs_nothing_but_the_standard_library() -> None:
    assert {n.split(".")[0] for n in imported(ROOT / "carmodels/catalog.py")} <= sys.stdlib_module_names


def test_the_top_level_of_tune_holds_only_what_a_person_runs() -> None:
    assert {p.stem for p in (ROOT / "tune").glob("*.py")} == {"__init__", *SCRIPTS}
    assert {p.name for p in (ROOT / "tune").iterdir() if p.is_dir()} - {"__pycache__"} == set(ABOVE)


@pytest.mark.parametrize("path", TUNE, ids=name_of)
def test_nothing_imports_the_scripts(path: Path) -> None:
    assert not imported(path) & {f"tune.{name}" for name in SCRIPTS}


@pytest.mark.parametrize("package", ABOVE)
def test_imports_go_one_way(package: str) -> None:
    for path in sorted((ROOT / "tune" / package).rglob("*.py")):
        others = {
            name.split(".")[1] for name in imported(path) if name.count(".") == 1 and name[:5] == "tune."
        }
        assert others - {package} <= ABOVE[package], path


def declared(requirements: list[str]) -> set[str]:
    """The names of distributions in a list of requirements, in lower case with dashes."""
    found = (re.match(r"[\w.-]+", text) for text in requirements)
    return {distribution_name(match[0]) for match in found if match}


def distribution_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def undeclared(nodes: Iterable[ast.AST], names: set[str]) -> set[str]:
    """The third-party modules that the nodes import and none of the named distributions provides."""
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    modules = {name.split(".")[0] for name in found} - sys.stdlib_module_names - {"carmodels", "tune"}
    return {m for m in modules if not names & {distribution_name(d) for d in PROVIDED_BY.get(m, ())}}


@pytest.mark.parametrize("path", [*LIBRARY, *TUNE], ids=name_of)
def test_what_is_imported_is_declared(path: Path) -> None:
    """What an extra brings is imported within functions alone, as it may be missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    always = declared(project["dependencies"])
    extras = declared(project["optional-dependencies"]["export"])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    within = {node for function in functions for node in ast.walk(function)}
    assert not undeclared([node for node in ast.walk(tree) if node not in within], always)
    assert not undeclared(within, always | extras)


def test_packages_form_no_circle() -> None:
    assert all(package not in ABOVE[below] for package, found in ABOVE.items() for below in found)


def test_no_module_name_is_there_twice() -> None:
    names = Counter(path.stem for path in [*LIBRARY, *TUNE] if path.stem != "__init__")
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("path", TUNE, ids=name_of)
def test_ray_tune_is_never_imported_under_our_own_name(path: Path) -> None:
    assert "ray.tune" not in {
        f"{n.module}.{a.name}"
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.ImportFrom)
        for a in n.names
        if (a.asname or a.name) == "tune"
    }

"""The wheel holds all of the two packages, and works where nothing else of the repository is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = (
    "carmodels/demo/weights/*",
    "tune/monitor/*.json",
    "tune/monitor/*.yml",
    "tune/reporting/templates/*",
    "tune/serving/templates/*",
)
IMPORT_ALL = """
import importlib, json, sys
print(json.dumps({name: importlib.import_module(name).__file__ for name in sys.argv[1:]}))
"""
pytestmark = pytest.mark.server


def tracked() -> list[Path]:
    """The files that git knows, as paths inside the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def shipped() -> set[str]:
    """The tracked files that the wheel is to hold."""
    return {path.as_posix() for path in tracked() if path.parts[0] in ("carmodels", "tune")}


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that nothing is left in the working tree."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    pip("wheel", "--no-build-isolation", "--wheel-dir", built, source)
    (file,) = built.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-compile", "--target", folder, wheel)
    return folder


def run(installed: Path, elsewhere: Path, *arguments: str) -> str:
    """What Python prints with the installed copy first on its path, in a folder without the repository."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_tracked_file_of_both_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == shipped()


@pytest.mark.parametrize("pattern", DATA)
def test_the_wheel_holds_data_files(wheel: Path, pattern: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)} & shipped()
    assert wanted
    assert wanted <= held


def test_every_module_of_the_installed_wheel_can_be_imported(installed: Path, tmp_path: Path) -> None:
    paths = sorted(Path(name).with_suffix("") for name in shipped() if name.endswith(".py"))
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    files = json.loads(run(installed, tmp_path, "-c", IMPORT_ALL, *modules))
    assert set(files) == set(modules)
    assert {Path(file) for file in files.values()} == {installed / f"{path}.py" for path in paths}


def test_the_installed_search_shows_its_help(installed: Path, tmp_path: Path) -> None:
    assert "--hours H" in run(installed, tmp_path, "-m", "tune.search", "--help")

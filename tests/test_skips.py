"""A skip that nobody allowed fails where --strict-skips is given, as in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SKIPPING = """
import pytest

def test_of_a_page():
    pytest.skip("needs chromium and chromedriver")

def test_as_root():
    pytest.skip("needs root, to mount a file system of its own")

@pytest.mark.skipif(True, reason="it fails today")
def test_marked():
    pass

@pytest.mark.xfail(reason="known")
def test_that_is_known_to_fail():
    assert False

def test_plain():
    pass
"""
WHOLE = 'import pytest\npytest.skip("not here", allow_module_level=True)\n'


def ran(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What pytest says of those tests with the plugin alone."""
    (folder / "tests").mkdir(exist_ok=True)
    (folder / "pytest.ini").touch()
    (folder / "tests" / "test_some.py").write_text(SKIPPING)
    (folder / "tests" / "test_whole.py").write_text(WHOLE)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "skips", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_without_the_option_a_skip_is_a_skip(tmp_path: Path) -> None:
    done = ran(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 4 skipped, 1 xfailed" in done.stdout


def test_with_it_a_skip_that_is_not_listed_fails_with_its_reason(tmp_path: Path) -> None:
    done = ran(tmp_path, "--strict-skips", "--continue-on-collection-errors")
    assert done.returncode == 1, done.stdout
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed, 2 errors" in done.stdout
    allowed = "which tests/allowed_skips.txt does not allow"
    for reason in ("needs root, to mount a file system of its own", "it fails today", "not here"):
        assert f"skipped ({reason}), {allowed}" in done.stdout


def test_every_line_of_the_list_names_a_test_and_a_reason_that_are_there() -> None:
    lines = (HERE / "allowed_skips.txt").read_text().splitlines()
    sources = {path: path.read_text() for path in HERE.rglob("*.py") if path.name != "test_skips.py"}
    for line in lines:
        if not line.startswith("#"):
            names, reason = line.split(maxsplit=1)
            files = [*HERE.glob("*.py"), *HERE.parent.glob(names.split("::")[0])]
            words = reason.rstrip("* ")
            assert any(words in sources[file] for file in files if file in sources), line

"""The computer's clock may be set while a search runs: the search keeps its time."""

from __future__ import annotations

import ast
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from carmodels.steady_clock import steady_time
from tune.budget.clock import Clock
from tune.runtime.runner import DeadlineStopper, Interrupts

ROOT = Path(__file__).parents[1]
HOURS = 3600.0


@pytest.mark.parametrize("jump", [-5 * HOURS, 5 * HOURS])
def test_a_clock_that_is_set_moves_no_deadline(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(steady_time(), HOURS)
    recorder: Any = SimpleNamespace(hopeless=False, fault=None)
    stopper = DeadlineStopper(clock.at(1.0), Interrupts(), recorder)
    monkeypatch.setattr(time, "time", lambda: time.monotonic() + jump)
    assert clock.left == pytest.approx(HOURS, abs=60)
    assert not stopper.stop_all()


def test_a_process_has_the_clock_of_the_one_that_started_it() -> None:
    """Also where the computer's clock was set in between: here, by the other process alone."""
    code = "import time; real = time.time; time.time = lambda: real() + 9e4; "
    code += "from carmodels.steady_clock import steady_time; print(steady_time())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert math.isclose(float(told.stdout), steady_time(), abs_tol=60)
    assert math.isclose(steady_time(), time.time(), abs_tol=60)
    assert "CARMODELS_CLOCK_OFFSET" in os.environ


def test_nothing_that_takes_time_asks_the_clock_that_can_be_set() -> None:
    allowed = {
        "carmodels/steady_clock.py",
        "carmodels/data/cache.py",  # compares with the times of files
        "tune/runtime/runner.py",  # a folder's name
    }
    asking = {
        path.relative_to(ROOT).as_posix()
        for package in ("carmodels", "tune")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "datetime.now")
    }
    assert asking <= allowed

"""The live view fits its terminal and says how the run stands; elsewhere the same is one plain line."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path

import pytest
from rich.console import Console

from carmodels.formatting import duration
from carmodels.records import Cause, State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Run
from tune.budget.clock import Clock
from tune.monitor.terminal_view import TerminalView, line, sparkline, take_snapshot
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.recorder import Recorder

RUN = Run(TrialConfig("mobilenetv2_100", image_size=160, epochs=8, unfreeze="gradual"))


def epochs(*values: float) -> list[EpochMetrics]:
    return [EpochMetrics(e, 1.0, 1.0, v, v, 2.5) for e, v in enumerate(values, 1)]


def ended(seed: int, state: State, value: float | None, cause: Cause | None = None) -> TrialRecord:
    run = RUN.with_origin(seed=seed)
    return TrialRecord(run.id, run.config, state, 3, value, 9.0, "", cause=cause, origin=run.origin)


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    """Two trials run, one of them in its first epoch."""
    recorder = Recorder(Study(tmp_path), "search", 0.0, {}, ProgressCallback())
    recorder.running = {"a": epochs(0.1, 0.5, 0.7), "b": []}
    recorder.runs = {"a": RUN, "b": RUN.with_config(image_size=96)}
    return recorder


ENDED = [
    ended(1, State.COMPLETE, 0.61),
    ended(2, State.COMPLETE, 0.83),
    ended(3, State.PRUNED, 0.9),
    ended(4, State.FAILED, None, Cause.ERROR),
    ended(5, State.FAILED, None, Cause.DIVERGED),
]


def shown(recorder: Recorder, width: int, height: int = 25, seconds: float = math.inf) -> str:
    clock = Clock(time.time() - 30, seconds)
    now = take_snapshot(ENDED, recorder, "accuracy", clock, 20)
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system=None)
    console.print(TerminalView(now))
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 150])
def test_the_view_fits_the_terminal_and_names_what_runs(recorder: Recorder, width: int) -> None:
    lines = shown(recorder, width, seconds=3630).splitlines()
    assert max(len(row) for row in lines) <= width
    text = "\n".join(lines)
    assert "5 of 20 trials ended, 2 running" in text
    assert "3/8" in text
    assert "0/8" in text
    if width >= 80:
        assert "best accuracy 0.8300  mobilenetv2_100 160px head0 gradual" in text
        assert "1 stopped, 2 failed" in text
        assert "30 s used, 60 min left" in text
        assert "▁▆█" in text
    if width >= 150:
        assert "1.0e-03" in text


def test_more_trials_than_lines_are_counted(recorder: Recorder) -> None:
    recorder.running = {str(i): epochs(0.5) for i in range(30)}
    recorder.runs = {str(i): RUN.with_origin(seed=i) for i in range(30)}
    text = shown(recorder, 100, height=17)
    assert "and 20 more" in text
    assert len(text.splitlines()) <= 17


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time stands still."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)


@pytest.mark.usefixtures("still")
def test_the_plain_line_says_the_same(recorder: Recorder) -> None:
    recorder.recorded = set("12345")
    now = take_snapshot(ENDED, recorder, "accuracy", Clock(time.time() - 30), 20)
    assert line(now) == (
        "search: 5 of 20 trials ended, 2 running, 1 stopped, 2 failed, "
        "best 0.8300 (mobilenetv2_100 160px head0 gradual), epochs 3/8 0/8, 30 s used, 90 s left"
    )


@pytest.mark.usefixtures("still")
def test_a_resumed_search_is_as_fast_as_the_trials_since_it_began(recorder: Recorder) -> None:
    assert line(take_snapshot(ENDED, recorder, "accuracy", Clock(time.time() - 30), 20)).endswith("30 s used")
    recorder.recorded = {"5"}
    now = take_snapshot(ENDED, recorder, "accuracy", Clock(time.time() - 30), 20)
    assert line(now).endswith("30 s used, 8 min left")


def test_trials_that_ran_out_of_time_are_stopped_ones_too(recorder: Recorder) -> None:
    late = ended(6, State.OUT_OF_TIME, 0.95)
    now = take_snapshot([*ENDED, late], recorder, "accuracy", Clock(time.time()), 20)
    assert now.stopped == 2
    assert now.best == ENDED[1]


def test_a_metric_to_minimise_has_its_lowest_as_the_best(recorder: Recorder) -> None:
    now = take_snapshot(ENDED, recorder, "log_loss", Clock(time.time()), None)
    assert now.best is not None
    assert now.best.value == 0.61


def test_a_sparkline_has_a_bar_for_each_value_and_ends_with_the_last() -> None:
    assert sparkline([0.0, 0.5, 1.0], 0, 1, 8) == "▁▅█"
    assert sparkline([0.0, math.nan, 1.0], 0, 1, 8) == "▁ █"
    assert sparkline([0.3, 0.3], 0.3, 0.3, 8) == "▅▅"
    assert sparkline([i / 99 for i in range(100)], 0, 1, 8)[-1] == "█"
    assert len(sparkline([i / 99 for i in range(100)], 0, 1, 8)) == 8


@pytest.mark.parametrize(
    ("seconds", "words"), [(-3, "0 s"), (45, "45 s"), (720, "12 min"), (12_600, "3.5 h")]
)
def test_durations_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words

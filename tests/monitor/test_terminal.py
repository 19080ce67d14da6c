"""Tables and lines reach whoever reads them, and a run goes on where nobody does."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.run import Run
from tune.monitor.terminal import Screen

RUN = Run(TrialConfig("mobilenetv2_100", image_size=160, epochs=8, unfreeze="gradual"))


class Terminal(io.StringIO):
    """Takes what is written, as a terminal does."""

    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    """A pipe that nobody reads, or a full disk."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def flush(self) -> None:
        raise self.error


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study with one complete trial."""
    study = Study(tmp_path / "a")
    study.begin({"metric": "accuracy"}, [])
    study.append(
        TrialRecord(RUN.id, RUN.config, State.COMPLETE, 8, 0.75, 20.0, "ran its 8 epochs", origin=RUN.origin)
    )
    return study


@pytest.mark.parametrize(("term", "columns"), [("dumb", "200"), ("xterm", "1"), ("xterm", "200")])
def test_a_table_is_not_cut_to_letters(
    term: str, columns: str, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", columns)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    Screen().table(study)
    lines = terminal.getvalue().splitlines()
    assert len(lines) == 6  # title, header, one row, three borders
    assert "mobilenetv2_100" in lines[4]


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")]
)
def test_what_nobody_reads_is_dropped(error: OSError, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Closed(error))
    screen = Screen()
    screen.say("a line")
    assert screen.console.quiet
    screen.table(study)

"""The terminal's tables and lines: what they say, and that they reach whoever reads them."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from carmodels.holdout import add_look
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
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


def results(value: float) -> dict[str, Any]:
    score = {"value": value, "low": value - 0.05, "high": value + 0.05}
    member = {"trial_id": "a", "title": "a model", "stage": "search", "weight": 1.0, "gain": 0.0, "val": 0.9}
    return {
        "metric": "accuracy",
        "members": [{**member, "temperature": 1.0, "seconds_per_1000": 1.0}],
        "tta": {"views": ["plain"]},
        "cost": {"seconds_per_1000": 1.0, "device": "cpu", "cores": 1},
        "holdout": {"ensemble": score, "single": score, "baseline": score, "images": 60},
        "hidden": {**score, "images": 7},
    }


def test_a_later_look_at_holdout_is_printed_below_the_first_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [])
    first = add_look(study, "ensemble", results(0.8))
    Screen(plain=True).answer(results(0.8), study)
    once = capsys.readouterr().out
    assert "accuracy on holdout (60 images kept aside, 95 % intervals):\n" in once
    assert "looked at" not in once
    later = add_look(study, "ensemble", results(0.9))
    Screen(plain=True).answer(results(0.9), study)
    twice = capsys.readouterr().out
    assert (
        f"95 % intervals), first look ({first.at}):\n  ensemble                80.0 % (75.0 to 85.0)" in twice
    )
    assert f"look 2 ({later.at}) at an ensemble, 90.0 % (85.0 to 95.0)." in twice
    assert twice.count("90.0 %") == 1
    assert "Expected on the 7 hidden images, in 95 of 100: 80.0 % (75.0 to 85.0)." in twice


@pytest.mark.parametrize(
    ("metric", "said"), [("accuracy", "+3.4 points (-1.0 to +8.0)"), ("log_loss", "+0.0340 nats (-0.0100 to")]
)
def test_a_gain_is_told_in_points_and_no_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str, said: str
) -> None:
    gain = {"value": 0.034, "low": -0.01, "high": 0.08}
    found = results(0.9)
    found |= {"metric": metric, "holdout": {**found["holdout"], "gain_over_baseline": gain}}
    study = Study(tmp_path)
    study.begin({"metric": metric}, [])
    add_look(study, "ensemble", found)
    Screen().answer(found, study)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "gain over the" in line]
    assert line.split("baseline")[1].strip().startswith(said)
    assert "%" not in line


def test_batches_in_parts_are_in_the_table_where_there_are_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [])
    for microbatches, value in ((1, 0.7), (4, 0.6)):
        run = Run(TrialConfig("test_resnet", image_size=32, epochs=1, batch_size=8 * microbatches))
        curve = (EpochMetrics(1, 1.0, 1.0, value, value, 2.0, microbatches=microbatches),)
        study.append(
            TrialRecord(run.id, run.config, State.COMPLETE, 1, value, 2.0, "ran", note="noted", curve=curve)
        )
    Screen(plain=True).table(study)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    notes = [line[line.index("noted") :].rstrip(" │┃") for line in lines if "noted" in line]
    assert notes == ["noted", "noted; batches in 4 parts (memory)"]

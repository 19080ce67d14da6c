"""The tables that a search prints at its end, and what it says of an ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from carmodels.holdout import add_look
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Run
from tune.monitor.terminal import Screen


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

"""What the terminal says at the end of a search is so, in the unit that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from carmodels.study import Study
from tune.monitor.terminal import Screen


@pytest.mark.parametrize(
    ("metric", "said"), [("accuracy", "+3.4 points (-1.0 to +8.0)"), ("log_loss", "+0.0340 nats (-0.0100 to")]
)
def test_a_gain_is_told_in_points_and_no_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str, said: str
) -> None:
    interval = {"value": 0.9, "low": 0.85, "high": 0.94}
    gain = {"value": 0.034, "low": -0.01, "high": 0.08}
    holdout = dict.fromkeys(("ensemble", "single", "baseline"), interval)
    results = {
        "metric": metric,
        "members": [],
        "cost": {"seconds_per_1000": 1.0, "device": "cpu", "cores": 2},
        "holdout": {**holdout, "gain_over_baseline": gain, "images": 60, "looks": 1},
    }
    Screen().answer(results, Study(tmp_path))
    [line] = [line for line in capsys.readouterr().out.splitlines() if "gain" in line]
    assert line.split("baseline")[1].strip().startswith(said)
    assert "%" not in line

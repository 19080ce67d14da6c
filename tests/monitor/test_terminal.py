"""The tables that a search prints at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Run
from tune.monitor.terminal import Screen


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

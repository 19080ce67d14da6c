"""What a new study writes down of its data."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path

from carmodels.data.dataset import Splits
from carmodels.study import Study
from tune.cli.study_folder import split_rows


def test_a_study_knows_the_near_duplicates_that_the_data_set_found(splits: Splits, tmp_path: Path) -> None:
    images = copy(splits.images)
    images.groups[splits.val.rows[1]] = images.groups[splits.val.rows[0]]
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, split_rows(replace(splits, images=images)))
    groups = study.groups(study.labels("val"))
    assert groups[0] == groups[1]
    assert groups.tolist() == images.groups[splits.val.rows].tolist()

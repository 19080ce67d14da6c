"""Each look at holdout is kept, and the first is quoted, whatever is looked at later."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from carmodels.files import write_json
from carmodels.holdout import add_look, later_looks, later_sentence, looks, quoted_look, quoted_suffix
from carmodels.study import Study


def results(value: float, answer: str = "ensemble", looks: int | None = None) -> dict[str, Any]:
    """What a results file holds of an answer with this score on holdout."""
    score = {"value": value, "low": value - 0.05, "high": value + 0.05}
    return {
        "metric": "accuracy",
        "members": [{"trial_id": "a", "weight": 1.0}],
        "tta": {"views": ["plain", "flip"]},
        "holdout": {answer: score, "images": 60} | ({"looks": looks} if looks else {}),
        "hidden": {**score, "images": 7},
    }


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [])
    return study


def test_the_first_look_is_quoted_and_later_ones_are_kept_with_their_date(study: Study) -> None:
    for value in (0.8, 0.9, 0.85):
        add_look(study, "ensemble", results(value))
    assert [look.scores["ensemble"]["value"] for look in looks(study)] == [0.8, 0.9, 0.85]
    assert [look.number for look in looks(study)] == [1, 2, 3]
    assert all(look.at for look in looks(study))
    first = quoted_look(study, "ensemble")
    assert (first, first.members, first.views) == (looks(study)[0], {"a": 1.0}, ("plain", "flip"))
    assert first.hidden == results(0.8)["hidden"]
    assert quoted_suffix(study, "ensemble") == f", first look ({first.at})"
    last = later_looks(study, "ensemble")[-1]
    assert later_sentence(study, "ensemble") == (
        "Holdout was looked at 3 times. Not to quote, as earlier looks may have led to it: "
        f"look 3 ({last.at}) at an ensemble, 85.0 % (80.0 to 90.0)."
    )


def test_the_only_look_needs_no_words(study: Study) -> None:
    add_look(study, "ensemble", results(0.8))
    assert (quoted_suffix(study, "ensemble"), later_sentence(study, "ensemble")) == ("", "")


def test_students_look_at_the_same_holdout(study: Study) -> None:
    add_look(study, "ensemble", results(0.8))
    for value in (0.7, 0.75):
        add_look(study, "student", results(value, "student"))
    first = quoted_look(study, "student")
    assert (first.number, first.scores["student"]["value"]) == (2, 0.7)
    assert quoted_suffix(study, "student").endswith(", the first at a student that is on record")
    assert "looked at 3 times" in later_sentence(study, "student")
    assert later_sentence(study, "ensemble") == ""


def test_a_study_of_before_is_read_and_what_it_kept_is_kept(study: Study) -> None:
    write_json(study.ensemble_file, results(0.9, looks=3))
    write_json(study.results_file("student"), results(0.7, "student", looks=2))
    assert [(look.number, look.answer, look.at) for look in looks(study)] == [
        (3, "ensemble", ""),
        (5, "student", ""),
    ]
    assert quoted_suffix(study, "ensemble") == ", look 3, the first at an ensemble that is on record"
    before = looks(study)
    added = add_look(study, "ensemble", results(0.95))
    write_json(study.ensemble_file, results(0.95, looks=added.number))
    assert looks(study) == [*before, added]
    assert added.number == 6
    assert quoted_look(study, "ensemble").scores["ensemble"]["value"] == 0.9


def test_a_look_that_was_cut_off_as_it_was_written_hides_no_other(study: Study) -> None:
    add_look(study, "ensemble", results(0.8))
    add_look(study, "ensemble", results(0.9))
    os.truncate(study.holdout_file, study.holdout_file.stat().st_size - 20)
    assert [look.number for look in looks(study)] == [1]
    add_look(study, "ensemble", results(0.85))
    assert [look.scores["ensemble"]["value"] for look in looks(study)] == [0.8, 0.85]


def test_where_the_list_is_lost_the_results_file_is_quoted(study: Study) -> None:
    write_json(study.ensemble_file, results(0.9, looks=1))
    study.holdout_file.write_text("no line of ours\n")
    assert looks(study) == []
    assert quoted_look(study, "ensemble").scores["ensemble"]["value"] == 0.9

"""A submission has the ids, order and header of the sample file, or is refused with the ids at fault."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carmodels.evaluation.predictions import Predictions
from carmodels.submission import read_sample, write_submission

CLASSES = ("0", "7", "10")
# file names hold no control characters, and text that is no Unicode cannot be in a UTF-8 file
TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)


def predicted(answers: dict[str, str]) -> Predictions:
    guesses = [CLASSES.index(answer) for answer in answers.values()]
    return Predictions(tuple(answers), CLASSES, 0.8 * np.eye(3)[guesses] + 0.2 / 3)


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))


def table(rows: list[list[str]], lineterminator: str = "\n") -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=lineterminator).writerows(rows)
    return text.getvalue()


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample-submission.csv"
    path.write_text("Id,Category\nb.jpg,0\na.jpg,0\nc.jpg,0\n")
    return path


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ids_come_out_in_the_order_and_under_the_header_of_the_sample(
    tmp_path: Path, data: st.DataObject
) -> None:
    answers = data.draw(st.dictionaries(TEXT, st.sampled_from(CLASSES), min_size=1, max_size=8))
    order = data.draw(st.permutations(list(answers)))
    header = data.draw(st.lists(TEXT, min_size=2, max_size=2))
    bom, end = data.draw(st.sampled_from(["", "\ufeff"])), data.draw(st.sampled_from(["\n", "\r\n"]))
    sample, out = tmp_path / "sample.csv", tmp_path / "out.csv"
    sample.write_bytes((bom + table([header, *([name, "0"] for name in order)], end)).encode())

    write_submission(predicted(answers), out, sample=sample)

    assert rows_of(out) == [header, *([name, answers[name]] for name in order)]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.dictionaries(TEXT, st.sampled_from(CLASSES), max_size=8))
def test_without_a_sample_the_rows_follow_the_predictions(tmp_path: Path, answers: dict[str, str]) -> None:
    write_submission(predicted(answers), tmp_path / "out.csv", sample=None)
    assert rows_of(tmp_path / "out.csv") == [["Id", "Category"], *map(list, answers.items())]


def test_the_file_is_to_the_byte_what_kaggle_takes(tmp_path: Path, sample: Path) -> None:
    write_submission(
        predicted({"a.jpg": "7", "b.jpg": "10", "c.jpg": "0"}), tmp_path / "out.csv", sample=sample
    )
    assert (tmp_path / "out.csv").read_bytes() == b"Id,Category\nb.jpg,10\na.jpg,7\nc.jpg,0\n"


@pytest.mark.parametrize("name", ["007", "1e5", "NA", "nan", "", " 1", "True", "1.0"])
def test_an_id_that_looks_like_something_else_stays_text(tmp_path: Path, name: str) -> None:
    (tmp_path / "sample.csv").write_text(f"Id,Category\n{name},0\nother,0\n")
    write_submission(
        predicted({"other": "0", name: "7"}), tmp_path / "out.csv", sample=tmp_path / "sample.csv"
    )
    assert rows_of(tmp_path / "out.csv")[1:] == [[name, "7"], ["other", "0"]]


def test_columns_keep_their_names_whatever_these_are(tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text(",\na,0\n")
    assert list(read_sample(tmp_path / "sample.csv").columns) == ["", ""]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a.jpg", "b.jpg"], r"^missing from the predictions: 'c\.jpg'$"),
        (
            ["a.jpg", "b.jpg", "c.jpg", "d.jpg"],
            r"^missing from the sample file .*sample-submission\.csv: 'd\.jpg'$",
        ),
        (
            ["a.jpg", "b.jpg", "x/c.jpg"],
            r"the predictions: 'c\.jpg'; missing from the sample file .*: 'x/c\.jpg'$",
        ),
        (
            ["a.jpg", "b.jpg", "C.JPG"],
            r"the predictions: 'c\.jpg'; missing from the sample file .*: 'C\.JPG'$",
        ),
    ],
)
def test_ids_of_one_side_only_are_refused_by_name(
    tmp_path: Path, sample: Path, ids: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_submission(predicted(dict.fromkeys(ids, "0")), tmp_path / "out.csv", sample=sample)
    assert not (tmp_path / "out.csv").exists()


def test_of_many_missing_ids_a_few_are_named_and_all_are_counted(tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text("Id,Category\n" + "".join(f"{n}.jpg,0\n" for n in range(661)))
    with pytest.raises(
        ValueError, match=r"'1\.jpg', '2\.jpg', '3\.jpg', '4\.jpg', '5\.jpg' \.\.\. \(660 in all\)$"
    ):
        write_submission(predicted({"0.jpg": "0"}), tmp_path / "out.csv", sample=tmp_path / "sample.csv")


def test_an_id_twice_in_the_sample_is_refused_by_name(sample: Path) -> None:
    with sample.open("a") as file:
        file.write("a.jpg,0\n")
    with pytest.raises(
        ValueError, match=r"more than once in the sample file .*sample-submission\.csv: 'a\.jpg'$"
    ):
        read_sample(sample)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a table"),
        (b"Id;Category\na;0\n", "must have two columns"),
        (b"Id,a,b\n1,0.5,0.5\n", "must have two columns"),
        (b"Id,Category\na,0,surplus\n", "not a table"),
        ("Id,Category\nschön,0\n".encode("latin-1"), "not a table"),
    ],
)
def test_a_sample_that_is_no_table_of_two_columns_is_refused_by_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "odd.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"odd\.csv .*{message}|odd\.csv {message}"):
        read_sample(tmp_path / "odd.csv")


def test_a_sample_that_is_not_there_is_said_to_be_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_sample(tmp_path / "nowhere.csv")

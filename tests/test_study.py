"""A study's folder keeps every trial, whatever happens to its last line, and its table says it all."""

from __future__ import annotations

import csv
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from carmodels.evaluation.predictions import Predictions
from carmodels.files import append_line, write_json
from carmodels.records import Cause, State, TrialRecord
from carmodels.study import VERSION, Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run

CONFIG = TrialConfig(backbone="lcnet_035", image_size=64, epochs=4)


def record(
    seed: int,
    value: float | None,
    state: State = State.COMPLETE,
    cause: Cause | None = None,
    stage: str = "search",
) -> TrialRecord:
    run = Run(CONFIG, Origin(seed=seed))
    curve = (
        EpochMetrics(1, 1.0, 0.9, 0.1, 0.1, 2.0),
        EpochMetrics(2, 0.8, 0.7, value or 0.0, value or 0.0, 2.0),
    )
    return TrialRecord(
        run.id,
        run.config,
        state,
        2,
        value,
        4.0,
        "ran its 2 epochs",
        cause=cause,
        stage=stage,
        origin=run.origin,
        curve=curve,
    )


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study(tmp_path / "study")
    study.begin(
        {"metric": "accuracy"}, [("val", "a,b.jpg", 1), ("holdout", "ü.jpg", 0), ("test", "t.jpg", -1)]
    )
    return study


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("value", "high"),
        ("seconds", "4"),
        ("epochs_run", None),
        ("trial_id", 5),
        ("stage", 5),
        ("curve", [5]),
    ],
)
def test_a_record_with_a_value_of_another_kind_is_a_damaged_line(
    key: str, value: object, study: Study
) -> None:
    study.append(record(1, 0.5))
    content = {**json.loads(record(2, 0.5).to_json()), key: value}
    append_line(study.trials_file, json.dumps(content))
    assert (len(study.records()), study.damaged_lines()) == (1, [2])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"split,id,label,group", b"split;id;label;group"),
        (b",1", b",one"),
        (b"val,", b","),
        (b"\n", b"\n,,,\n"),
    ],
)
def test_edited_splits_are_named_and_so_is_the_way_out(old: bytes, new: bytes, study: Study) -> None:
    path = study.folder / "splits.csv"
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match=r"splits\.csv is damaged: .*--resume writes it anew"):
        study.labels("val")


def test_lost_splits_are_named_and_so_is_the_way_out(study: Study) -> None:
    (study.folder / "splits.csv").unlink()
    with pytest.raises(ValueError, match=r"splits\.csv is missing; search.py --resume writes it anew"):
        study.labels("val")


def test_splits_that_another_program_saved_are_read(study: Study) -> None:
    """A spreadsheet adds a byte order mark and other line ends."""
    path, before = study.folder / "splits.csv", study.labels("val")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert study.labels("val") == before


def test_predictions_of_another_split_are_named(study: Study) -> None:
    other = Predictions(("b.jpg",), ("0", "1"), np.full((1, 2), 0.5))
    other.save(study.predictions_file("a", "val"))
    with pytest.raises(ValueError, match=r"missing from .*a\.val\.npz: 'a,b.jpg'; missing from splits.csv"):
        study.probs_and_labels("a", "val")


def test_predictions_that_are_no_npz_are_named_without_advice_of_numpy(study: Study) -> None:
    study.predictions_file("a", "val").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"a\.val\.npz is damaged \(it is no npz\); delete it"):
        study.predictions("a", "val")


def test_a_record_comes_back_as_it_was(study: Study) -> None:
    study.append(record(1, 0.5))
    assert study.records() == [record(1, 0.5)]
    failed = replace(record(2, None, State.FAILED, Cause.DIVERGED), repeats="0123456789ab", baseline=True)
    soup = replace(record(3, 0.6), cut_short=True, ingredients=("a", "b"))
    study.append(failed)
    study.append(soup)
    assert study.records()[1:] == [failed, soup]


def test_groups_of_near_duplicates_are_kept_with_the_split(study: Study) -> None:
    rows = [("val", "a", 1, 4), ("val", "b", 0, 4), ("train", "c", 0, 7), ("test", "a", -1, 9)]
    study.write_splits(rows)
    assert study.groups(["c", "b", "a"]).tolist() == [7, 4, 4]
    assert study.groups(study.labels("val")).tolist() == [4, 4]
    write_json(study.folder / "study.json", {**study.metadata, "data": "d", "weights": "none"})
    assert study.begin_stop_check().groups(["a", "b", "c"]).tolist() == [4, 4, 7]


def test_where_an_older_study_names_no_groups_each_image_is_its_own(study: Study) -> None:
    file = study.folder / "splits.csv"
    file.write_text("split,id,label\nval,a,1\nval,b,0\n")
    assert len(set(study.groups(["a", "b"]).tolist())) == 2


def test_the_last_line_of_a_trial_wins(study: Study) -> None:
    study.append(record(1, 0.4, State.INTERRUPTED))
    study.append(record(2, 0.6))
    study.append(record(1, 0.5))
    assert [(r.origin.seed, r.value) for r in study.records()] == [(2, 0.6), (1, 0.5)]


@pytest.mark.parametrize("kept", [1, 40, 200])
def test_a_torn_last_line_is_skipped_and_named_and_the_next_append_is_whole(study: Study, kept: int) -> None:
    study.append(record(1, 0.5))
    study.append(record(2, 0.6))
    lines = study.trials_file.read_bytes().splitlines(keepends=True)
    study.trials_file.write_bytes(lines[0] + lines[1][:kept])
    assert [r.origin.seed for r in study.records()] == [1]
    assert study.damaged_lines() == [2]
    study.append(record(3, 0.7))
    assert [r.origin.seed for r in study.records()] == [1, 3]


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 2), ("log_loss", 1)])
def test_the_leaderboard_holds_complete_trials_best_first(tmp_path: Path, metric: str, best: int) -> None:
    study = Study(tmp_path / metric)
    study.begin({"metric": metric}, [])
    for r in (
        record(1, 0.5),
        record(2, 0.6),
        record(3, 0.99, State.PRUNED),
        record(4, None, State.FAILED, Cause.DIVERGED),
    ):
        study.append(r)
    board = study.leaderboard()
    assert board[0].origin.seed == best
    assert len(board) == 2


def test_log_loss_breaks_ties_of_the_leaderboard_and_of_the_best_epoch(study: Study) -> None:
    def tied(seed: int, *losses: float) -> TrialRecord:
        curve = tuple(EpochMetrics(n, 1.0, loss, 0.5, 0.5, 2.0) for n, loss in enumerate(losses, start=1))
        return replace(record(seed, 0.5), curve=curve)

    soup = replace(record(4, 0.5), stage="soup", curve=())
    pruned = replace(tied(5, 0.1, 0.3), state=State.PRUNED)
    for r in (tied(1, 0.9, 0.9), soup, tied(2, 0.9, 0.6, 0.7), tied(3, 0.8, 0.8), pruned):
        study.append(r)
    assert [r.origin.seed for r in study.leaderboard()] == [2, 3, 1, 4]
    best, *_, last = study.table()
    assert (best["best_epoch"], best["val_loss"]) == (2, 0.6)
    assert last["best_epoch"] == 2  # a pruned trial has the value of its last epoch


def test_the_table_has_a_row_a_trial_and_a_column_a_hyperparameter(study: Study) -> None:
    for r in (
        record(3, 0.9, State.PRUNED),
        record(1, 0.5),
        record(2, 0.6),
        record(4, None, State.FAILED, Cause.OUT_OF_MEMORY),
    ):
        study.append(r)
    study.write_table()
    with study.table_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["seed"] for r in rows[:2]] == ["2", "1"]
    assert [r["rank"] for r in rows] == ["1", "2", "", ""]
    assert {(r["state"], r["cause"]) for r in rows[2:]} == {("pruned", ""), ("failed", "out_of_memory")}
    assert {f.name for f in fields(TrialConfig)} <= set(rows[0])
    assert {f.name for f in fields(Origin)} - {"data", "split", "metric"} <= set(rows[0])
    assert rows[0]["best_epoch"] == "2"
    assert rows[0]["reason"] == "ran its 2 epochs"


def test_only_the_best_trials_of_the_search_keep_their_weights(study: Study) -> None:
    for seed, stage in ((1, "search"), (2, "search"), (3, "search"), (4, "retrain")):
        study.append(record(seed, seed / 10, stage=stage))
        study.weights_file(record(seed, None).trial_id).write_bytes(b"w")
    study.append(replace(record(5, None), state=State.RUNNING))  # it has written them, and is to say so
    study.weights_file(record(5, None).trial_id).write_bytes(b"w")
    study.keep_weights(1, also=[record(1, None).trial_id])
    kept = [seed for seed in (1, 2, 3, 4, 5) if study.weights_file(record(seed, None).trial_id).is_file()]
    assert kept == [1, 3, 4, 5]


def test_members_of_an_ensemble_keep_their_weights_until_there_is_another(study: Study) -> None:
    for seed in (1, 2, 3):
        study.append(record(seed, seed / 10))
        study.weights_file(record(seed, None).trial_id).write_bytes(b"w")

    def kept() -> list[int]:
        study.keep_weights(1)
        return [seed for seed in (1, 2, 3) if study.weights_file(record(seed, None).trial_id).is_file()]

    write_json(study.ensemble_file, {"members": [{"trial_id": record(1, None).trial_id}]})
    assert kept() == [1, 3]
    study.ensemble_file.write_text("{")
    assert kept() == [3]


def test_labels_come_back_by_id(study: Study) -> None:
    assert study.labels("val") == {"a,b.jpg": 1}
    assert study.labels("holdout") == {"ü.jpg": 0}


def test_a_folder_that_is_no_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no study: it holds no study\.json"):
        _ = Study(tmp_path).metadata


@pytest.mark.parametrize(("written", "said"), [({}, "0.1"), ({"version": "0.9"}, "0.9")])
def test_a_study_of_another_version_is_refused(study: Study, written: dict[str, str], said: str) -> None:
    assert study.metadata["metric"] == "accuracy"
    write_json(study.folder / "study.json", {"metric": "accuracy", **written})
    message = f"was made by version {said} of this project, this is {VERSION}: use that version, or begin"
    with pytest.raises(ValueError, match=message):
        _ = study.metadata


def test_a_damaged_file_is_named(study: Study) -> None:
    (study.folder / "study.json").write_text("{")
    with pytest.raises(ValueError, match=r"study\.json is damaged"):
        _ = study.metadata

"""A trial's last report says how it ended, and the recorder writes down every ending there is."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from carmodels.data.dataset import Splits
from carmodels.models.weights import Weights
from carmodels.records import Status, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from tune.runtime import worker
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Workers
from tune.runtime.recorder import HOPELESS, Recorder


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [])
    return study


@pytest.fixture
def job(study: Study, splits: Splits, weights: Weights, tmp_path: Path) -> Job:
    return Job(study, splits, weights, Workers(1, 1, 0.0), tmp_path / "cache")


def reports(config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a trial reports, collected in place of Ray."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(worker, "report", seen.append)
    worker.train_trial(asdict(config), job)
    return seen


def test_a_finished_trial_reports_every_epoch_and_leaves_predictions_and_weights(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = reports(replace(config, epochs=3), job, monkeypatch)
    assert [r["epoch"] for r in seen] == [1, 2, 3]
    assert [r.get("status") for r in seen] == [None, None, "finished"]
    assert seen[-1]["best_value"] == max(r["accuracy"] for r in seen)
    epochs = np.cumsum([r["seconds"] for r in seen])  # each its own; `elapsed` is what the clock goes by
    assert all(r["elapsed"] >= seconds for r, seconds in zip(seen, epochs, strict=True))
    trial = seen[-1]["config_id"]
    assert [job.study.predictions(trial, split).ids for split in ("val", "holdout", "test")] == [
        job.splits.val.ids,
        job.splits.holdout.ids,
        job.splits.test.ids,
    ]
    assert job.study.weights_file(trial).is_file()


def test_a_trial_goes_on_from_the_weights_that_another_left(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reports(config, job, monkeypatch)[-1]
    onward = replace(config, seed=1, head_seed=0, epochs=1, lr=1e-8, continues=first["config_id"])
    [last] = reports(onward, job, monkeypatch)
    assert last["status"] == "finished"
    assert (
        last["train_loss"] < 0.8 * reports(replace(onward, continues=""), job, monkeypatch)[0]["train_loss"]
    )
    with pytest.raises(FileNotFoundError, match="nobody"):
        reports(replace(onward, continues="nobody"), job, monkeypatch)


def test_a_trial_ends_of_itself_before_the_time_is_up_and_leaves_its_best_epoch(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    [last] = reports(replace(config, epochs=9), replace(job, until=time.time()), monkeypatch)
    assert (last["status"], last["reason"]) == ("finished", "the time was up after epoch 1 of 9")
    assert job.study.weights_file(last["config_id"]).is_file()


def test_a_run_that_falls_short_of_one_before_it_leaves_that_one_s_files(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer, late = replace(config, epochs=9), replace(job, until=time.time())
    [last] = reports(longer, late, monkeypatch)
    file = job.study.weights_file(longer.id)
    ended = TrialRecord(longer.id, longer, Status.FINISHED, 2, 0.5, 1.0, last["reason"])
    for record, stays in ((replace(ended, epochs_run=1), False), (ended, True)):
        job.study.append(record)
        file.write_bytes(b"before")
        reports(longer, late, monkeypatch)
        assert (file.read_bytes() == b"before") == stays


def test_what_had_finished_before_is_not_said_to_run(study: Study, config: TrialConfig) -> None:
    done = TrialRecord(config.id, config, Status.FINISHED, 2, 0.5, 1.0, "the time was up after epoch 2 of 4")
    study.append(done)
    recorder = Recorder(study, "fold", 0.0, {}, ProgressCallback())
    told(recorder, "a", config, [0.1])
    assert study.records() == [done]
    told(recorder, "b", replace(config, seed=5), [0.1])
    assert [r.status for r in study.records()] == [Status.FINISHED, Status.RUNNING]


@pytest.mark.parametrize(("gpus", "expected"), [(0.0, []), (0.25, [0.25]), (1.0, [])])
def test_a_worker_keeps_to_its_share_of_a_gpu(
    gpus: float, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", taken.append)
    Workers(1, 1, gpus).take()
    assert taken == expected


def test_a_trial_uses_the_share_that_ray_has_granted_it(monkeypatch: pytest.MonkeyPatch) -> None:
    granted = SimpleNamespace(required_resources={"CPU": 4.0, "GPU": 0.25})
    context = SimpleNamespace(get_trial_resources=lambda: granted)
    monkeypatch.setattr(worker, "get_context", lambda: context)
    assert worker._own(Workers(2, 16, 1.0, packed=8)) == Workers(1, 4, 0.25)
    assert worker._own(Workers(2, 16, 0.5)) == Workers(2, 16, 0.5)


def test_a_diverged_trial_reports_the_worst_value_and_leaves_nothing(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    explosive = {"optimizer": "sgd", "lr": 10.0, "weight_decay": 10.0, "clip_norm": 0.0}
    wild = replace(config, epochs=5, batch_size=8, schedule="constant", **explosive)
    last = reports(wild, job, monkeypatch)[-1]
    assert (last["status"], last["best_value"]) == ("diverged", 0.0)
    assert last["reason"].startswith("the loss was not finite in epoch")
    assert not list((job.study.folder / "predictions").iterdir())


def told(recorder: Recorder, name: str, config: TrialConfig, values: list[float]) -> SimpleNamespace:
    """A trial of Ray's that has begun and reported these values."""
    trial = SimpleNamespace(
        trial_id=name, config=asdict(config), last_result={}, status="RUNNING", error_file=None
    )
    recorder.on_trial_start(0, [], trial)
    for epoch, value in enumerate(values, start=1):
        trial.last_result = {**asdict(EpochMetrics(epoch, 1.0, 1.0, value, value, 2.0)), "accuracy": value}
        recorder.on_trial_result(0, [], trial, trial.last_result)
    return trial


def test_a_worker_that_dies_before_its_trial_is_said_to_run_is_known_by_it(
    study: Study, config: TrialConfig
) -> None:
    def early(name: str, seed: int) -> Any:
        values = asdict(replace(config, seed=seed))
        return SimpleNamespace(trial_id=name, config=values, last_result={}, status="ERROR", error_file=None)

    seen: list[set[str]] = []
    recorder = Recorder(
        study, "search", 0.0, {}, ProgressCallback(on_step=lambda r: seen.append({*r.running} - {*r.configs}))
    )
    again, lost = early("a", 1), early("b", 2)
    recorder.on_trial_recover(0, [], again)
    recorder.on_step_end(0, [])
    assert seen == [set()]
    recorder.on_trial_start(0, [], again)
    again.last_result = {"status": "finished", "reason": "ran", "best_value": 0.1}
    recorder.on_trial_complete(0, [], again)
    recorder.on_trial_error(0, [], lost)
    assert [(r.status, r.reason) for r in study.records()] == [
        (Status.FINISHED, "ran (begun anew, first ended by: the worker died)"),
        (Status.FAILED, "the worker died"),
    ]


def test_every_ending_has_its_row(study: Study, config: TrialConfig, tmp_path: Path) -> None:
    recorder = Recorder(study, "search", 0.0, {"b": "rung at epoch 2"}, ProgressCallback())
    done, stopped, failed, cut, late = (
        told(recorder, name, replace(config, seed=number), [0.1, 0.3, 0.2])
        for number, name in enumerate("abcde")
    )
    done.last_result |= {"status": "finished", "reason": "ran its 3 epochs", "best_value": 0.3}
    recorder.on_trial_complete(0, [], done)
    recorder.on_trial_complete(0, [], stopped)
    failed.error_file = tmp_path / "error.txt"
    failed.error_file.write_text("Failure # 1\nTraceback\n  line\nRuntimeError: no memory\n\n")
    recorder.on_trial_error(0, [], failed)
    recorder.close([cut], interrupted=True)
    recorder.close([late], interrupted=False)
    rows = [(r.status, r.value, r.epochs_run, r.reason) for r in study.records()]
    assert rows == [
        (Status.FINISHED, 0.3, 3, "ran its 3 epochs"),
        (Status.STOPPED, 0.2, 3, "rung at epoch 2"),
        (Status.FAILED, None, 3, "RuntimeError: no memory"),
        (Status.INTERRUPTED, 0.2, 3, "interrupted by the user"),
        (Status.STOPPED, 0.2, 3, "the time was up"),
    ]
    assert study.table_file.is_file()


def test_a_trial_that_ray_gave_up_without_a_word_is_recorded_as_failed(
    study: Study, config: TrialConfig
) -> None:
    recorder = Recorder(study, "search", 0.0, {}, ProgressCallback())
    trial = told(recorder, "a", config, [])
    trial.status = "ERROR"
    recorder.close([trial], interrupted=False)
    assert [(r.status, r.reason) for r in study.records()] == [(Status.FAILED, "the worker died")]


def test_failures_in_a_row_end_the_run_and_a_success_starts_the_count_anew(
    study: Study, config: TrialConfig
) -> None:
    recorder = Recorder(study, "search", 0.0, {}, ProgressCallback())
    for number in range(2 * HOPELESS - 1):
        trial = told(recorder, str(number), replace(config, seed=number), [0.1])
        if number == HOPELESS - 1:
            trial.last_result |= {"status": "finished", "reason": "ran", "best_value": 0.1}
            recorder.on_trial_complete(0, [], trial)
        else:
            recorder.on_trial_error(0, [], trial)
        assert not recorder.hopeless
    running = told(recorder, "y", replace(config, seed=98), [])
    recorder.on_trial_error(0, [], told(recorder, "x", replace(config, seed=99), []))
    assert recorder.hopeless
    running.status = "RUNNING"
    recorder.close([running], interrupted=False)
    assert recorder.hopeless
    last = study.records()[-1]
    assert (last.status, last.reason) == (Status.INTERRUPTED, f"{HOPELESS} trials before it failed")

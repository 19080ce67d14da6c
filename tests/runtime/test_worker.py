"""A trial's last report says how it ended, and the recorder writes down every ending there is."""

from __future__ import annotations

import errno
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError, RayTaskError

from carmodels.data.dataset import Splits
from carmodels.models.weights import Weights
from carmodels.records import Cause, State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Run
from carmodels.training.trainer import Trainer
from tune.budget.costs import Costs
from tune.optim.scheduler import StopDecision
from tune.runtime import worker
from tune.runtime.callbacks import ProgressCallback, RunState
from tune.runtime.job import Job, Workers
from tune.runtime.recorder import HOPELESS, Recorder
from tune.runtime.runner import DeadlineStopper, Interrupts

pytestmark = pytest.mark.usefixtures("light_collections")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [])
    return study


@pytest.fixture
def job(study: Study, splits: Splits, weights: Weights, tmp_path: Path) -> Job:
    return Job(study, splits, weights, Workers(1, 1, 0.0), tmp_path / "cache")


def reports(run: Run, job: Job, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a trial reports, collected in place of Ray."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(worker, "report", seen.append)
    worker.train_trial(run.to_dict(), job)
    return seen


def test_a_complete_trial_reports_every_epoch_and_leaves_predictions_and_weights(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(replace(config, epochs=3))
    seen = reports(run, job, monkeypatch)
    assert [r["epoch"] for r in seen] == [1, 2, 3]
    assert [r.get("state") for r in seen] == [None, None, "complete"]
    assert (seen[-1]["cause"], seen[-1]["cut_short"]) == (None, False)
    assert [r.get("done") for r in seen] == [None, None, True]  # Ray reads the two at once
    assert {r["run_id"] for r in seen} == {run.id}
    assert seen[-1]["best_value"] == max(r["accuracy"] for r in seen)
    epochs = np.cumsum([r["seconds"] for r in seen])  # each its own; `elapsed` is what the clock goes by
    assert all(r["elapsed"] >= seconds for r, seconds in zip(seen, epochs, strict=True))
    trial = run.id
    assert [job.study.predictions(trial, split).ids for split in ("val", "holdout", "test")] == [
        job.splits.val.ids,
        job.splits.holdout.ids,
        job.splits.test.ids,
    ]
    assert job.study.weights_file(trial).is_file()


def test_a_trial_goes_on_from_the_weights_that_another_left(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reports(Run(config), job, monkeypatch)[-1]
    onward = Run(replace(config, epochs=1, lr=1e-8)).with_origin(
        seed=1, head_seed=0, continues=first["run_id"]
    )
    [last] = reports(onward, job, monkeypatch)
    assert last["state"] == "complete"
    [anew] = reports(onward.with_origin(continues=""), job, monkeypatch)
    assert last["train_loss"] < 0.8 * anew["train_loss"]
    with pytest.raises(FileNotFoundError, match="nobody"):
        reports(onward.with_origin(continues="nobody"), job, monkeypatch)


def test_a_trial_ends_of_itself_before_the_time_is_up_and_leaves_its_best_epoch(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    [last] = reports(Run(replace(config, epochs=9)), replace(job, until=time.time()), monkeypatch)
    assert (last["state"], last["cause"], last["cut_short"]) == ("complete", None, True)
    assert last["reason"] == "the time was up after epoch 1 of 9"
    assert job.study.weights_file(last["run_id"]).is_file()


def test_an_epoch_on_stored_features_does_not_stand_for_one_that_trains_the_backbone(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first epoch takes a second; the next would take much longer than there is time for."""
    costs = Costs({"test_resnet": {32: 10.0}}, train=len(job.splits.train), val=len(job.splits.val))
    hurried = replace(job, costs=costs, until=time.time() + 600)
    run = Run(replace(config, unfreeze="gradual", epochs=4))
    [last] = reports(run, hurried, monkeypatch)
    assert last["reason"] == "the time was up after epoch 1 of 4"
    assert len(reports(run, replace(hurried, until=time.time() + 6000), monkeypatch)) == 4


def test_memory_that_holds_a_batch_only_in_parts_is_in_the_report_and_in_the_row(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulated = Trainer._accumulate

    def within(self: Trainer, network: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(inputs) > 8 * self.microbatches:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return accumulated(self, network, inputs, targets)

    monkeypatch.setattr(Trainer, "_accumulate", within)
    run = Run(replace(config, batch_size=32))
    recorder = Recorder(job.study, "search", 0.0, {}, ProgressCallback())
    trial = told(recorder, "a", run, [])
    for trial.last_result in reports(run, job, monkeypatch):
        recorder.on_trial_result(0, [], trial, trial.last_result)
    recorder.on_trial_complete(0, [], trial)
    [row] = job.study.table()
    assert (row["state"], row["microbatches"]) == ("complete", 4)


def test_a_run_that_falls_short_of_one_before_it_leaves_that_one_s_files(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer, late = Run(replace(config, epochs=9)), replace(job, until=time.time())
    [last] = reports(longer, late, monkeypatch)
    file = job.study.weights_file(longer.id)
    ended = TrialRecord(longer.id, longer.config, State.COMPLETE, 2, 0.5, 1.0, last["reason"], cut_short=True)
    for record, stays in ((replace(ended, epochs_run=1), False), (ended, True)):
        job.study.append(record)
        file.write_bytes(b"before")
        reports(longer, late, monkeypatch)
        assert (file.read_bytes() == b"before") == stays


def test_what_was_complete_before_is_not_said_to_run(study: Study, config: TrialConfig) -> None:
    run, reason = Run(config), "the time was up after epoch 2 of 4"
    done = TrialRecord(run.id, config, State.COMPLETE, 2, 0.5, 1.0, reason, cut_short=True)
    study.append(done)
    recorder = Recorder(study, "fold", 0.0, {}, ProgressCallback())
    told(recorder, "a", run, [0.1])
    assert study.records() == [done]
    told(recorder, "b", run.with_origin(seed=5), [0.1])
    assert [r.state for r in study.records()] == [State.COMPLETE, State.RUNNING]


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
    last = reports(Run(wild), job, monkeypatch)[-1]
    assert (last["state"], last["cause"], last["cut_short"]) == ("failed", "diverged", False)
    assert last["best_value"] == 0.0
    assert last["reason"].startswith("the loss was not finite in epoch")
    assert not list((job.study.folder / "predictions").iterdir())


def of_ray(name: str, run: Run, status: str = "RUNNING", error: Exception | None = None) -> SimpleNamespace:
    """What the recorder asks of a trial of Ray's."""
    return SimpleNamespace(
        trial_id=name,
        config=run.to_dict(),
        last_result={},
        status=status,
        error_file=None,
        get_pickled_error=lambda: error,
    )


def raised(error: Exception) -> RayTaskError:
    """An exception of the worker's own, as Ray tells of it."""
    return RayTaskError("train_trial", "Traceback", error).as_instanceof_cause()


LOST = ActorDiedError()


def complete(value: float, reason: str = "ran") -> dict[str, Any]:
    """What a complete trial's last report adds."""
    return {"state": "complete", "cause": None, "cut_short": False, "reason": reason, "best_value": value}


def told(recorder: Recorder, name: str, run: Run, values: list[float]) -> SimpleNamespace:
    """A trial of Ray's that has begun and reported these values."""
    trial = of_ray(name, run)
    recorder.on_trial_start(0, [], trial)
    for epoch, value in enumerate(values, start=1):
        trial.last_result = {**asdict(EpochMetrics(epoch, 1.0, 1.0, value, value, 2.0)), "accuracy": value}
        recorder.on_trial_result(0, [], trial, trial.last_result)
    return trial


def test_a_worker_that_dies_before_its_trial_is_said_to_run_is_known_by_it(
    study: Study, config: TrialConfig
) -> None:
    def early(name: str, seed: int) -> SimpleNamespace:
        return of_ray(name, Run(config).with_origin(seed=seed), "ERROR", LOST)

    seen: list[set[str]] = []
    recorder = Recorder(
        study, "search", 0.0, {}, ProgressCallback(on_step=lambda r: seen.append({*r.running} - {*r.runs}))
    )
    again, lost = early("a", 1), early("b", 2)
    recorder.on_trial_recover(0, [], again)
    recorder.on_step_end(0, [])
    assert seen == [set()]
    recorder.on_trial_start(0, [], again)
    again.last_result = complete(0.1)
    recorder.on_trial_complete(0, [], again)
    recorder.on_trial_error(0, [], lost)
    assert [(r.state, r.cause, r.reason) for r in study.records()] == [
        (State.COMPLETE, None, "ran (restarted, first ended by: the worker died)"),
        (State.FAILED, Cause.MACHINE, "the worker died"),
    ]


def test_every_ending_has_its_row(study: Study, config: TrialConfig, tmp_path: Path) -> None:
    stops = {
        "b": StopDecision(State.PRUNED, "rung at epoch 2"),
        "f": StopDecision(State.OUT_OF_TIME, "the time for searching was up"),
    }
    recorder = Recorder(study, "search", 0.0, stops, ProgressCallback())
    done, pruned, failed, _cut, late, slow, short, wild = (
        told(recorder, name, Run(config).with_origin(seed=number), [0.1, 0.3, 0.2])
        for number, name in enumerate("abcdefgh")
    )
    done.last_result |= complete(0.3, "ran its 3 epochs")
    short.last_result |= {**complete(0.3, "the time was up after epoch 3"), "cut_short": True}
    wild.last_result |= {**complete(0.0, "no finite loss"), "state": "failed", "cause": "diverged"}
    for trial in (done, pruned, slow, short, wild):
        recorder.on_trial_complete(0, [], trial)
    failed.get_pickled_error = lambda: raised(RuntimeError("no memory"))
    failed.error_file = tmp_path / "error.txt"
    failed.error_file.write_text("Failure # 1\nTraceback\n  line\nRuntimeError: no memory\n\n")
    recorder.on_trial_error(0, [], failed)
    del recorder.trials["e"]
    recorder.close(interrupted=True)
    recorder.trials["e"] = late
    recorder.close(interrupted=False)
    rows = [(r.state, r.cause, r.value, r.epochs_run, r.reason) for r in study.records()]
    assert rows == [
        (State.COMPLETE, None, 0.3, 3, "ran its 3 epochs"),
        (State.PRUNED, None, 0.2, 3, "rung at epoch 2"),
        (State.OUT_OF_TIME, None, 0.2, 3, "the time for searching was up"),
        (State.COMPLETE, None, 0.3, 3, "the time was up after epoch 3"),
        (State.FAILED, Cause.DIVERGED, None, 3, "no finite loss"),
        (State.FAILED, Cause.ERROR, None, 3, "RuntimeError: no memory"),
        (State.INTERRUPTED, None, 0.2, 3, "interrupted by the user"),
        (State.OUT_OF_TIME, None, 0.2, 3, "the time was up"),
    ]
    assert [r.reason for r in study.records() if r.cut_short] == ["the time was up after epoch 3"]
    assert study.table_file.is_file()


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (raised(ValueError("no such image")), Cause.ERROR),
        (raised(KeyError("head")), Cause.ERROR),
        (raised(RuntimeError("Caught RuntimeError in DataLoader worker process 0.")), Cause.ERROR),
        (raised(torch.OutOfMemoryError("CUDA out of memory")), Cause.OUT_OF_MEMORY),
        (raised(MemoryError()), Cause.OUT_OF_MEMORY),
        (raised(RuntimeError("DefaultCPUAllocator: can't allocate memory")), Cause.OUT_OF_MEMORY),
        (raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")), Cause.OUT_OF_MEMORY),
        (OutOfMemoryError("the node's memory"), Cause.OUT_OF_MEMORY),
        (raised(OSError(errno.ENOSPC, "No space left on device")), Cause.MACHINE),
        (raised(ConnectionError("the hub")), Cause.MACHINE),
        (raised(ObjectLostError("a", None, "")), Cause.MACHINE),
        (raised(RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")), Cause.MACHINE),
        (raised(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")), Cause.MACHINE),
        (raised(RuntimeError("DataLoader timed out after 900 seconds")), Cause.MACHINE),
        (raised(RuntimeError("a loader process was lost: EOFError()")), Cause.MACHINE),
        (LOST, Cause.MACHINE),
        (None, Cause.MACHINE),
    ],
)
def test_a_failure_has_the_cause_that_ray_tells_of(
    error: Exception | None, cause: Cause, study: Study, config: TrialConfig
) -> None:
    recorder = Recorder(study, "search", 0.0, {}, ProgressCallback())
    recorder.on_trial_error(0, [], of_ray("a", Run(config), "ERROR", error))
    [record] = study.records()
    assert (record.state, record.cause) == (State.FAILED, cause)
    assert record.resumable is (cause is Cause.MACHINE)


def test_a_trial_that_sent_its_last_report_is_complete_however_the_run_ends(
    study: Study, config: TrialConfig
) -> None:
    stops = {"pruned": StopDecision(State.PRUNED, "rung at epoch 2")}
    recorder = Recorder(study, "search", 0.0, stops, ProgressCallback())
    done, lost, _pruned = (
        told(recorder, name, Run(config).with_origin(seed=seed), [0.1, 0.3])
        for seed, name in enumerate(("done", "lost", "pruned"))
    )
    done.last_result |= complete(0.3, "ran its 2 epochs")
    lost.last_result |= complete(0.3, "ran its 2 epochs")
    lost.status = "ERROR"
    recorder.close(interrupted=True)
    assert [(r.state, r.value, r.reason) for r in study.records()] == [
        (State.COMPLETE, 0.3, "ran its 2 epochs"),
        (State.COMPLETE, 0.3, "ran its 2 epochs"),
        (State.PRUNED, 0.3, "rung at epoch 2"),
    ]


class Full(Study):
    """A study whose disk is full for so many writes of records."""

    def append(self, record: TrialRecord) -> None:
        if refused:
            raise refused.pop()
        super().append(record)


refused: list[OSError] = []


def full(times: int) -> None:
    refused[:] = [OSError(errno.ENOSPC, "No space left on device") for _ in range(times)]


def test_an_end_that_could_not_be_written_ends_the_run_and_is_written_at_its_close(
    study: Study, config: TrialConfig
) -> None:
    recorder = Recorder(Full(study.folder), "search", 0.0, {}, ProgressCallback())
    done, _running = (
        told(recorder, name, Run(config).with_origin(seed=seed), [0.1]) for seed, name in enumerate("ab")
    )
    done.last_result |= complete(0.1)
    full(times=1)
    recorder.on_trial_complete(0, [], done)
    assert isinstance(recorder.fault, OSError)
    assert DeadlineStopper(math.inf, Interrupts(), recorder).stop_all()
    assert [r.state for r in study.records()] == [State.RUNNING] * 2
    recorder.close(interrupted=False)
    assert [(r.state, r.reason) for r in study.records()] == [
        (State.COMPLETE, "ran"),
        (State.INTERRUPTED, "the run ended before it: No space left on device"),
    ]


@pytest.mark.parametrize("hook", ["on_trial_start", "on_trial_error", "on_step_end"])
def test_what_a_hook_raises_is_kept_and_ends_the_run(hook: str, study: Study, config: TrialConfig) -> None:
    def broken(state: RunState) -> None:
        raise OSError(errno.EPIPE, "Broken pipe")

    recorder = Recorder(Full(study.folder), "search", 0.0, {}, ProgressCallback(on_step=broken))
    full(times=0 if hook == "on_step_end" else 1)
    getattr(recorder, hook)(0, [], trial=of_ray("a", Run(config)))
    assert isinstance(recorder.fault, OSError)
    assert not refused


def test_a_table_that_could_not_be_written_does_not_make_the_trial_end_twice(
    study: Study, config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(study, "search", 0.0, {}, ProgressCallback())
    done = told(recorder, "a", Run(config), [0.1])
    done.last_result |= complete(0.1)

    def refuse(study: Study) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Study, "write_table", refuse)
    recorder.on_trial_complete(0, [], done)
    assert recorder.fault
    recorder.close(interrupted=False)
    lines = study.trials_file.read_text().splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["running", "complete"]


@pytest.mark.parametrize("hook", ["on_trial_recover", "on_trial_error"])
def test_a_trial_whose_end_the_searcher_could_not_take_is_recorded_and_the_error_kept(
    hook: str, study: Study, config: TrialConfig, tmp_path: Path
) -> None:
    """Ray calls these for a trial that ended, where another's hook raised."""
    recorder = Recorder(study, "search", 0.0, {}, ProgressCallback())
    trial = told(recorder, "a", Run(config), [0.1])
    trial.last_result |= complete(0.1)
    trial.error_file = tmp_path / "error.txt"
    trial.error_file.write_text("Failure # 1\nTraceback\nZeroDivisionError: in the searcher\n")
    getattr(recorder, hook)(0, [], trial)
    recorder.on_trial_result(0, [], trial, trial.last_result)  # trained again until the run has ended
    assert [(r.state, r.epochs_run) for r in study.records()] == [(State.COMPLETE, 1)]
    assert "ZeroDivisionError: in the searcher" in str(recorder.fault)


def test_a_worker_that_was_hung_counts_as_lost(study: Study, config: TrialConfig) -> None:
    recorder = Recorder(study, "search", 0.0, {}, ProgressCallback())
    trial = told(recorder, "a", Run(config), [])
    recorder.watchdog.ended["a"] = "no epoch ended in 9 s, its worker was hung"
    recorder.on_trial_error(0, [], trial)
    [record] = study.records()
    assert (record.cause, record.reason) == (Cause.MACHINE, "no epoch ended in 9 s, its worker was hung")


def test_a_trial_that_ray_gave_up_without_a_word_is_recorded_as_failed(
    study: Study, config: TrialConfig
) -> None:
    recorder = Recorder(study, "search", 0.0, {}, ProgressCallback())
    trial = told(recorder, "a", Run(config), [])
    trial.status = "ERROR"
    recorder.close(interrupted=False)
    assert [(r.state, r.cause, r.reason) for r in study.records()] == [
        (State.FAILED, Cause.MACHINE, "the worker died")
    ]


def test_failures_in_a_row_end_the_run_and_a_success_starts_the_count_anew(
    study: Study, config: TrialConfig
) -> None:
    recorder, run = Recorder(study, "search", 0.0, {}, ProgressCallback()), Run(config)
    for number in range(2 * HOPELESS - 1):
        trial = told(recorder, str(number), run.with_origin(seed=number), [0.1])
        if number == HOPELESS - 1:
            trial.last_result |= complete(0.1)
            recorder.on_trial_complete(0, [], trial)
        else:
            recorder.on_trial_error(0, [], trial)
        assert not recorder.hopeless
    running = told(recorder, "y", run.with_origin(seed=98), [])
    recorder.on_trial_error(0, [], told(recorder, "x", run.with_origin(seed=99), []))
    assert recorder.hopeless
    running.status = "RUNNING"
    recorder.close(interrupted=False)
    assert recorder.hopeless
    last = study.records()[-1]
    assert (last.state, last.reason) == (State.INTERRUPTED, f"{HOPELESS} trials before it failed")

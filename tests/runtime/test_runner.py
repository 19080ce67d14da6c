"""What goes wrong outside the trials ends a run in order: nothing is lost, and no trial runs again."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError
from ray.tune.error import TuneError

from carmodels.data.dataset import Splits
from carmodels.models.weights import Weights
from carmodels.records import State, TrialRecord
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.run import Run
from tune.optim.searcher import QueueSearcher
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Workers
from tune.runtime.runner import _in_one_line, run_trials

FULL = OSError(errno.ENOSPC, "No space left on device", "/tmp/ray/x")


def wrapped(error: Exception) -> Exception:
    """As Ray's loop raises what a hook raised: its traceback as text."""
    try:
        try:
            raise error
        except Exception:
            raise TuneError("Traceback ...")  # noqa: B904  # as Ray does
    except TuneError as found:
        return found


def unexpected(error: Exception) -> Exception:
    """As Ray raises an error that is neither a worker's nor a trial's."""
    try:
        raise RuntimeError("Caught unexpected exception") from error
    except RuntimeError as found:
        return found


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "No space left on device"),
        (wrapped(FULL), "No space left on device"),
        (unexpected(OutOfMemoryError("The node ran low on memory.\nSet ...")), "The node ran low on memory."),
        (unexpected(NodeDiedError("The node is gone.")), "The node is gone."),
    ],
)
def test_a_fault_of_the_machine_is_one_line_that_says_how_to_go_on(error: Exception, words: str) -> None:
    found = _in_one_line(error, Study(Path("results/cars")))
    assert isinstance(found, OSError)
    assert str(found) == f"results/cars: {words}; mend that, then search.py --resume goes on"


@pytest.mark.parametrize("error", [ZeroDivisionError(), wrapped(ZeroDivisionError())])
def test_an_error_of_ours_is_raised_as_it_is(error: Exception) -> None:
    assert _in_one_line(error, Study(Path("results/cars"))) is error


# ---- with Ray


@pytest.fixture
def job(splits: Splits, weights: Weights, tmp_path: Path) -> Job:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [])
    return Job(study, splits, weights, Workers(1, 1, 0.0), tmp_path / "cache")


def train(job: Job, searcher: QueueSearcher) -> bool:
    return run_trials(
        job,
        stage="search",
        begun=steady_time(),
        end=math.inf,
        search_alg=searcher,
        roles={},
        watch=ProgressCallback(),
    )


def lines(study: Study) -> list[str]:
    """The states in trials.jsonl, line by line."""
    return [json.loads(line)["state"] for line in study.trials_file.read_text().splitlines()]


@pytest.mark.usefixtures("own_ray")
def test_a_disk_that_is_full_as_a_trial_ends_costs_neither_the_trial_nor_a_second_training(
    job: Job, config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, refused = Study.append, [FULL]

    def full_once(study: Study, record: TrialRecord) -> None:
        if record.state is State.COMPLETE and refused:
            raise refused.pop()
        append(study, record)

    monkeypatch.setattr(Study, "append", full_once)
    runs = [Run(config), Run(config).with_origin(seed=1)]
    with pytest.raises(OSError, match="No space left on device; mend that, then"):
        train(job, QueueSearcher(runs, metric="accuracy", mode="max"))
    first = next(r for r in job.study.records() if r.trial_id == runs[0].id)
    assert (first.state, first.epochs_run) == (State.COMPLETE, config.epochs)
    assert lines(job.study).count("complete") == 1


class Broken(QueueSearcher):
    """A searcher with a fault of its own."""

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        raise ZeroDivisionError("in the searcher")


@pytest.mark.usefixtures("own_ray")
def test_a_searcher_that_raises_as_a_trial_ends_is_heard_and_the_trial_is_recorded_once(
    job: Job, config: TrialConfig
) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: in the searcher"):
        train(job, Broken([Run(config)], metric="accuracy", mode="max"))
    assert lines(job.study) == ["running", "complete"]

"""A run that Ray or the machine ends is one line; an error of ours keeps its traceback."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError
from ray.tune.error import TuneError

from carmodels.study import Study
from tune.runtime.runner import _in_one_line

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

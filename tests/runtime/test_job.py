"""What a worker could not do is told in one line."""

from __future__ import annotations

import os

import pytest

from tune.runtime.job import Workers, as_task, results_of


@pytest.mark.usefixtures("own_ray")
def test_a_task_that_fails_or_dies_is_one_line_that_says_at_what_and_why() -> None:
    def refuse(value: int) -> int:  # within the test: a worker does not find the tests' modules
        if value == 1:
            raise RuntimeError("no kernel\nfor this device")
        if value == 2:
            os._exit(1)
        return value

    task = as_task(refuse, Workers(1, 1, 0.0)).options(max_retries=0)
    assert results_of([task.remote(0), task.remote(3)], "counting") == [0, 3]
    with pytest.raises(
        ValueError, match=r"^counting failed on a worker: RuntimeError: no kernel for this device$"
    ):
        results_of([task.remote(0), task.remote(1)], "counting")
    with pytest.raises(ValueError, match=r"^counting failed on a worker: .*died unexpectedly.*$"):
        results_of([task.remote(2)], "counting")

"""What is set before Ray and NumPy are imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

POOLS = (
    "import tune, numpy, scipy.linalg, json, threadpoolctl; "
    "pools = [p['num_threads'] for p in threadpoolctl.threadpool_info() if p['user_api'] == 'blas']; "
    "print(json.dumps(pools))"
)


@pytest.mark.parametrize(("asked", "threads"), [({}, 1), ({"OPENBLAS_NUM_THREADS": "2"}, 2)])
def test_linear_algebra_of_a_script_has_one_thread_unless_the_user_says_otherwise(
    asked: dict[str, str], threads: int
) -> None:
    others = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", POOLS], env={**others, **asked}, capture_output=True, text=True, check=True
    )
    pools = json.loads(done.stdout)
    assert pools
    assert set(pools) == {min(threads, os.cpu_count() or 1)}

"""A search that is killed and resumed loses nothing; `make soak` does the same over many random rounds.

Searches side by side share the cache and nothing else.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from carmodels.records import NOT_ENDED
from carmodels.study import Study

from soak import PATIENCE, TRIALS, ended, environment, name_of, run, search_command, wait_for

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def quick_to_notice() -> Iterator[None]:
    """A command whose Ray was killed notices after seconds. By default Ray seeks its head for a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoded images that the rounds share."""
    return tmp_path_factory.mktemp("cache")


FAULTS = {"Ray killed": 4, "command killed": 1, "worker killed": 2, "Ctrl-C twice": 3}  # and their seeds


@pytest.fixture(scope="module")
def rounds(drawn: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """A round of each fault, two at a time: much of one is waiting."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            fault: pool.submit(run, seed, tmp_path_factory.mktemp("round"), drawn, cache, fault, 1.0)
            for fault, seed in FAULTS.items()
        }


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost(fault: str, rounds: dict[str, Future]) -> None:
    assert rounds[fault].result().hit


@contextmanager
def started(place: Path, name: str, data: Path, cache: Path) -> Iterator[subprocess.Popen[str]]:
    """A search of a study by that name."""
    process = subprocess.Popen(
        [*search_command(data, cache, seed=1), "--study", name],
        cwd=place,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()


def ray_of(process: subprocess.Popen[str]) -> set[int]:
    """The processes of the Ray that this command has started."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    return {p.pid for p in family if "raylet" in name_of(p) or "gcs_server" in name_of(p)}


def test_two_searches_at_once_share_the_cache_and_nothing_else(tmp_path: Path, drawn: Path) -> None:
    results, cache = tmp_path / "results", tmp_path / "cache"
    first, second = Study(results / "first"), Study(results / "second")
    with started(tmp_path, "first", drawn, cache) as one:
        wait_for(lambda: one.poll() is not None or bool(ray_of(one)), "the first one's Ray")
        with started(tmp_path, "second", drawn, cache) as two:
            wait_for(lambda: two.poll() is not None or bool(ray_of(two)), "the second one's Ray")
            rays = ray_of(one), ray_of(two)
            assert all(rays)
            assert not rays[0] & rays[1]
            printed = [" ".join(ended(process, 2 * PATIENCE).split()) for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), printed
    assert f"process {two.pid}, study second" not in printed[0]
    assert "another search is running here" in printed[1]
    assert f"process {one.pid}, study first" in printed[1]
    pages = [re.findall(r"Ray dashboard: (http://127\.0\.0\.1:\d+)", text) for text in printed]
    assert [len(found) for found in pages] == [1, 1], printed
    assert pages[0] != pages[1]
    assert len(list((cache / "images").glob("*/index.json"))) == 1
    for study, text in zip((first, second), printed, strict=True):
        assert "Traceback" not in text
        records = study.records()
        assert len(records) == TRIALS
        assert not [r for r in records if r.state in NOT_ENDED]
        assert not study.damaged_lines()
    same = {r.trial_id: r.value for r in first.leaderboard()}
    assert same
    assert same.items() & {r.trial_id: r.value for r in second.leaderboard()}.items()

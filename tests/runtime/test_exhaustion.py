"""Resources run out under a real search: it ends in rows with reasons, or in one line, and goes on later."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import optuna
import psutil
import pytest
import torch
from optuna.trial import TrialState

from carmodels.data import cache as image_cache
from carmodels.data import loader as loaders
from carmodels.data.cache import open_images
from carmodels.data.dataset import Splits
from carmodels.data.loader import Loader
from carmodels.files import append_line, write_atomic
from carmodels.records import NOT_ENDED, Cause, State
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.run import Run
from tune.runtime import findings
from tune.runtime import watchdog as watchdogs
from tune.runtime.watchdog import LONGEST_SILENCE, Watchdog

from disk import Disk, mounted
from hub import Hub, fetch_from
from soak import (
    PATIENCE,
    TRIALS,
    ended,
    environment,
    name_of,
    patch_on_import,
    search_command,
    trains,
    wait_for,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        with mounted(tmp_path / "disk") as made:
            yield made
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoded images that the searches share."""
    return tmp_path_factory.mktemp("cache")


# ---- the disk


@pytest.mark.server
def test_a_full_disk_leaves_the_old_file_whole(disk: Disk) -> None:
    path = disk.folder / "table"
    write_atomic(path, "old")
    disk.fill(spare=64 * 2**10)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(path, os.urandom(2**20))
    assert caught.value.errno == errno.ENOSPC
    assert [(p.name, p.read_text()) for p in disk.folder.iterdir()] == [("table", "old")]


@pytest.mark.server
def test_lines_torn_by_a_full_disk_do_not_swallow_later_ones(disk: Disk) -> None:
    path = disk.folder / "lines"
    append_line(path, "first")
    disk.fill(spare=8 * 2**10)
    with pytest.raises(OSError, match=r"No space left|is the disk full\?"):
        append_line(path, "x" * 100_000)
    disk.empty()
    append_line(path, "last")
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("first", "last")


@pytest.mark.server
def test_a_cache_that_fills_the_disk_is_taken_away_and_the_next_one_is_whole(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from synthetic import save_many

    paths = save_many(tmp_path / "images", 40)
    monkeypatch.setattr(
        image_cache, "estimate_cache_bytes", lambda *arguments: 0
    )  # another process fills it meanwhile
    monkeypatch.setattr(image_cache, "RESERVED_DISK_BYTES", 0)
    disk.fill(spare=16 * 2**10)
    with pytest.raises(OSError, match="No space left"):
        open_images(paths, disk.folder / "images" / "a", 32, None)
    assert not list((disk.folder / "images").glob("a*/*"))
    disk.empty()
    assert len(open_images(paths, disk.folder / "images" / "a", 32, None)) == 40


@pytest.mark.ray
@pytest.mark.server
def test_a_disk_that_is_full_midway_ends_the_search_in_a_line_and_resume_goes_on(
    disk: Disk, drawn: Path, cache: Path
) -> None:
    command = [*search_command(drawn, cache, seed=5), "--results", str(disk.folder)]
    study = Study(disk.folder / "cars")
    process = started(command, disk.folder.parent)
    wait_for(lambda: process.poll() is not None or bool(study.records()), "the first trial to start")
    disk.fill()
    output = ended(process)
    assert process.returncode == 2, output
    assert "Traceback" not in output, output
    assert "No space left on device" in output.splitlines()[-1]
    assert output.splitlines()[-1].startswith("error: "), output
    disk.empty()
    before = {r.trial_id: r for r in study.records()}
    resumed = started([*command, "--resume"], disk.folder.parent)
    output = ended(resumed)
    if "are damaged" in output:  # the line that the full disk tore
        before = {r.trial_id: r for r in study.records() if r.trial_id in before}
    assert resumed.returncode == 0, output
    after = study.records()
    assert not [r for r in after if r.state in NOT_ENDED]
    assert {r.trial_id for r in after} >= set(before)


@pytest.mark.server
def test_a_read_only_folder_is_named_before_the_search(disk: Disk) -> None:
    disk.mount("remount,ro")
    [found] = findings.folder_findings({"--results": disk.folder / "results"})
    assert found.fatal
    assert "no writing there (Read-only file system); give a folder of your own" in found.words


# ---- memory


@pytest.mark.ray
def test_a_worker_without_memory_is_a_row_and_the_search_goes_on(
    tmp_path: Path, drawn: Path, cache: Path
) -> None:
    """Its address space is limited to what it has: the next allocation fails, as for want of memory."""
    study = Study(tmp_path / "results" / "cars")
    process = started(search_command(drawn, cache, seed=6), tmp_path)
    wait_for(lambda: process.poll() is not None or bool(study.records()), "the first trial to start")
    starve(process.pid)
    output = ended(process)
    assert process.returncode == 0, output
    assert "Traceback" not in output, output
    records = study.records()
    assert len(records) == TRIALS, output
    assert not [r for r in records if r.state in NOT_ENDED], output
    assert [r for r in records if "restarted, first ended by" in r.reason or r.state is State.FAILED]


def starve(pid: int) -> None:
    for worker in psutil.Process(pid).children(recursive=True):
        if trains(name_of(worker)):
            size = worker.memory_info().vms
            resource.prlimit(worker.pid, resource.RLIMIT_AS, (size, size))


def test_a_gpu_without_memory_for_one_image_more_ends_in_torchs_own_error(
    config: TrialConfig, splits: Splits, weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from carmodels.training import trainer

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer.Trainer, "_accumulate", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2\.00 GiB"):
        trainer.fit(Run(replace(config, batch_size=8)), splits, weights=weights)


# A GPU on which images of 48 px do not fit.
SMALL_GPU = patch_on_import(
    "carmodels.training.trainer",
    """
def patch(trainer):
    import torch
    accumulated = trainer.Trainer._accumulate
    def within(self, network, inputs, targets):
        if inputs.ndim == 4 and (inputs.shape[-1] == 48 or len(inputs) > 8 * self.microbatches):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return accumulated(self, network, inputs, targets)
    trainer.Trainer._accumulate = within
""",
)


@pytest.mark.ray
def test_a_gpu_too_small_for_some_configurations_is_searched_with_the_others(
    tmp_path: Path, drawn: Path, cache: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SMALL_GPU)
    fixed = ("backbone=test_resnet", "unfreeze=full", "head_depth=0", "lr=1e-3", "lr_ratio=1")
    fixed += ("augment=shift",)
    few = [text for value in fixed for text in ("--set", value)]  # one configuration a size, and the baseline
    command = [*search_command(drawn, cache, seed=6), *few, "--trials", "3"]
    process = started(["env", f"PYTHONPATH={tmp_path}:{ROOT}", *command], tmp_path)
    output = process.communicate(timeout=2 * PATIENCE)[0]
    assert process.returncode == 0, output
    assert "Traceback" not in output, output
    records = Study(tmp_path / "results" / "cars").records()
    assert len(records) == 3
    large = [r for r in records if r.config.image_size == 48]
    small = [r for r in records if r.config.image_size == 32]
    assert large
    assert small
    failed = [r for r in records if r.state is State.FAILED]
    assert failed
    causes = [(r.config.image_size, r.cause, r.reason) for r in failed]
    assert all("CUDA out of memory" in r.reason and r.cause is Cause.OUT_OF_MEMORY for r in failed), causes
    assert not set(failed) & set(small), output
    assert set(large) == set(failed)
    storage = f"sqlite:///{tmp_path}/results/cars/optuna.db"
    told = optuna.load_study(study_name=None, storage=storage).trials
    assert {t.user_attrs.get("cause") for t in told if t.state is TrialState.FAIL} == {"out_of_memory"}


# ---- what hangs


class Stuck(list):
    """Images of which one never comes."""

    def __getitem__(self, row: Any) -> Any:
        if int(row) == 3:
            time.sleep(60)
        return super().__getitem__(int(row))


def test_a_loader_that_hangs_is_an_error_that_says_so(
    splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "LOADER_TIMEOUT", 1.0)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # then it is killed
    split = replace(splits.val, rows=np.arange(8), ids=splits.val.ids[:8], labels=splits.val.labels[:8])
    images = Stuck([np.zeros((40, 40, 3), np.uint8)] * 8)
    loader = Loader(images, split, image_size=32, batch_size=4, processes=1)
    with pytest.raises(RuntimeError, match="timed out after 1"):
        list(loader.epoch(0))


def test_silence_is_allowed_in_measure_of_what_an_epoch_costs(config: TrialConfig) -> None:
    def costs(seconds: float, answers: float = 0.0) -> Any:
        return SimpleNamespace(epoch=lambda config, number: seconds, final_predictions=lambda config: answers)

    assert Watchdog(None).allowed(config) == LONGEST_SILENCE
    assert Watchdog(costs(1.0)).allowed(config) == watchdogs.SHORTEST_SILENCE
    assert Watchdog(costs(300.0)).allowed(config) == watchdogs.MUCH_SLOWER * 300
    assert Watchdog(costs(1e9)).allowed(config) == LONGEST_SILENCE
    most = watchdogs.SHORTEST_SILENCE + watchdogs.ANSWERS_SLOWER * 2000
    assert Watchdog(costs(1.0, answers=2000)).allowed(config) == most


def test_a_worker_that_was_not_heard_of_is_killed_once_and_the_reason_kept(
    config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[object] = []
    monkeypatch.setattr(watchdogs.ray, "kill", killed.append)
    monkeypatch.setattr(watchdogs, "LONGEST_SILENCE", 0.0)
    watchdog = Watchdog(None)
    hung, ends = (
        SimpleNamespace(trial_id=name, temporary_state=SimpleNamespace(ray_actor=f"actor {name}"))
        for name in "ab"
    )
    for trial in (hung, ends):
        watchdog.heard(trial, config)
    watchdog.forget(ends)
    time.sleep(0.01)
    watchdog.end()
    watchdog.end()
    assert killed == ["actor a"]
    assert watchdog.ended == {"a": "no epoch ended in 0 s, its worker was hung"}


# ---- the hub


def fetched_from_a_hub_that_stalls(at: str, folder: Path) -> str:
    """The last line of a download; the hub stalls at the question, the answer or amid the file."""
    over = threading.Event()

    class Slow(Hub):
        def do_HEAD(self) -> None:
            if at == "HEAD":
                over.wait(100)
            super().do_HEAD()

        def do_GET(self) -> None:
            if at == "middle":
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                self.wfile.write(b"x" * 100)
            over.wait(100)

    place = folder / "www" / "timm" / "lcnet_050.ra2_in1k" / "resolve" / "main"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"x" * 1000)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=str(folder / "www"))) as server:
        server.seen = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        result = fetch_from(address, folder / "home", HF_HUB_DOWNLOAD_TIMEOUT="1")
        over.set()
        server.shutdown()
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.server
def test_a_hub_that_does_not_answer_is_one_line_in_time(tmp_path: Path) -> None:
    """In six tries of a second each, where a user's are of ten."""
    assert huggingface_hub.constants.DEFAULT_DOWNLOAD_TIMEOUT == 10
    moments = ("HEAD", "GET", "middle")
    with ThreadPoolExecutor() as pool:
        said = list(pool.map(fetched_from_a_hub_that_stalls, moments, [tmp_path / at for at in moments]))
    for last in said:
        assert last.startswith("ValueError: the weights of lcnet_050 could not be loaded from the hub"), last


# ---- handles and shared memory


@pytest.mark.server
def test_a_search_with_few_file_handles_says_so_and_starts_nothing(
    tmp_path: Path, drawn: Path, cache: Path
) -> None:
    process = started(
        search_command(drawn, cache, seed=7),
        tmp_path,
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (256, 256)),
    )
    assert ended(process).splitlines() == [
        "error: 256 files may be open at a time, Ray needs 1024: ask the administrator for more"
    ]
    assert process.returncode == 2


@pytest.mark.ray
@pytest.mark.server
def test_a_search_with_little_shared_memory_says_so_and_goes_on(
    tmp_path: Path, drawn: Path, cache: Path
) -> None:
    if os.geteuid():
        pytest.skip("needs root, for a /dev/shm of its own")
    script = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    command = search_command(drawn, cache, seed=8)
    process = started(["unshare", "--mount", "sh", "-c", script, "sh", *command, "--trials", "2"], tmp_path)
    output = ended(process)
    if "unshare" in output:
        pytest.skip(f"a /dev/shm of its own is not permitted here: {output}")
    assert process.returncode == 0, output
    assert "/dev/shm has 0.07 GB free, Ray wants 0.3 GB and will use the disk instead" in output
    assert len(Study(tmp_path / "results" / "cars").records()) == 2


def started(command: list[str], folder: Path, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )

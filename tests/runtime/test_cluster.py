"""A search over a cluster: machines of their own (network namespaces), of which one goes down midway."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from carmodels.demo.folder import DEMO_WEIGHTS
from carmodels.records import NOT_ENDED, State
from carmodels.study import Study

from soak import trains, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.server]
ROOT = Path(__file__).parents[2]
TRIALS = 5
HEAD = "10.77.0.1"
# A machine that goes down is noticed in seconds instead of half a minute.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@dataclass
class Cluster:
    """Namespaces that see each other alone, each with its own address, processes and cache folder."""

    name: str
    folder: Path  # what all share, but for `cache`, which is each machine's own
    commands: list[subprocess.Popen[str]] = field(default_factory=list)

    def own(self, number: int) -> Path:
        """What the machine sees as the folder `cache`."""
        return self.folder / f"cache-of-{number}"

    def space(self, number: int) -> str:
        return f"{self.name}-{number}"

    def start(self, number: int, *command: str) -> subprocess.Popen[str]:
        """A command on a machine; 0 is the head."""
        script = f'mount --bind {self.own(number)} {self.folder / "cache"} && exec "$@"'
        with (self.folder / f"output-{len(self.commands)}").open("w") as output:
            command = ("ip", "netns", "exec", self.space(number), "sh", "-c", script, "sh", *command)
            self.commands.append(
                subprocess.Popen(
                    command,
                    cwd=self.folder,
                    env={**environment(self.name), "PYTHONPATH": ""},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return self.commands[-1]

    def pids(self, number: int) -> list[int]:
        found = subprocess.run(
            ["ip", "netns", "pids", self.space(number)], check=True, capture_output=True, text=True
        )
        return [int(pid) for pid in found.stdout.split()]

    def go_down(self, number: int) -> None:
        for pid in self.pids(number):
            os.kill(pid, signal.SIGKILL)


def environment(token: str) -> dict[str, str]:
    """Ray with its authentication, a token of the cluster's own, and no network but the cluster's."""
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token * 8, "COLUMNS": "200", **HEALTH}
    return {**{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}, **own}


def connect(cluster: Cluster, machines: int) -> None:
    """A bridge on the head, a cable to each machine, a route for Ray to tell its own address by."""
    for number in range(machines + 1):
        cluster.own(number).mkdir()
        run("ip", "netns", "add", cluster.space(number))
        run("ip", "-n", cluster.space(number), "link", "set", "lo", "up")
    head = ("ip", "-n", cluster.space(0))
    run(*head, "link", "add", "bridge", "type", "bridge")
    run(*head, "addr", "add", f"{HEAD}/24", "dev", "bridge")
    run(*head, "link", "set", "bridge", "up")
    run(*head, "route", "add", "default", "dev", "bridge")
    for number in range(1, machines + 1):
        there = ("ip", "-n", cluster.space(number))
        run(
            *head, "link", "add", f"to{number}", "type", "veth", "peer", "eth", "netns", cluster.space(number)
        )
        run(*head, "link", "set", f"to{number}", "master", "bridge", "up")
        run(*there, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth")
        run(*there, "link", "set", "eth", "up")
        run(*there, "route", "add", "default", "via", HEAD)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Three machines; skipped where this user may not make any."""
    if os.geteuid():
        pytest.skip("needs root, for network namespaces")
    if not shutil.which("ip"):
        pytest.skip("iproute2 is not installed (Debian: apt-get install iproute2)")
    made = Cluster(f"cm{secrets.token_hex(2)}", Path(tempfile.mkdtemp(prefix="cm-", dir="/tmp")))
    (made.folder / "cache").mkdir()
    try:
        connect(made, machines=2)
    except subprocess.CalledProcessError as error:
        remove(made)
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    yield made
    remove(made)


def remove(cluster: Cluster) -> None:
    for path in Path("/run/netns").glob(f"{cluster.name}-*"):
        number = int(path.name.rsplit("-", 1)[1])
        cluster.go_down(number)
        wait_for(lambda n=number: not cluster.pids(n), "the end of a machine")  # type: ignore[misc]
        run("ip", "netns", "del", path.name)
    for command in cluster.commands:
        command.wait()
    shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """A Python with everything that the code of this project imports, but without that code."""
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(f"{Path(ray.__file__).parents[1]}\n")
    return str(tmp_path / "venv" / "bin" / "python")


@pytest.mark.timeout(600)
def test_a_machine_goes_down_midway_and_every_trial_has_its_end(
    cluster: Cluster, bare_python: str, drawn: Path
) -> None:
    start = (bare_python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
    nothing_here = ("--num-cpus=0", "--include-dashboard=false", f"--temp-dir={cluster.folder}/t")
    cluster.start(0, *start, "--head", "--port=6379", f"--node-ip-address={HEAD}", *nothing_here)
    wait_for((cluster.folder / "t" / "ray_current_cluster").exists, "the head")
    for number in (1, 2):
        own = f"--node-ip-address=10.77.0.{number + 1}"
        cluster.start(number, *start, f"--address={HEAD}:6379", own, "--num-cpus=1")
        output = cluster.folder / f"output-{number}"  # two at once mix up what they write to Ray's folder
        wait_for(lambda output=output: "Ray runtime started" in output.read_text(), "a machine to join")
    for number in (0, 1):
        shutil.copytree(drawn, cluster.own(number) / "cars")
    command = search_command(cluster, drawn)
    check = cluster.start(0, *command, "--check", "--data", str(cluster.folder / "cache" / "cars"))
    check.wait(timeout=200)
    output = (cluster.folder / "output-3").read_text()
    assert check.returncode == 2, output
    assert "error: machine 10.77.0.3: --data " in output
    assert "10.77.0.2" not in output
    search = cluster.start(0, *command)
    study = Study(cluster.folder / "results" / "cars")
    decoded = cluster.own(2) / "images"  # a worker has its title before it has images

    def busy() -> bool:
        return trains_on(cluster, 2) and any(decoded.glob("*/index.json"))

    wait_for(lambda: search.poll() is not None or busy(), "a trial on the second machine")
    if search.poll() is None:
        cluster.go_down(2)
    search.wait(timeout=200)
    output = (cluster.folder / f"output-{len(cluster.commands) - 1}").read_text()
    assert search.returncode == 0, output
    assert "Traceback" not in output
    assert "2 trials side by side" in output
    records = study.records()
    assert len(records) == TRIALS, output
    assert not [r for r in records if r.state in NOT_ENDED], output
    again = [r for r in records if "restarted, first ended by" in r.reason]
    assert len(again) == 1, [r.reason for r in records]
    assert "actor" in again[0].reason
    assert again[0].state in (State.COMPLETE, State.PRUNED)
    for record in study.leaderboard():
        labels = study.labels("val")
        probs = study.predictions(record.trial_id, "val").aligned(list(labels)).probs
        assert np.mean(probs.argmax(1) == np.array(list(labels.values()))) == pytest.approx(record.value)
    caches = [len(list((cluster.own(n) / "images").glob("*/index.json"))) for n in range(3)]
    assert caches == [1, 1, 1], "each machine has a cache of its own"


def search_command(cluster: Cluster, data: Path) -> list[str]:
    shared = cluster.folder / "cars"
    shutil.copytree(data, shared)
    return [
        *(sys.executable, str(ROOT / "tune" / "search.py"), "--address", f"{HEAD}:6379", "--plain"),
        *("--data", str(shared), "--weights", str(DEMO_WEIGHTS)),
        *("--results", str(cluster.folder / "results"), "--cache", str(cluster.folder / "cache")),
        *("--preset", "demo", "--set", "epochs=6", "--set", "image_size=32,48", "--study", "cars"),
        *("--trials", str(TRIALS), "--until", "search"),
    ]


def trains_on(cluster: Cluster, number: int) -> bool:
    """Whether a worker there has begun to train, a second ago."""
    for pid in cluster.pids(number):
        try:
            process = psutil.Process(pid)
            if trains(" ".join(process.cmdline())):
                time.sleep(1.0)
                return True
        except psutil.NoSuchProcess:
            continue
    return False

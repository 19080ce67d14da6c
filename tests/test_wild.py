"""Odd folders, environments and moments, as a user meets them: a script in a process of its own.

Each case has the exact line that it ends with, or its result.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray
import torch

from carmodels.demo.folder import DEMO_WEIGHTS
from carmodels.records import State
from carmodels.study import Study
from tune.runtime.findings import head_findings

ROOT = Path(__file__).parents[1]
SCRIPTS = ("search", "retrain", "ensemble", "report", "predict", "distil")
LONG = "/tmp/" + 100 * "x"
HEAD = "give what `ray start --head` printed on its head"
FORM = "must be HOST:PORT of the cluster's head, as `ray start --head` prints it"
SHADOWS = ("carmodels", "numpy", "optuna", "random", "ray", "torch", "tune")  # modules in the current folder


@dataclass(frozen=True)
class Case:
    """A command, how the shell starts it, and how it ends."""

    arguments: str  # after the script's name, split at single spaces
    says: str = ""  # the whole of standard error; `…` stands for what machines differ in
    code: int = 2
    environment: Mapping[str, str] = field(default_factory=dict)
    shell: str = 'exec "$@"'  # "$@" is the command
    script: str = "search"


def run(
    script: str, arguments: list[str], folder: Path, environment: Mapping[str, str], shell: str = 'exec "$@"'
) -> subprocess.CompletedProcess[str]:
    """Run a script by its path, of this working tree, whatever is installed."""
    paths = [*environment.get("PYTHONPATH", "").split(os.pathsep), str(ROOT)]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell, "bash", sys.executable, ROOT / "tune" / script, *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "150", **environment, **own},
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=250,
        check=False,
    )


CASES = {
    "the address of a page": Case("--address http://a:8265", f"--address http://a:8265 {FORM}"),
    "the address of Ray's client": Case("--address ray://a:10001", f"--address ray://a:10001 {FORM}"),
    "an address without a port": Case("--address localhost", f"--address localhost {FORM}"),
    "an address without a host": Case("--address :6379", f"--address :6379 {FORM}"),
    "an address past the last port": Case("--address a:65536", f"--address a:65536 {FORM}"),
    "an address that Ray would look for": Case("--address auto", f"--address auto {FORM}"),
    "an empty address": Case("--address ", "--address is empty: give a value, or leave it out"),
    "nobody at the address": Case(
        "--address 127.0.0.1:1",
        f"--address 127.0.0.1:1: no cluster answers there (Connection refused); {HEAD}",
    ),
    "nobody at an address of IPv6": Case(
        "--address [::1]:1", f"--address [::1]:1: no cluster answers there (…); {HEAD}"
    ),
    "a host without an address": Case(
        "--address nowhere.invalid:6379",
        f"--address nowhere.invalid:6379: no cluster answers there (…); {HEAD}",
    ),
    "RAY_ADDRESS of nobody": Case(
        "--trials 0", "--trials 0 must be at least 1", environment={"RAY_ADDRESS": "127.0.0.1:1"}
    ),
    "TMPDIR too long for sockets": Case(
        "--check",
        f"TMPDIR {LONG!r} is longer than the 39 bytes that Ray's sockets leave: export RAY_TMPDIR=/tmp",
        environment={"TMPDIR": LONG},
    ),
    "RAY_TMPDIR too long for sockets": Case(
        "--check",
        f"RAY_TMPDIR {LONG!r} is longer than the 39 bytes that Ray's sockets leave: export RAY_TMPDIR=/tmp",
        environment={"RAY_TMPDIR": LONG},
    ),
    "an empty TMPDIR": Case(
        "--check", "TMPDIR '' must be an absolute path: export RAY_TMPDIR=/tmp", environment={"TMPDIR": ""}
    ),
    "TMPDIR of a folder that cannot be": Case(
        "--check",
        "TMPDIR /proc/none: no writing there (No such file or directory); give a folder of your own",
        environment={"TMPDIR": "/proc/none"},
    ),
    "HOME without writing": Case(
        "--check",
        "HOME /proc/none: no writing there (No such file or directory), as Ray needs for its token; "
        "export HOME=FOLDER of your own",
        environment={"HOME": "/proc/none"},
    ),
    "too few addresses": Case(
        "--check",
        "a process may have 2.0 GB of addresses, torch and Ray need 8 GB: ulimit -v …",
        shell='ulimit -S -v 2000000; exec "$@"',
    ),
    "too few addresses, for good": Case(
        "--check",
        "a process may have 2.0 GB of addresses, torch and Ray need 8 GB: ask the administrator for more",
        shell='ulimit -v 2000000; exec "$@"',
    ),
    "too few addresses for a report": Case(
        "--check",
        "a process may have 20.5 GB of addresses, the report needs 70 GB: ulimit -v …",
        shell='ulimit -S -v 20000000; exec "$@"',
    ),
    "no docstrings": Case(
        "--check",
        "Python drops docstrings here, Ray needs them: unset PYTHONOPTIMIZE, leave -OO out",
        environment={"PYTHONOPTIMIZE": "2"},
    ),
    "names that are not read as UTF-8": Case(
        "--data Жигули",
        "file names are read as ascii here, must be as utf-8: export PYTHONUTF8=1",
        environment={"LC_ALL": "C", "PYTHONUTF8": "0"},
    ),
    "a current folder that was deleted": Case(
        "--check",
        "the current folder was deleted: cd to one that exists",
        shell='mkdir gone; cd gone; rmdir ../gone; exec "$@"',
    ),
    "a circle of links": Case(
        "--weights a",
        "'a' is a circle of symbolic links: give a path without it",
        shell='ln -s a b; ln -s b a; exec "$@"',
    ),
    "an empty name among names": Case(
        "--warm-start ", "--warm-start is empty: give a value, or leave it out"
    ),
    "an empty folder's name": Case(
        "a --export ",
        "argument --export: it is empty: give a path; --help lists the options",
        script="predict",
    ),
    "an empty study's name": Case(
        "", "argument STUDY_DIR: it is empty: give a path; --help lists the options", script="ensemble"
    ),
    "help that nobody reads": Case("--help", code=0, shell='"$@" | true'),
    "help to a full disk": Case("--help", code=0, shell='exec "$@" >/dev/full'),
    "help to a closed output": Case("--help", code=0, shell='exec "$@" >&-'),
    "a mistake, all streams closed": Case("--hours -1", shell='exec "$@" <&- >&- 2>&-'),
    "a mistake, no input": Case(
        "--hours -1", "--hours -1.0 must be above 0 and below a year", shell='exec "$@" <&-'
    ),
}


def check(done: subprocess.CompletedProcess[str], says: str, code: int) -> None:
    assert (done.returncode, len(done.stderr.splitlines())) == (code, bool(says)), done.stderr
    begins, _, ends = says.partition("…")
    assert done.stderr.startswith(f"error: {begins}" if says else ""), done.stderr
    assert done.stderr.endswith(f"{ends}\n" if says else ""), done.stderr
    assert "…" in says or len(done.stderr) == len(f"error: {says}\n" if says else "")


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_around_a_search_is_one_line(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    done = run(f"{case.script}.py", case.arguments.split(" "), tmp_path, case.environment, case.shell)
    check(done, case.says, case.code)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_imports_last_ends_a_script_without_a_traceback(script: str, tmp_path: Path) -> None:
    """`platformdirs` is among what every script imports first; here it is one that sends Ctrl-C."""
    (tmp_path / "platformdirs.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = run(f"{script}.py", ["--help"], tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_before_there_is_a_study_speaks_of_no_study(tmp_path: Path) -> None:
    """`joblib` is the first of what a search imports once its options are read."""
    (tmp_path / "joblib.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = run("search.py", [], tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped at once\n")


@pytest.fixture
def page() -> Iterator[int]:
    """The port of a server that is no Ray head, as of Ray's dashboard."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def test_what_answers_at_the_address_must_be_a_head(page: int, tmp_path: Path) -> None:
    done = run("search.py", ["--address", f"127.0.0.1:{page}"], tmp_path, {})
    words = "what answers there is no Ray head; give what `ray start --head` printed on the head"
    check(done, f"--address 127.0.0.1:{page}: {words}", 2)


@pytest.mark.usefixtures("own_ray")
def test_a_head_at_the_address_is_taken_for_one() -> None:
    assert head_findings(ray.get_runtime_context().gcs_address) == []


def odd_folder(place: Path) -> Path:
    """A folder of an unusual name, with modules that would be imported instead of the right ones."""
    folder = place / "50%20 off? «Жигули»#1"
    folder.mkdir()
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('{name} of the current folder')")
    return folder


def search(drawn: Path, folder: Path, *more: str) -> list[str]:
    """Options of a short search in `folder`."""
    data = ("--data", str(drawn), "--weights", str(DEMO_WEIGHTS), "--preset", "demo", "--results", ".")
    small = (
        "--set",
        "image_size=32",
        "--set",
        "epochs=1",
        "--set",
        "backbone=test_resnet",
        "--study",
        "a",
    )
    return [*data, "--cache", str(folder.parent / "cache"), *small, *more]


@pytest.mark.slow
@pytest.mark.parametrize("shell", ['"$@" | true', 'exec "$@" >/dev/full', 'exec "$@" <&- >&-'])
def test_a_command_whose_output_nobody_reads_goes_on(shell: str, drawn: Path, tmp_path: Path) -> None:
    folder = odd_folder(tmp_path)
    done = run("search.py", search(drawn, folder, "--check"), folder, {"LC_ALL": "C"}, shell)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_preset_for_gpus_says_that_there_is_none(drawn: Path, tmp_path: Path) -> None:
    given = ("--data", str(drawn), "--weights", "none", "--preset", "gpu", "--check", "--plain")
    done = run("search.py", [*given, "--set", "image_size=224"], tmp_path, {"CUDA_VISIBLE_DEVICES": ""})
    built = "sees no GPU" if torch.version.cuda else "is built without CUDA"
    assert (
        f"Note: --preset gpu: torch {torch.__version__} {built}, large networks will train on the cores; "
        "--preset cpu has smaller ones.\n" in done.stdout
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.ray
def test_workers_import_this_package_whatever_the_folder(drawn: Path, tmp_path: Path) -> None:
    """Also: its name needs quoting in a URL, and nobody reads the output."""
    folder = odd_folder(tmp_path)
    before = set(folder.iterdir())
    options = search(drawn, folder, "--trials", "2", "--until", "search")
    done = run("search.py", options, folder, {"LC_ALL": "C"}, '"$@" | head -1')
    assert (done.returncode, done.stderr) == (0, "")
    study = Study(folder / "a")
    assert [record.state for record in study.records()] == [State.COMPLETE] * 2
    assert study.optuna_file.is_file()
    assert set(folder.iterdir()) - before == {study.folder, study.lock_file}


@pytest.mark.ray
def test_too_little_time_for_a_trial_is_one_line(drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    options = search(drawn, folder, "--hours", "0.001", "--until", "search")
    done = run("search.py", options, folder, {})
    says = f"{folder / 'a'} has no finished trial; search.py --resume goes on, with more --hours"
    check(done, says, 2)

"""python tests/soak.py --rounds 40 --seed 0

Faults while a real search runs, which is then resumed: the disk fills, optuna.db is locked, a worker or its
loader is killed, the command is killed, ended or interrupted, Ray is killed, the computer's clock is set,
the time is up. Afterwards nothing complete may be lost, nothing counted twice, no trial left running: see
`check`.

The rounds take the kinds of fault in turn, in an order that the seed decides. A round's own seed, `--seed`
plus its number, decides the search and the moment of the fault. A failed round keeps its folder. The exit
code is 1 where a round failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
import psutil

from carmodels.demo.folder import DEMO_WEIGHTS, draw_demo
from carmodels.records import State, TrialRecord
from carmodels.study import Study

from disk import Disk, mounted

ROOT = Path(__file__).parents[1]
TRIALS = 3
LONGEST = 4.0  # seconds from the first trial's start to the fault
LOCKED = 8.0  # seconds that optuna.db is locked
JUMP = 3 * 3600  # seconds by which the clock is set
PATIENCE = float(os.environ.get("SOAK_PATIENCE", "120"))  # seconds after which a command counts as hanging


@dataclass(frozen=True)
class Scene:
    """A search that runs, as a fault sees it."""

    process: subprocess.Popen[str]
    family: list[psutil.Process]  # its child processes
    study: Study
    place: Path  # the round's folder
    disk: Disk | None


@dataclass(frozen=True)
class Fault:
    """A kind of fault, and what must hold of the command that it strikes."""

    strike: Callable[[Scene], bool]  # whether there was something to hit
    codes: tuple[int, ...]  # exit codes that are right where it hit
    options: tuple[str, ...] = ()  # more options of the search
    site: str = ""  # Python that each process of the search runs as it starts
    ends: bool = False  # whether all trials end all the same, in the first command
    on_disk: bool = False  # whether the study lies on a disk of its own
    torn: int = 0  # most lines of trials.jsonl that may be torn


@dataclass(frozen=True)
class Round:
    """What one round came to."""

    seed: int
    fault: str
    after: float  # seconds from the first trial's start
    hit: bool  # whether there was something to hit
    code: int  # exit code of the command that was struck
    kept: int
    again: int
    seconds: float

    @property
    def line(self) -> str:
        struck = f"after {self.after:.1f} s" if self.hit else "hit nothing"
        return f"exit {self.code:>3}, {struck}, {self.kept} kept, {self.again} again, {self.seconds:.0f} s"


def main() -> int:
    """Make the rounds; 1 where one of them lost something."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=list(FAULTS), help="this kind alone")
    options = parser.parse_args()
    kinds = [options.fault] if options.fault else list(FAULTS)
    random.Random(options.seed).shuffle(kinds)
    results: dict[str, list[str]] = {kind: [] for kind in kinds}
    folder = ROOT / ".soak"
    folder.mkdir(exist_ok=True)
    data = folder / "cars"
    draw_demo(data, seed=1, train=200, test=20)
    for number in range(options.rounds):
        kind, seed = kinds[number % len(kinds)], options.seed + number
        outcome, line = make(seed, data, folder / "cache", kind)
        results[kind].append(outcome)
        print(f"{number + 1:>3}  seed {seed:<4} {kind:<18} {outcome:<8} {line}", flush=True)
    return summary(results)


def make(seed: int, data: Path, cache: Path, kind: str) -> tuple[str, str]:
    """One round: its outcome and a line about it. The folder is kept where it fails."""
    place = Path(tempfile.mkdtemp(prefix=f"soak-{seed}-"))
    try:
        made = run(seed, place, data, cache, kind)
    except PermissionError as error:
        outcome, line = "skipped", str(error)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return "FAILED", f"{place}: {error}"
    else:
        outcome, line = "whole" if made.hit else "no hit", made.line
    shutil.rmtree(place)
    return outcome, line


def summary(results: dict[str, list[str]]) -> int:
    """Print the outcomes by kind. 1 where a round failed."""
    outcomes = ("whole", "no hit", "skipped", "FAILED")
    print(f"\n{'fault':<18}" + "".join(f"{name:>9}" for name in outcomes))
    for kind, found in results.items():
        print(f"{kind:<18}" + "".join(f"{found.count(name):>9}" for name in outcomes))
    failures = sum(found.count("FAILED") for found in results.values())
    rounds = sum(map(len, results.values()))
    print(f"{rounds - failures} of {rounds} rounds without a loss")
    return int(failures > 0)


def run(seed: int, place: Path, data: Path, cache: Path, kind: str, after: float | None = None) -> Round:
    """One round; AssertionError says what was lost, PermissionError that the kind cannot be made here."""
    fault = FAULTS[kind]
    moment = random.Random(seed).uniform(0, LONGEST)
    after = moment if after is None else after
    started = time.monotonic()
    if fault.site:
        (place / "sitecustomize.py").write_text(fault.site.replace("PLACE", repr(str(place))))
    with results_folder(place, fault) as (results, disk):
        study = Study(results / "cars")
        command = [*search_command(data, cache, seed), "--results", str(results)]
        process = start([*command, *fault.options], place)
        family: list[psutil.Process] = []
        try:
            wait_for(lambda: process.poll() is not None or bool(study.records()), "the first trial to start")
            time.sleep(after)
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            hit = fault.strike(Scene(process, family, study, place, disk))
            output = ended(process)
        finally:
            process.kill()
        check_end(process.returncode, output, fault, hit)
        wait_for(lambda: not alive(family), f"the end of {[p.pid for p in alive(family)]}")
        if disk:
            disk.empty()
        before = {r.trial_id: r for r in study.records()}
        if fault.ends:
            states = sorted(r.state for r in before.values())
            assert len(states) == TRIALS, states
            assert {*states} <= {State.COMPLETE, State.PRUNED}, states
        (place / "sitecustomize.py").unlink(missing_ok=True)
        resumed = start([*command, "--resume"], place)
        try:
            output = ended(resumed)
        finally:
            resumed.kill()
        check(study, before, output, resumed.returncode, torn=fault.torn)
    again = sum(r.resumable for r in before.values())
    seconds = time.monotonic() - started
    return Round(seed, kind, after, hit, process.returncode, len(before) - again, again, seconds)


@contextmanager
def results_folder(place: Path, fault: Fault) -> Iterator[tuple[Path, Disk | None]]:
    """The folder of the studies, and its disk where the fault is one of a disk's."""
    if not fault.on_disk:
        yield place / "results", None
        return
    with mounted(place / "disk") as disk:
        yield disk.folder, disk


def check_end(code: int, output: str, fault: Fault, hit: bool) -> None:
    """What must hold of the command that was struck."""
    assert "Traceback" not in output, output
    assert "Warning" not in output, output
    assert code in (fault.codes if hit else (0, *fault.codes)), f"exit code {code}: {output}"
    if code == 2:
        assert output.splitlines()[-1].startswith("error: "), output


def check(study: Study, before: dict[str, TrialRecord], output: str, code: int, torn: int = 0) -> None:
    """What must hold after a search was resumed."""
    assert code == 0, output
    assert "Traceback" not in output, output
    assert "Warning" not in output, output
    cut = {i for i, r in before.items() if r.resumable or to_repeat(r)}
    said = re.search(r"Resumed: (\d+) trials kept, (\d+) queued again", output)
    counts = (int(said[1]), int(said[2])) if said else (0, 0)
    assert counts == (len(before) - len(cut), len(cut)), output
    after = {r.trial_id: r for r in study.records()}
    assert {i: after[i] for i in before if i not in cut} == {i: before[i] for i in before if i not in cut}
    assert set(after) >= set(before)
    assert len(after) == TRIALS, f"{len(after)} trials instead of {TRIALS}"
    assert not [i for i, r in after.items() if r.resumable]
    assert len(study.damaged_lines()) <= torn
    lines = study.trials_file.read_text().splitlines()
    rows = [json.loads(line) for n, line in enumerate(lines, 1) if n not in study.damaged_lines()]
    complete = [row["trial_id"] for row in rows if row["state"] == State.COMPLETE]
    assert len(complete) == len(set(complete)), "a complete trial ran again"
    assert all(r.at >= 0 and r.seconds >= 0 for r in after.values()), "a trial took less than no time"
    for record in study.leaderboard():
        for split in ("val", "holdout", "test"):
            study.predictions(record.trial_id, split)
    storage = optuna.storages.RDBStorage(f"sqlite:///{study.optuna_file}")
    (known,) = optuna.get_all_study_summaries(storage)
    states = [trial.state for trial in optuna.load_study(study_name=known.study_name, storage=storage).trials]
    storage.remove_session()
    assert all(state.is_finished() for state in states), states


def to_repeat(record: TrialRecord) -> bool:
    """A trial that had no time runs again, for now there is; the baseline unless it ended of itself."""
    failed = record.state is State.FAILED and not record.diverged
    return record.state is State.OUT_OF_TIME or (record.baseline and (failed or record.state is State.PRUNED))


# ---- the faults


def kill(processes: Sequence[psutil.Process]) -> bool:
    for process in processes:
        process.kill()
    return bool(processes)


def kill_worker(scene: Scene) -> bool:
    return kill([p for p in scene.family if p.is_running() and trains(name_of(p))][:1])


def kill_loader(scene: Scene) -> bool:
    """A process that a worker has started to load images."""
    return kill([p for p in scene.family if p.is_running() and trains(parent_of(p))][:1])


def kill_ray(scene: Scene) -> bool:
    return kill([p for p in scene.family if Path(name_of(p).split(" ")[0]).name in ("raylet", "gcs_server")])


def fill_disk(scene: Scene) -> bool:
    assert scene.disk
    hit = scene.process.poll() is None
    scene.disk.fill()
    return hit


HOLD = """
import sqlite3, sys, time
other = sqlite3.connect(sys.argv[1], timeout=20, isolation_level=None)
other.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


def lock_database(scene: Scene) -> bool:
    """Another process holds it, and lets it go."""
    hit = scene.process.poll() is None
    holder = [sys.executable, "-c", HOLD, str(scene.study.optuna_file), str(LOCKED)]
    with subprocess.Popen(holder, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "locked\n"
    return hit


def set_clock(seconds: float) -> Callable[[Scene], bool]:
    def strike(scene: Scene) -> bool:
        (scene.place / "jump").write_text(str(seconds))
        return scene.process.poll() is None

    return strike


# The clock of the command, once there is the file.
CLOCK = """
import os, sys, time
real = time.time
jump = PLACE + "/jump"
if any(part.endswith("tune/search.py") for part in sys.orig_argv[:2]):
    time.time = lambda: real() + (float(open(jump).read() or 0) if os.path.exists(jump) else 0)
"""

PATCHING = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), patch(module))
        return spec

sys.meta_path.insert(0, Finder())
"""


def patch_on_import(module: str, code: str) -> str:
    """A sitecustomize.py that calls `patch(module)`, which `code` defines, as the module is imported."""
    return PATCHING.format(module=module) + code


# Each worker has a loader process, as on a GPU.
LOADERS = patch_on_import(
    "tune.runtime.job",
    """
def patch(job):
    job.Workers.processes = property(lambda workers: 1)
""",
)


def send(*signals: signal.Signals) -> Callable[[Scene], bool]:
    """Send these to the command, half a second apart."""

    def strike(scene: Scene) -> bool:
        hit = scene.process.poll() is None
        for number in signals:
            if scene.process.poll() is None:
                scene.process.send_signal(number)
                time.sleep(0.5)
        return hit

    return strike


def nothing(scene: Scene) -> bool:
    """The search's own clock ends it."""
    return scene.process.poll() is None


HALF_AN_HOUR = ("--hours", "0.5")  # longer than a round, shorter than a jump of the clock
FAULTS: dict[str, Fault] = {
    "disk full": Fault(fill_disk, (2, 0), on_disk=True, torn=2),  # 0: nothing was left to write
    "database locked": Fault(lock_database, (0,), ends=True),
    "worker killed": Fault(kill_worker, (0,), ends=True),
    "loader killed": Fault(kill_loader, (0,), site=LOADERS, ends=True),
    "command killed": Fault(send(signal.SIGKILL), (-signal.SIGKILL,)),
    "command terminated": Fault(send(signal.SIGTERM), (130, 0)),  # 0: all trials had ended
    "Ctrl-C": Fault(send(signal.SIGINT), (130, 0)),
    "Ctrl-C twice": Fault(send(signal.SIGINT, signal.SIGINT), (130, 0)),
    "Ray killed": Fault(kill_ray, (1, 2)),  # 1: Ray's own code ends the process
    "clock forward": Fault(set_clock(JUMP), (0,), HALF_AN_HOUR, CLOCK, ends=True),
    "clock back": Fault(set_clock(-JUMP), (0,), HALF_AN_HOUR, CLOCK, ends=True),
    "time is up": Fault(nothing, (0,), ("--hours", f"{30 / 3600:.5f}")),
}


# ---- the rest


def search_command(data: Path, cache: Path, seed: int) -> list[str]:
    """A search of a few small trials."""
    return [
        sys.executable,
        str(ROOT / "tune" / "search.py"),
        *("--data", str(data), "--weights", str(DEMO_WEIGHTS)),
        *("--preset", "demo", "--set", "epochs=6", "--set", "image_size=32,48", "--cache", str(cache)),
        *("--trials", str(TRIALS), "--until", "search", "--seed", str(seed), "--study", "cars"),
    ]


def start(command: list[str], place: Path) -> subprocess.Popen[str]:
    """Start a command in a folder, whose `sitecustomize.py` its processes run."""
    return subprocess.Popen(
        command,
        cwd=place,
        env={**environment(), "PYTHONPATH": os.pathsep.join((str(place), str(ROOT)))},  # its sitecustomize
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def environment() -> dict[str, str]:
    """With the code of this folder first, wherever the package is installed from."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "COLUMNS": "150", "NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONPATH": paths}


def ended(process: subprocess.Popen[str], patience: float = PATIENCE) -> str:
    """What the command printed until its end; AssertionError where it hangs."""
    try:
        output, _ = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the command still runs after {patience:.0f} s") from None
    return output


def wait_for(happened: Callable[[], bool], what: str) -> None:
    """AssertionError where it does not happen."""
    until = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.1)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run, but for Ray's agents: they hold nothing, and end a minute after Ray was killed."""
    return [p for p in processes if p.is_running() and name_of(p) and "Agent" not in name_of(p)]


def trains(name: str) -> bool:
    """Whether this is a worker's command line: Ray's own title, or that of the trial that it trains."""
    return name.startswith("ray::") and ("ImplicitFunc" in name or "px-" in name)


def parent_of(process: psutil.Process) -> str:
    """Its parent's command line; empty where one of them has ended."""
    try:
        parent = process.parent()
    except psutil.NoSuchProcess:
        return ""
    return name_of(parent) if parent else ""


def name_of(process: psutil.Process) -> str:
    """Its command line; empty where it has ended."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


if __name__ == "__main__":
    sys.exit(main())

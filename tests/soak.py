"""python tests/soak.py

Searches that are killed at random moments, and resumed: a trial's worker, the command itself (SIGKILL,
SIGTERM, SIGINT once and twice), Ray's processes, the end of the time. After each round nothing may be lost:
see `check`. Rounds that were made are kept in .soak/rounds.jsonl and not made again; the seed of a round
decides its fault and its moment.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna
import psutil

from carmodels.demo.folder import DEMO_WEIGHTS, draw_demo
from carmodels.records import State, TrialRecord
from carmodels.study import Study

ROOT = Path(__file__).parents[1]
TRIALS = 4
LONGEST = 6.0  # seconds from the first trial's start to the fault
Fault = Callable[[subprocess.Popen[str], list[psutil.Process]], bool]  # whether there was something to hit
PATIENCE = 120.0  # seconds after which a command that does not end counts as hanging


@dataclass(frozen=True)
class Round:
    """What one round came to."""

    seed: int
    fault: str
    after: float  # seconds from the first trial's start
    hit: bool  # whether there was something to hit
    kept: int
    again: int
    seconds: float


def main() -> int:
    """Make the rounds that are missing; 1 where one of them lost something."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=1, help="rounds side by side, sharing one cache")
    options = parser.parse_args()
    folder = ROOT / ".soak"
    folder.mkdir(exist_ok=True)
    done = folder / "rounds.jsonl"
    made = [json.loads(line) for line in done.read_text().splitlines()] if done.is_file() else []
    data = folder / "cars"
    draw_demo(data, seed=1, train=200, test=20)
    missing = sorted(set(range(options.rounds)) - {row["seed"] for row in made})
    failures = 0
    with ThreadPoolExecutor(options.at_once) as pool:
        rounds = {pool.submit(make, seed, data, folder / "cache"): seed for seed in missing}
        for ended_round in as_completed(rounds):
            try:
                row = asdict(ended_round.result())
            except (AssertionError, subprocess.TimeoutExpired) as error:
                failures += 1
                print(
                    f"round {rounds[ended_round]} FAILED, see {tempfile.gettempdir()}/soak-*: {error}",
                    flush=True,
                )
                continue
            with done.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                flush=True,
            )
    print(f"{options.rounds - failures} of {options.rounds} rounds without a loss")
    return failures > 0


def make(seed: int, data: Path, cache: Path) -> Round:
    """One round, whose folder is kept only where it fails."""
    place = Path(tempfile.mkdtemp(prefix=f"soak-{seed}-"))
    made = run(seed, place, data, cache)
    shutil.rmtree(place)
    return made


def run(
    seed: int,
    place: Path,
    data: Path,
    cache: Path,
    fault: str | None = None,
    after: float | None = None,
) -> Round:
    """One round; AssertionError says what was lost."""
    rng = random.Random(seed)
    fault = fault or rng.choice(list(FAULTS))
    moment = rng.uniform(0, LONGEST)
    after = moment if after is None else after
    started = time.monotonic()
    command = search_command(data, cache, seed)
    limit = ("--hours", f"{(20 + after) / 3600:.5f}") if fault == "time" else ()
    study = Study(place / "results" / "cars")
    process = subprocess.Popen(
        [*command, *limit],
        cwd=place,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: process.poll() is not None or bool(study.records()), "the first trial to start")
        time.sleep(after)
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        hit = FAULTS[fault](process, family)
        output = ended(process)
    finally:
        process.kill()
    assert "Traceback" not in output, output
    assert "Warning" not in output, output
    wait_for(lambda: not alive(family), f"the end of {[p.pid for p in alive(family)]}")
    before = {r.trial_id: r for r in study.records()}
    kept = {i: r for i, r in before.items() if not r.resumable}
    resumed = subprocess.run(
        [*command, "--resume"],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    check(study, before, resumed.stdout + resumed.stderr, resumed.returncode)
    again = len(before) - len(kept)
    return Round(seed, fault, after, hit, len(kept), again, time.monotonic() - started)


def check(study: Study, before: dict[str, TrialRecord], output: str, code: int) -> None:
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
    lines = [json.loads(line) for line in study.trials_file.read_text().splitlines()]
    complete = [row["trial_id"] for row in lines if row["state"] == State.COMPLETE]
    assert len(complete) == len(set(complete)), "a complete trial ran again"
    assert not study.damaged_lines()
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


def kill_worker(process: subprocess.Popen[str], family: list[psutil.Process]) -> bool:
    workers = [p for p in family if p.is_running() and trains(name_of(p))]
    for worker in workers[:1]:
        worker.kill()
    return bool(workers)


def kill_ray(process: subprocess.Popen[str], family: list[psutil.Process]) -> bool:
    own = [p for p in family if Path(name_of(p).split(" ")[0]).name in ("raylet", "gcs_server")]
    for part in own:
        part.kill()
    return bool(own)


def send(*signals: signal.Signals) -> Fault:
    """A fault that sends these to the command, half a second apart."""

    def fault(process: subprocess.Popen[str], family: list[psutil.Process]) -> bool:
        hit = process.poll() is None
        for number in signals:
            if process.poll() is None:
                process.send_signal(number)
                time.sleep(0.5)
        return hit

    return fault


def nothing(process: subprocess.Popen[str], family: list[psutil.Process]) -> bool:
    """The search's own clock ends it."""
    return process.poll() is None


FAULTS: dict[str, Fault] = {
    "worker killed": kill_worker,
    "command killed": send(signal.SIGKILL),
    "command terminated": send(signal.SIGTERM),
    "Ctrl-C": send(signal.SIGINT),
    "Ctrl-C twice": send(signal.SIGINT, signal.SIGINT),
    "Ray killed": kill_ray,
    "time": nothing,
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


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "150", "NO_ALBUMENTATIONS_UPDATE": "1"}


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


def name_of(process: psutil.Process) -> str:
    """Its command line; empty where it has ended."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


if __name__ == "__main__":
    sys.exit(main())

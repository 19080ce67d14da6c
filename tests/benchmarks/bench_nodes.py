"""python tests/benchmarks/bench_nodes.py

What several machines gain, and what the driver costs. First searches over 1, 2 and 4 nodes that Ray simulates
on this machine, whose trials sleep, so that cores do not limit: trials an hour (`ours`) against workers over
a trial's seconds (`theirs`), and what is lost on a trial. Then the driver alone, with its real recorder,
scheduler, sampler and storage: seconds of processor time for a result, for a trial's end and for a draw, with
1,000 trials that run, after 1,000 that ended (`ours`) and after 100 (`theirs`).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import ray
from ray.cluster_utils import Cluster
from ray.tune import report

from carmodels.models.weights import Weights
from carmodels.presets import SPACES
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run
from tune.budget.stages import WEIGHTS_KEPT
from tune.optim.optuna_file import OptunaFile
from tune.optim.optuna_records import suggest
from tune.optim.scheduler import AshaScheduler, TimeLimit
from tune.optim.searcher import OptunaSearcher
from tune.runtime import worker
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.cluster import start_ray
from tune.runtime.job import Job, Workers
from tune.runtime.recorder import Recorder
from tune.runtime.runner import run_trials

from table import Row, finish

NODES, SLOTS = (1, 2, 4), 1
EPOCHS, SECONDS = 4, 2.0  # of a sleeping trial, and of each of its epochs
ROUNDS = 6  # trials of each worker
ENDED, RUNNING, RESULTS = (100, 1000), 1000, 100
ORIGIN = Origin()
LAST = {"state": State.COMPLETE, "cause": None, "cut_short": False, "reason": "ran"}  # of a last report
SPACE = replace(SPACES["cpu"], fixed={**SPACES["cpu"].fixed, "epochs": EPOCHS})


def main() -> None:
    """Measure every case and write the table."""
    few, many = (driver(ended) for ended in ENDED)
    alone = [
        Row(f"driver, {name}", many[name], few[name], many[name] / few[name], "", 1, "s") for name in many
    ]
    finish("bench_nodes", alone)
    for nodes in NODES:
        finish("bench_nodes", scaling(nodes))


# ---- several machines


def sleeping(values: dict[str, Any], job: Job) -> None:
    """In the place of a trial's training: the same reports, and nothing to do in between."""
    run = Run.from_dict(values)
    for number in range(1, EPOCHS + 1):
        time.sleep(SECONDS)
        value = 1 - math.exp(-number * run.config.lr**0.3)
        epoch = EpochMetrics(number, 1.0, 1.0, value, value, SECONDS)
        last = {**LAST, "best_value": value} if number == EPOCHS else {}
        ids = {"run_id": run.id, "elapsed": number * SECONDS}
        report({"accuracy": value, **ids, **asdict(epoch), **last})


def scaling(nodes: int) -> list[Row]:
    """A search of sleeping trials over so many nodes, once all their workers are there."""
    worker.train_trial = sleeping  # type: ignore[assignment]  # what `run_trials` sends to the workers
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(nodes):
        cluster.add_node(num_cpus=SLOTS)
    start_ray(address=cluster.address, cores=0, gpus=0)
    workers = nodes * SLOTS
    count, begun, busy = ROUNDS * workers, time.time(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        study = begin(Path(folder))
        job = Job(study, None, Weights("none"), Workers(workers, 1, 0.0), Path(folder))  # type: ignore[arg-type]
        draws = drawing(study, limit=count)
        scheduler = judging(protected=())
        run_trials(
            job,
            stage="search",
            begun=begun,
            end=math.inf,
            search_alg=draws,
            scheduler=scheduler,
            roles={},
            watch=ProgressCallback(),
        )
        records = study.records()
    spent = (time.process_time() - busy) / count
    ray.shutdown()
    cluster.shutdown()
    ends = sorted(r.at for r in records)[workers - 1 : -workers]  # all workers are there, and none idles
    slept = sum(r.seconds for r in records) / len(records)
    rate = (len(ends) - 1) / (ends[-1] - ends[0])
    name = f"{nodes} nodes, {workers} workers, {count} trials"
    ideal = workers / slept
    return [
        Row(f"{name}: trials an hour", 3600 * rate, 3600 * ideal, rate / ideal, "", 1, "1/h"),
        Row(f"{name}: lost on a trial, of {slept:.1f} s", workers / rate - slept, "", "", "", 1, "s"),
        Row(f"{name}: processor time of the driver for a trial", spent, "", "", "", 1, "s"),
    ]


# ---- the driver


def driver(ended: int) -> dict[str, float]:
    """Seconds that each part of the driver takes, after so many trials have ended."""
    with tempfile.TemporaryDirectory() as folder:
        study = begin(Path(folder))
        at_random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        runs = [
            Run(TrialConfig.from_dict(suggest(at_random.ask(), SPACE)), ORIGIN)
            for _ in range(ended + RUNNING)
        ]
        known = [record(run) for run in runs[:ended]]
        for one in known:
            study.append(one)
        scheduler, recorder = judging(), Recorder(study, "search", 0.0, {}, ProgressCallback())
        scheduler.replay(known)
        draws = drawing(study, limit=None, queue=runs[ended:], known=known)
        running = [begin_trial(number, draws, recorder, scheduler) for number in range(RUNNING)]
        parts: dict[str, float] = {}
        each = running[:RESULTS]
        result(
            parts, "a result: scheduler", each, lambda t: scheduler.on_trial_result(None, t, t.last_result)
        )
        result(
            parts,
            "a result: sampler's storage",
            each,
            lambda t: draws.on_trial_result(t.trial_id, t.last_result),
        )
        result(parts, "a result: recorder", each, lambda t: recorder.on_trial_result(0, [], t, t.last_result))
        for trial in each:
            trial.last_result |= {**LAST, "best_value": trial.last_result["accuracy"]}
        few = each[:10]
        result(
            parts,
            "a trial's end: sampler's storage",
            few,
            lambda t: draws.on_trial_complete(t.trial_id, t.last_result),
        )
        result(
            parts,
            "a trial's end: recorder, with table and weights",
            few,
            lambda t: recorder.on_trial_complete(0, [], t),
        )
        result(parts, "of which the table", few, lambda t: study.write_table())
        result(parts, "of which the weights", few, lambda t: study.keep_weights(WEIGHTS_KEPT))
        result(parts, "a draw", few[:3], lambda t: draws.suggest(f"new {t.trial_id}"))
    return parts


def result(parts: dict[str, float], name: str, some: list[Any], call: Callable[[Any], object]) -> None:
    """The mean seconds of processor time of the call, whatever else the machine does."""
    started = time.process_time()
    for trial in some:
        call(trial)
    parts[name] = (time.process_time() - started) / len(some)


def begin_trial(number: int, draws: OptunaSearcher, recorder: Recorder, scheduler: AshaScheduler) -> Any:
    """A trial of Ray's that runs, as far as the parts look at it, with its first result."""
    name = f"t{number}"
    values = draws.suggest(name)
    assert isinstance(values, dict)
    trial: Any = SimpleNamespace(trial_id=name, config=values, last_result=None, error_file=None)
    recorder.on_trial_start(0, [], trial)
    scheduler.on_trial_add(None, trial)
    value = number / RUNNING
    ids = {"run_id": Run.from_dict(values).id, "elapsed": 1.0}
    trial.last_result = {"accuracy": value, **ids, **asdict(EpochMetrics(1, 1.0, 1.0, value, value, 1.0))}
    return trial


# ---- what both begin with


def begin(folder: Path) -> Study:
    study = Study(folder / "study")
    study.begin({"metric": "accuracy"}, [])
    return study


def drawing(study: Study, **more: Any) -> OptunaSearcher:
    return OptunaSearcher(
        SPACE,
        origin=ORIGIN,
        metric="accuracy",
        mode="max",
        seed=0,
        fits=lambda config: True,
        copy=OptunaFile(study.optuna_file, print),
        **more,
    )


def judging(protected: tuple[str, ...] = ()) -> AshaScheduler:
    never = TimeLimit(soft=math.inf, hard=math.inf)
    return AshaScheduler(
        metric="accuracy",
        mode="max",
        epochs=EPOCHS,
        grace_period=EPOCHS,
        time_limit=never,
        protect=protected,
    )


def record(run: Run) -> TrialRecord:
    values = [1 - math.exp(-number * run.config.lr**0.3) for number in range(1, EPOCHS + 1)]
    curve = tuple(EpochMetrics(n, 1.0, 1.0, v, v, 1.0) for n, v in enumerate(values, start=1))
    return TrialRecord(
        run.id,
        run.config,
        State.COMPLETE,
        EPOCHS,
        values[-1],
        EPOCHS,
        "ran",
        origin=run.origin,
        curve=curve,
    )


if __name__ == "__main__":
    main()

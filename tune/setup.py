"""What every script needs first: its share of the machine, the data, a running Ray, one line for an error."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import joblib
import ray
import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from carmodels.data import Splits, open_dataset
from carmodels.files import user_path, write_whole
from carmodels.models import Weights
from carmodels.study import Study
from carmodels.training import parted
from tune.clock import Clock
from tune.console import Screen
from tune.costs import GPU_SHARES
from tune.preflight import Finding, cluster_findings
from tune.prometheus import exported
from tune.tensorboard import written
from tune.trials import Job, Watch, Workers, start_ray, together

CACHE_LIMIT, MOST_CACHE = 100.0, 1e6  # GB
MOST_FOLDS = 20


class Machine(NamedTuple):
    """What one machine has; a trial runs on one."""

    cores: int
    gpus: int


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the options\n")


def guarded(run: Callable[[argparse.Namespace, Screen], int], options: argparse.Namespace) -> int:
    """Run a script's job; one line on standard error for what a user can mend. Returns the exit code."""
    screen = Screen(plain=getattr(options, "plain", False))  # report.py has no live view to leave out
    try:
        _refuse_empty(options)
        return run(options, screen)
    except (ValueError, OSError) as error:
        screen.rest()
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        screen.rest()
        print("stopped at once; search.py --resume goes on with what was recorded", file=sys.stderr)
        return 130
    finally:
        screen.rest()


def _refuse_empty(options: argparse.Namespace) -> None:
    """An empty text is a shell variable that was not set, not the wish for a default."""
    for name, value in vars(options).items():
        if value == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty: give a value, or leave it out")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what a command may use of this machine or cluster."""
    add = parser.add_argument
    add(
        "--gpus-per-trial",
        default="1",
        metavar="F|auto",
        help="share of a GPU for each trial (1); auto: as small a one as its memory needs",
    )
    add("--workers", type=int, metavar="N", help="trials side by side (as many as GPUs or cores hold)")
    add("--address", metavar="ADDR", help="join this Ray cluster instead of starting Ray here")
    add_cache_options(parser)
    add("--plain", action="store_true", help="plain lines, on a terminal, too, in place of the live view")


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where decoded pictures are kept."""
    add = parser.add_argument
    add("--cache", metavar="DIR", help="where decoded pictures are kept (the user's cache folder)")
    add(
        "--cache-limit",
        type=float,
        default=CACHE_LIMIT,
        metavar="GB",
        help=f"most that they may take ({CACHE_LIMIT:g})",
    )


def add_fold_options(parser: argparse.ArgumentParser) -> None:
    """The options of retraining that change what is learnt from."""
    parser.add_argument(
        "--folds",
        type=int,
        default=0,
        metavar="K",
        help="retrain the best few once for each of K folds of train and val, not from new seeds (0: off)",
    )
    parser.add_argument(
        "--fold-in",
        action="store_true",
        help="train the best a last time on all labelled pictures, audit too: a submission without a score",
    )


def check_folds(options: argparse.Namespace) -> None:
    """Raises ValueError for a number of folds that makes no sense."""
    if options.folds and not 2 <= options.folds <= MOST_FOLDS:
        raise ValueError(f"--folds {options.folds} must be 0, which leaves it out, or from 2 to {MOST_FOLDS}")


def add_cost_option(parser: argparse.ArgumentParser) -> None:
    """The option that says what answers may cost."""
    parser.add_argument(
        "--max-seconds-per-1000",
        type=float,
        metavar="S",
        help="most that the ensemble with its views may take a worker here for 1,000 pictures (no limit)",
    )


def cost_limit(options: argparse.Namespace) -> float:
    """What 1,000 pictures may take; infinite where nothing was said. ValueError for a limit that is none."""
    given = options.max_seconds_per_1000
    if given is not None and not given > 0:
        raise ValueError(f"--max-seconds-per-1000 {given:g} must be above 0")
    return math.inf if given is None else float(given)


def out_file(options: argparse.Namespace) -> Path | None:
    """The absolute path that --out names, None without; ValueError where no file can be written."""
    if options.out is None:
        return None
    path = user_path(options.out)
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise ValueError(f"--out {options.out} must name a file in a folder that exists")
    return path


def check_machine(options: argparse.Namespace) -> Workers | None:
    """What each trial may use; ValueError for what this machine cannot do.

    None for a cluster, which is asked when it is joined.
    """
    return None if options.address else _shared_out(options, [_here()])


@contextmanager
def held(study: Study) -> Iterator[None]:
    """The study is this process's alone, from here to the end of the block; ValueError names who has it."""
    study.lock_file.parent.mkdir(parents=True, exist_ok=True)
    owner = study.lock_file.with_suffix(".owner")
    lock = FileLock(study.lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        whose = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
        raise ValueError(
            f"{study.folder} is in use by {whose}; wait for its end, stop it, or give another --study NAME"
        ) from None
    try:
        write_whole(owner, f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _here() -> Machine:
    return Machine(joblib.cpu_count(), torch.cuda.device_count() if torch.cuda.is_available() else 0)


def _shared_out(options: argparse.Namespace, machines: Sequence[Machine]) -> Workers:
    """As many trials side by side as the GPUs, or else the cores, hold; ValueError for more.

    Machines without a GPU are left alone where another has one. Each trial gets as many cores as leave room
    for all of them, on whichever machines.
    """
    gpus, cores = sum(m.gpus for m in machines), sum(m.cores for m in machines)
    packed = options.gpus_per_trial == "auto"
    share = min(GPU_SHARES) if packed else _share(options.gpus_per_trial)
    fits = sum(_places(m, share) for m in machines) if gpus else cores
    count = fits if options.workers is None else options.workers
    if count < 1:
        raise ValueError(f"--workers {count} must be at least 1")
    if count > fits:
        there = f"{gpus} GPUs at --gpus-per-trial {options.gpus_per_trial}" if gpus else f"{cores} cores"
        raise ValueError(f"--workers {count} is more than {there} hold; at most {fits}")
    if packed and gpus:
        whole = min(gpus, count)
        return Workers(whole, _cores_each(machines, whole, 1.0), 1.0, packed=count)
    return Workers(count, _cores_each(machines, count, share), share if gpus else 0.0)


def _places(machine: Machine, share: float) -> int:
    """How many trials its GPUs hold."""
    return machine.gpus * int(1 / share + 1e-9)


def _cores_each(machines: Sequence[Machine], count: int, share: float) -> int:
    """The most cores a trial can have with `count` of them side by side, each on one machine; at least 1."""
    on_gpus = any(m.gpus for m in machines)

    def held(cores: int) -> int:
        return sum(
            min(m.cores // cores, _places(m, share)) if on_gpus else m.cores // cores for m in machines
        )

    return next((c for c in range(max(m.cores for m in machines), 1, -1) if held(c) >= count), 1)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(
            f"--gpus-per-trial {text} must be above 0 and at most 1, or auto: a trial trains on one GPU"
        )
    return share


def cache_folder(options: argparse.Namespace) -> Path:
    """What `--cache` says, else the user's cache folder."""
    return user_path(options.cache) if options.cache else user_cache_path("carmodels")


def open_data(data: Path, options: argparse.Namespace, max_size: int, seed: int, screen: Screen) -> Splits:
    """The data set, decoded once for every size up to `max_size` pixels."""
    if not 0 < options.cache_limit < MOST_CACHE:
        raise ValueError(
            f"--cache-limit {options.cache_limit:g} must be above 0 and below {MOST_CACHE:,.0f} GB"
        )
    cache_dir = cache_folder(options)
    progress, on_progress = screen.decoding()
    with progress:
        return open_dataset(
            data,
            cache_dir=cache_dir,
            max_size=max_size,
            seed=seed,
            on_progress=on_progress,
            on_estimate=lambda size: screen.say(
                f"Decoding the pictures, once for all trials at up to {max_size} px: "
                f"about {size / 1e6:,.0f} MB in {cache_dir / 'images'}."
            ),
            on_damage=lambda damage: screen.say(f"Rebuilt: {damage.split(':')[0]}.", "yellow"),
            cache_limit=round(options.cache_limit * 1e9),
        )


def data_of(study: Study, options: argparse.Namespace, screen: Screen) -> Splits:
    """The data set of a study that exists; ValueError where it has changed."""
    facts = study.facts
    data = study.resolved(facts["data"])
    splits = open_data(data, options, facts["max_size"], facts["seed"], screen)
    if (splits.fingerprint, splits.split_hash) != (facts["fingerprint"], facts["split_hash"]):
        raise ValueError(
            f"{data} is no longer the data set that {study.folder} was made with; bring that one back"
        )
    return splits


def watched(job: Job, clock: Clock, trials: int | None, screen: Screen, *, inner: str = "") -> Watch:
    """What looks on while the job's study runs: the screen, Ray's metrics and TensorBoard's curves.

    `inner` names a study inside the user's own.
    """
    study = job.study
    metrics = exported(
        f"{study.folder.parent.name}/{inner}" if inner else study.folder.name,
        study.metric,
        pictures=lambda config: len(parted(config, job.splits).train),
        clock=clock,
        records=study.records(),
    )
    return together(screen.watch(study, clock, trials), metrics, written(study))


@contextmanager
def reopened(study: Study, options: argparse.Namespace, screen: Screen) -> Iterator[Job]:
    """The job of a study that exists, with Ray running for it; ValueError where its data set has changed."""
    check_machine(options)
    splits, weights = data_of(study, options, screen), weights_of(study)
    with held(study), ray_running(options, screen) as workers:
        if options.address:
            data = study.resolved(study.facts["data"])
            look_at_machines(study, data, weights, options, screen)
        study.make_folders()
        yield Job(study, splits, weights, workers, cache_folder(options), spent=study.spent())


@contextmanager
def alone(study: Study, options: argparse.Namespace, screen: Screen) -> Iterator[Job]:
    """Likewise without Ray: one worker that has all cores and one GPU, if there is any, to itself."""
    splits, here = data_of(study, options, screen), _here()
    workers = Workers(1, here.cores, float(min(1, here.gpus)))
    with held(study):
        study.make_folders()
        yield Job(study, splits, weights_of(study), workers, cache_folder(options))


def weights_of(study: Study) -> Weights:
    """Where a study that exists has its pretrained weights from."""
    source = study.facts["weights"]
    return Weights(source if source in ("hub", "none") else str(study.resolved(source)))


@contextmanager
def ray_running(options: argparse.Namespace, screen: Screen) -> Iterator[Workers]:
    """Ray, from here to the end of the block; gives what each trial may use."""
    here = _here()
    dashboard = start_ray(address=options.address, cores=here.cores, gpus=here.gpus)
    if dashboard:
        screen.say(f"Ray dashboard: {dashboard} (it asks for the token that `ray get-auth-token` prints)")
    try:
        yield _shared_out(options, _joined(options.address) if options.address else [here])
    finally:
        ray.shutdown()


def _joined(address: str) -> list[Machine]:
    """The machines of the cluster that are there; ValueError where none can train."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    machines = [Machine(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in resources]
    if not any(m.cores for m in machines):
        raise ValueError(f"--address {address}: the cluster has no cores; start machines that have some")
    return machines


def look_at_machines(
    study: Study, data: Path, weights: Weights, options: argparse.Namespace, screen: Screen
) -> None:
    """Every machine of a cluster before the first trial: a line a finding, ValueError for a fatal one."""
    shared = {"--data": data, **({"--weights": Path(weights.source)} if weights.is_folder else {})}
    report(cluster_findings(study.folder.parent, shared, cache_folder(options)), screen)


def report(found: Sequence[Finding], screen: Screen) -> None:
    """A line for each; ValueError with the first that is fatal."""
    for finding in found:
        if finding.fatal:
            raise ValueError(finding.words)
        screen.say(f"Note: {finding.words}.", "yellow")

"""Setup that the scripts share: the study's lock, the data, a running Ray."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
from filelock import FileLock, Timeout

from carmodels.data.dataset import Splits, open_dataset
from carmodels.files import write_atomic
from carmodels.models.facts import LOCAL
from carmodels.models.weights import Weights
from carmodels.study import Study
from carmodels.training.held_out import splits_for
from tune.budget.clock import Clock
from tune.cli.options import cache_folder
from tune.cli.resources import check_machine, cluster_machines, share_out, this_machine
from tune.monitor.prometheus import exported
from tune.monitor.tensorboard import written
from tune.monitor.terminal import Screen
from tune.runtime.callbacks import ProgressCallback, combine_callbacks
from tune.runtime.cluster import cluster_findings, start_ray
from tune.runtime.findings import Finding, folder_findings
from tune.runtime.job import Job, Workers


@contextmanager
def held(study: Study) -> Iterator[None]:
    """Hold the study's lock inside the block. Raises ValueError that names the process holding it."""
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
        write_atomic(owner, f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def open_data(data: Path, options: argparse.Namespace, max_size: int, seed: int, screen: Screen) -> Splits:
    """The data set, decoded once at up to `max_size` pixels."""
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
                f"Decoding the images, once for all trials at up to {max_size} px: "
                f"about {size / 1e6:,.0f} MB in {cache_dir / 'images'}."
            ),
            on_damage=lambda damage: screen.say(f"Rebuilt: {damage.split(':')[0]}.", "yellow"),
            cache_limit=round(options.cache_limit * 1e9),
        )


def data_of(study: Study, options: argparse.Namespace, screen: Screen) -> Splits:
    """The data set of an existing study. Raises ValueError if it has changed."""
    facts = study.metadata
    if study.damage:
        screen.say(f"{study.damage}.", "yellow")
    data = study.resolved(facts["data"])
    report(folder_findings({"--cache": cache_folder(options)}), screen)
    splits = open_data(data, options, facts["max_size"], facts["seed"], screen)
    if (splits.fingerprint, splits.split_hash) != (facts["fingerprint"], facts["split_hash"]):
        raise ValueError(
            f"{data} is no longer the data set that {study.folder} was made with; bring that one back"
        )
    return splits


def watched(
    job: Job, clock: Clock, trials: int | None, screen: Screen, *, inner: str = ""
) -> ProgressCallback:
    """Callbacks for the progress of the job's study: screen, Ray metrics, TensorBoard.

    `inner` is the name of a study inside the user's study.
    """
    study = job.study
    metrics = exported(
        f"{study.folder.parent.name}/{inner}" if inner else study.folder.name,
        study.metric,
        images=lambda run: len(splits_for(run.origin, job.splits).train),
        clock=clock,
        records=study.records(),
    )
    return combine_callbacks(screen.watch(study, clock, trials), metrics, written(study))


@contextmanager
def open_job(study: Study, options: argparse.Namespace, screen: Screen) -> Iterator[Job]:
    """The job of an existing study, with Ray running. Raises ValueError if its data set has changed."""
    check_machine(options)
    splits, weights = data_of(study, options, screen), weights_of(study)
    with held(study), ray_running(options, screen) as workers:
        if options.address:
            data = study.resolved(study.metadata["data"])
            look_at_machines(study, data, weights, options, screen)
        study.make_folders()
        yield Job(study, splits, weights, workers, cache_folder(options), spent=study.seconds_by_stage())


@contextmanager
def open_job_without_ray(study: Study, options: argparse.Namespace, screen: Screen) -> Iterator[Job]:
    """The job of an existing study without Ray: one worker with all cores and at most one GPU."""
    splits, here = data_of(study, options, screen), this_machine()
    workers = Workers(1, here.cores, float(min(1, here.gpus)))
    with held(study):
        study.make_folders()
        yield Job(study, splits, weights_of(study), workers, cache_folder(options))


def weights_of(study: Study) -> Weights:
    """Source of an existing study's pretrained weights."""
    source = study.metadata["weights"]
    return Weights(source if source in ("hub", "none") else str(study.resolved(source)))


@contextmanager
def ray_running(options: argparse.Namespace, screen: Screen) -> Iterator[Workers]:
    """Run Ray inside the block. Yields the resources of each trial."""
    here = this_machine()
    dashboard = start_ray(address=options.address, cores=here.cores, gpus=here.gpus)
    if dashboard:
        screen.say(f"Ray dashboard: {dashboard} (it asks for the token that `ray get-auth-token` prints)")
    try:
        yield share_out(options, cluster_machines(options.address) if options.address else [here])
    finally:
        ray.shutdown()


def look_at_machines(
    study: Study,
    data: Path,
    weights: Weights,
    options: argparse.Namespace,
    screen: Screen,
    backbones: Sequence[str] = (),
) -> None:
    """Check a cluster's machines before the first trial. Raises ValueError for a fatal finding."""
    shared = {"--data": data, **({"--weights": Path(weights.source)} if weights.is_folder else {})}
    folders = [Path(name.removeprefix(LOCAL)) for name in backbones if name.startswith(LOCAL)]
    shared |= {f"--set backbone={folder.name}": folder for folder in folders}
    report(cluster_findings(study.folder.parent, shared, cache_folder(options)), screen)


def report(found: Sequence[Finding], screen: Screen) -> None:
    """Print one line for each finding. Raises ValueError for the first fatal one."""
    for finding in found:
        if finding.fatal:
            raise ValueError(finding.words)
        screen.say(f"Note: {finding.words}.", "yellow")

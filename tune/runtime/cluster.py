"""Starts Ray or joins a cluster, and checks the cluster's machines."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import carmodels
import tune
from carmodels.formatting import one_line
from tune.runtime.environment import WORKER_ENVIRONMENT
from tune.runtime.findings import Finding, file_handle_findings, folder_findings, shared_memory_findings

_CODE = Path(tune.__file__).parent


def start_ray(*, address: str | None, cores: int, gpus: int) -> str:
    """Start Ray on this machine, or join the cluster at `address`. Returns the dashboard's URL, or "".

    A cluster is sent our code. Its machines need only the packages that the code imports. Workers import it
    whatever the current folder holds: Ray puts that folder first on their path, so it is ours meanwhile.
    """
    arguments: dict[str, Any] = (
        {
            "address": address,
            "runtime_env": {
                "py_modules": [str(Path(package).parent) for package in (carmodels.__file__, tune.__file__)],
                "excludes": ["__pycache__"],
                "env_vars": {name: os.environ[name] for name in WORKER_ENVIRONMENT},
            },
        }
        if address
        else {
            "address": "local",
            "num_cpus": cores,
            "num_gpus": gpus,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "object_store_memory": 256 * 2**20,
        }
    )
    try:
        with chdir(_CODE.parent if address is None else _CODE):
            context = ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
    except (AuthenticationError, ConnectionError) as error:
        raise ValueError(f"--address {address}: {one_line(error)}" if address else one_line(error)) from None
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


PATIENCE = 120.0  # seconds for a machine to receive our code, start a worker and answer
PACKAGES = ("torch", "torchvision", "timm", "albumentations", "numpy")  # versions change a trial's results


def cluster_findings(results: Path, shared: Mapping[str, Path], cache: Path) -> list[Finding]:
    """Problems on the machines of the joined cluster, the fatal ones first.

    All machines must share one `results` folder. Each must have the `shared` paths (by option). `cache` may
    be local or shared.
    """
    results.mkdir(parents=True, exist_ok=True)
    marker = results / f".{secrets.token_hex(8)}.shared"
    marker.touch()
    check = ray.remote(num_cpus=0, max_retries=0)(_on_this_machine)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    try:
        answers = {
            address: check.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
            ).remote(marker, shared, cache, _versions())
            for node_id, address in nodes.items()
        }
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=PATIENCE)
        found = [
            Finding(f"machine {address}: {finding.words}", finding.fatal)
            for address, answer in answers.items()
            for finding in _answer(answer)
        ]
    finally:
        marker.unlink()
    return sorted(found, key=lambda finding: not finding.fatal)


def _answer(answer: ray.ObjectRef) -> list[Finding]:
    try:
        return ray.get(answer, timeout=0)
    except GetTimeoutError:
        return [
            Finding(f"no answer in {PATIENCE:.0f} s; look at it, or take it out of the cluster", fatal=True)
        ]
    except RayError as error:
        last = str(error).strip().splitlines()[-1]
        return [
            Finding(
                f"our code does not run there ({last}); install what requirements.lock lists, in the same "
                "versions",
                fatal=True,
            )
        ]


def _on_this_machine(
    marker: Path, shared: Mapping[str, Path], cache: Path, versions: Mapping[str, str]
) -> list[Finding]:
    """Problems on this machine, compared with the head machine's paths and versions."""
    results = marker.parent
    if not marker.is_file():
        words = (
            f"--results {results} is not the folder that the search sees; give one that all machines share"
        )
        return [Finding(words, fatal=True)]
    missing = [
        Finding(f"{option} {path} is not there; share it, or put a copy at the same path", fatal=True)
        for option, path in shared.items()
        if not path.exists()
    ]
    other = [
        Finding(f"{name} is {here} there and {versions[name]} here; install the same")
        for name, here in _versions().items()
        if here != versions[name]
    ]
    folders = folder_findings({"--results": results, "--cache": cache})
    return [*missing, *folders, *other, *shared_memory_findings(), *file_handle_findings()]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}

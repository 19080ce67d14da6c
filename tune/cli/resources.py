"""Divides GPUs or cores among workers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import joblib
import ray
import torch

from tune.budget.costs import GPU_SHARES
from tune.cli.options import gpu_share
from tune.runtime.findings import Finding
from tune.runtime.job import Workers


class Machine(NamedTuple):
    """Cores and GPUs of one machine. A trial runs on one machine."""

    cores: int
    gpus: int


def check_machine(options: argparse.Namespace) -> Workers | None:
    """Resources of each trial on this machine. None for a cluster, which is checked after joining.

    Raises ValueError for more than the machine has.
    """
    return None if options.address else share_out(options, [this_machine()])


def device_findings(preset: str, address: str | None) -> list[Finding]:
    """GPUs here that are not used, or not as well tested, and a preset that wants some."""
    if torch.cuda.is_available():
        rocm = "torch is built for ROCm: AMD's GPUs are used as CUDA's are, which is not tested here"
        return [Finding(rocm)] if torch.version.hip else []
    if torch.backends.mps.is_available():
        return [
            Finding("Apple's GPU (MPS) is not used, only NVIDIA's through CUDA: trials train on the cores")
        ]
    if preset != "gpu" or address:
        return []
    built = "sees no GPU" if torch.version.cuda else "is built without CUDA"
    return [
        Finding(
            f"--preset gpu: torch {torch.__version__} {built}, large networks will train on the cores; "
            "--preset cpu has smaller ones"
        )
    ]


def this_machine() -> Machine:
    return Machine(joblib.cpu_count(), torch.cuda.device_count() if torch.cuda.is_available() else 0)


def share_out(options: argparse.Namespace, machines: Sequence[Machine]) -> Workers:
    """As many parallel trials as fit on the GPUs, or on the cores if there is no GPU.

    If any machine has a GPU, machines without one are not used. Each trial gets the most cores with which all
    trials still fit. Raises ValueError if --workers is more than fits.
    """
    gpus, cores = sum(m.gpus for m in machines), sum(m.cores for m in machines)
    packed = options.gpus_per_trial == "auto"
    share = min(GPU_SHARES) if packed else gpu_share(options)
    fits = sum(_places(m, share) for m in machines) if gpus else cores
    count = fits if options.workers is None else options.workers
    if count > fits:
        there = f"{gpus} GPUs at --gpus-per-trial {options.gpus_per_trial}" if gpus else f"{cores} cores"
        raise ValueError(f"--workers {count} is more than {there} hold; at most {fits}")
    if packed and gpus:
        whole = min(gpus, count)
        return Workers(whole, _cores_each(machines, whole, 1.0), 1.0, packed=count)
    return Workers(count, _cores_each(machines, count, share), share if gpus else 0.0)


def _places(machine: Machine, share: float) -> int:
    """Number of trials that fit on the machine's GPUs."""
    return machine.gpus * int(1 / share + 1e-9)


def _cores_each(machines: Sequence[Machine], count: int, share: float) -> int:
    """Most cores per trial with which `count` trials fit, each on one machine; at least 1."""
    on_gpus = any(m.gpus for m in machines)

    def held(cores: int) -> int:
        return sum(
            min(m.cores // cores, _places(m, share)) if on_gpus else m.cores // cores for m in machines
        )

    return next((c for c in range(max(m.cores for m in machines), 1, -1) if held(c) >= count), 1)


def cluster_machines(address: str) -> list[Machine]:
    """The cluster's live machines. Raises ValueError if none has a core."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    machines = [Machine(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in resources]
    if not any(m.cores for m in machines):
        raise ValueError(f"--address {address}: the cluster has no cores; start machines that have some")
    return machines

"""Inputs shared by all trials of a study, and the resources of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from carmodels.data.dataset import Splits
from carmodels.data.splits import Split
from carmodels.evaluation.predictions import Predictions
from carmodels.formatting import one_line
from carmodels.models.classifier import Classifier, load_weights
from carmodels.models.weights import Weights
from carmodels.records import TrialRecord
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.forward import predict
from tune.budget.costs import Costs

MOST_LOADERS = 16  # loader processes per trial on a GPU
Say = Callable[[str], None]  # prints a line


@dataclass(frozen=True)
class Workers:
    """Number of parallel trials, and the resources of each."""

    count: int
    cpus: int  # of each
    gpus: float  # of each
    packed: int = 0  # most parallel trials if GPU shares differ by trial; 0: all take `gpus`

    @property
    def at_once(self) -> int:
        """Most parallel trials."""
        return self.packed or self.count

    def take(self) -> None:
        """Limit this process to its share of the cores and of GPU memory."""
        torch.set_num_threads(self.cpus)
        if 0 < self.gpus < 1:
            torch.cuda.set_per_process_memory_fraction(self.gpus)

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def processes(self) -> int:
        """Loader processes per trial: on a GPU all cores but one, on a CPU none."""
        return min(MOST_LOADERS, max(0, self.cpus - 1)) if self.gpus else 0


@dataclass(frozen=True)
class Job:
    """Inputs shared by all trials of a study. Sent to the workers once."""

    study: Study
    splits: Splits
    weights: Weights
    workers: Workers
    cache: Path  # folder shared by all studies on this machine
    costs: Costs | None = None  # training costs on this hardware, if measured
    spent: Mapping[str, float] = field(default_factory=dict)  # seconds of earlier commands, by stage
    until: float = math.inf  # steady_time() at which a trial completes early, with its best epoch

    def begin(self) -> None:
        """Take this process's share of the machine, and learn of the study's backbones."""
        self.workers.take()
        self.study.remember_backbones()

    def predict(
        self, model: Classifier, config: TrialConfig, images: Split, view: str = "plain"
    ) -> Predictions:
        """A trained model's probabilities for the images, under one view. Runs in this process."""
        return predict(
            model,
            self.splits,
            images,
            config=config,
            view=view,
            device=self.workers.device,
            processes=self.workers.processes,
        )

    def predict_again(self, run: TrialRecord, images: Split, views: Sequence[str]) -> list[Predictions]:
        """Predictions recomputed from a run's saved weights, one for each view. Uses a worker's share."""
        self.begin()
        weights = self.study.weights_file(run.trial_id)
        model = load_weights(run.config, weights, classes=len(self.splits.classes))
        return [self.predict(model, run.config, images, view) for view in views]


def results_of(tasks: Sequence[Any], doing: str) -> list[Any]:
    """The results of Ray tasks. ValueError, in one line, if one of them failed at `doing`."""
    try:
        found: list[Any] = ray.get(tasks)
    except RayError as error:
        raise ValueError(f"{doing} failed on a worker: {failure_text(error)}") from error
    return found


def failure_text(error: RayError) -> str:
    """Why a Ray task failed, in one line: its own exception, or how its worker was lost."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        return f"{type(error.cause).__name__}: {one_line(error.cause)}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def as_task(function: Callable[..., Any], workers: Workers) -> Any:
    """The function as a Ray task with a worker's share. The task frees its GPU memory when it ends."""
    calls = 1 if workers.gpus else 0  # 0: no limit, Ray reuses the process
    return ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus, max_calls=calls)(function)

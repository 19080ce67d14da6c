"""The share of a GPU that each trial requests from Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.tune import PlacementGroupFactory

from carmodels.training.run import Run
from tune.budget.costs import Costs


@dataclass(frozen=True)
class Packing:
    """Resource request of a trial: the GPU share that its memory needs, and cores in proportion."""

    costs: Costs
    gpu_bytes: float
    cpus: int  # per GPU

    def __call__(self, values: dict[str, Any]) -> PlacementGroupFactory:
        share = self.costs.gpu_share(Run.from_dict(values).config, self.gpu_bytes)
        return PlacementGroupFactory([{"CPU": max(1, int(share * self.cpus)), "GPU": share}])

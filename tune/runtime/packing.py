"""How much of a GPU each trial asks of Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.tune import PlacementGroupFactory

from carmodels.training.run import Run
from tune.budget.costs import Costs


@dataclass(frozen=True)
class Packing:
    """What a trial asks of Ray: the share of a GPU that its memory needs, and the cores that go with it."""

    costs: Costs
    gpu_bytes: float
    cpus: int  # for each whole GPU

    def __call__(self, values: dict[str, Any]) -> PlacementGroupFactory:
        share = self.costs.gpu_share(Run.from_dict(values).config, self.gpu_bytes)
        return PlacementGroupFactory([{"CPU": max(1, int(share * self.cpus)), "GPU": share}])

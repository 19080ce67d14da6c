"""Which backbones are worth training, by linear probes of their frozen features.

The best by probe comes first. A gap within the probe's noise is not resolved: of those backbones the one with
the best ImageNet accuracy comes first (both rankings together have the least regret; Renggli et al., 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SHORTLIST = 3  # most backbones on it
UNRESOLVED = 0.015  # gaps in accuracy below this say nothing, however many images
_DEVIATIONS = 2.0  # standard errors of a paired gap that count as noise


@dataclass(frozen=True, eq=False)
class ProbeScore:
    """How well a linear probe of a backbone at an image size does out of fold."""

    backbone: str
    image_size: int  # pixels
    right: np.ndarray  # (N,) bool; the first images are the same for all
    seconds: float  # per image, of loading and the forward pass on one worker

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def gap(better: ProbeScore, worse: ProbeScore) -> tuple[float, float]:
    """(difference in accuracy, its standard error), paired on the images that both have seen."""
    common = min(len(better.right), len(worse.right))
    differences = better.right[:common].astype(float) - worse.right[:common]
    return float(differences.mean()), float(differences.std() / math.sqrt(common))


def is_unresolved(better: ProbeScore, worse: ProbeScore) -> bool:
    """Whether the gap between the two is within the probe's noise."""
    difference, error = gap(better, worse)
    return difference <= max(UNRESOLVED, _DEVIATIONS * error)


def best_per_backbone(scores: Sequence[ProbeScore]) -> list[ProbeScore]:
    """Each backbone at its best size, best first; of those, the ones that have seen most images first."""
    most: dict[str, ProbeScore] = {}
    for score in sorted(scores, key=lambda s: (-len(s.right), -s.accuracy, s.image_size)):
        most.setdefault(score.backbone, score)
    return list(most.values())


def shortlist(
    scores: Sequence[ProbeScore], imagenet: Mapping[str, float], limit: int = SHORTLIST
) -> list[ProbeScore]:
    """The backbones worth training, in the order in which to try them.

    `imagenet` is the top-1 accuracy on ImageNet by backbone, as far as it is known.
    """
    ranked = best_per_backbone(scores)
    unresolved = [score for score in ranked if is_unresolved(ranked[0], score)]
    order = sorted(unresolved, key=lambda s: -imagenet.get(s.backbone, 0.0)) if imagenet else unresolved
    listed = [ranked[0], *(score for score in order if score is not ranked[0])][:limit]
    return sorted(listed, key=order.index)

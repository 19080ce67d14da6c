"""What training costs on this hardware, in seconds and memory, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from carmodels.catalog import UNFREEZE
from carmodels.models.parameter_groups import trainable_groups
from carmodels.records import TrialRecord
from carmodels.training.config import TrialConfig
from carmodels.training.features import VIEWS_KEPT

SLOWER = 1.15  # times the seconds of its first run that a further one is given
FORWARD_SHARE = 0.35  # of a training step that showing an image to a network takes
GPU_SHARES = (1 / 4, 1 / 3, 1 / 2, 1.0)  # few, since Ray keeps a worker only for an equal request
MEMORY_SPARE = 1.15  # of what was measured: the allocator's gaps, the moving average, other batch shapes
CONTEXT_BYTES = 2**30  # what CUDA itself takes in each process, which the allocator does not see


@dataclass(frozen=True)
class Compiled:
    """What torch.compile does for a backbone, measured at one size."""

    seconds: float  # until the first step is done
    ratio: float  # of a compiled step's time to that of one which is not


@dataclass(frozen=True)
class Costs:
    """What training on one image takes, everything open, by backbone and image size."""

    seconds: Mapping[str, Mapping[int, float]]  # per backbone, at the sizes that were measured
    train: int  # images
    val: int
    others: int = 0  # that a finished trial is shown once
    stored: bool = True  # whether what a frozen backbone says of a view is stored: it is, of pretrained ones
    memory: Mapping[str, Mapping[int, float]] = field(default_factory=dict)  # bytes on a GPU, likewise
    compiled: Mapping[str, Compiled] = field(default_factory=dict)  # per backbone, where it was tried

    def image(self, backbone: str, image_size: int) -> float:
        """Seconds for one image, linear in the area between measured sizes; infinite beyond memory."""
        return _between(self.seconds[backbone], image_size)

    def epoch(self, config: TrialConfig, number: int) -> float:
        """Seconds of one epoch (the first is 1): less while the backbone is frozen, or images are small.

        What a frozen one says of a view of the images may be stored, unless they are mixed.
        """
        area = (config.eval_size / config.image_size) ** 2  # of a val image, in those that it learns from
        val = FORWARD_SHARE * self.val * area
        shown = (config.train_image_size(number) / config.image_size) ** 2  # likewise of a training image
        if _opened(config, number):
            train = self.train * shown
        elif self.stored and not (config.mixup or config.cutmix):
            train = FORWARD_SHARE * self.train * (number <= VIEWS_KEPT)
            val *= number == 1
        else:
            train = FORWARD_SHARE * self.train * shown
        images = train + val
        return self.image(config.backbone, config.image_size) * images if images else 0.0

    def tested(self, config: TrialConfig) -> float:
        """Seconds for an image that a finished trial is shown."""
        area = (config.eval_size / config.image_size) ** 2
        return FORWARD_SHARE * area * self.image(config.backbone, config.image_size)

    def answers(self, config: TrialConfig) -> float:
        """Seconds of what a finished trial is shown."""
        return (self.val + self.others) * self.tested(config)

    def schedule(self, config: TrialConfig) -> float:
        """Seconds of the whole schedule, and of what a finished trial is shown."""
        epochs = sum(self.epoch(config, number) for number in range(1, config.epochs + 1))
        return epochs + self.answers(config)

    def gpu_share(self, config: TrialConfig, gpu_bytes: float) -> float:
        """The smallest of `GPU_SHARES` of a GPU with `gpu_bytes` whose memory holds the configuration."""
        measured = self.memory.get(config.backbone)
        if not measured:
            return 1.0
        needed = MEMORY_SPARE * _between(measured, config.image_size) + CONTEXT_BYTES
        return next((share for share in GPU_SHARES if needed <= share * gpu_bytes), 1.0)

    def pays_to_compile(self, config: TrialConfig) -> bool:
        """Whether torch.compile saves more over the whole schedule than it takes.

        It starts anew whenever other layer groups learn or images grow, so gradual unfreezing seldom repays
        it.
        """
        found = self.compiled.get(config.backbone)
        if found is None:
            return False
        numbers = range(1, config.epochs + 1)
        stages = {(_opened(config, n), config.train_image_size(n)) for n in numbers if _opened(config, n)}
        learning = sum(self.epoch(config, n) for n in numbers if _opened(config, n))
        return learning * (1 - found.ratio) > found.seconds * len(stages)


def expected_seconds(record: TrialRecord, costs: Costs | None = None) -> float:
    """What the whole schedule of a recorded trial takes, by the pace of the epochs it ran, with a margin.

    By `costs` where that says little, since it had a share of a GPU that it now has to itself.
    """
    if costs is not None:
        return SLOWER * costs.schedule(record.config)
    return SLOWER * record.seconds / max(1, record.epochs_run) * record.config.epochs


def times_as_long(new: TrialConfig, old: TrialConfig, train: float = 1.0) -> float:
    """How many times as long the schedule of one takes as that of the other, of the same backbone and size.

    `train`: how many times as many images it learns from. Without those of val, of which there are few.
    """
    one = Costs({old.backbone: {old.image_size: 1.0}}, train=1, val=0)
    return train * one.schedule(new) / one.schedule(old)


_MANY = 16  # about as many layer groups as a backbone has, and more than a schedule has stages


def _opened(config: TrialConfig, number: int) -> int:
    """About how many layer groups learn in an epoch; 0 is exact."""
    return trainable_groups(UNFREEZE[config.unfreeze], epoch=number, epochs=config.epochs, groups=_MANY)


def _between(measured: Mapping[int, float], image_size: int) -> float:
    """Linear in the area between the sizes that were measured; infinite beyond the largest finite one."""
    sizes = sorted(size for size, value in measured.items() if math.isfinite(value))
    if not sizes or image_size > max(sizes):
        return math.inf
    areas, values = [size * size for size in sizes], [measured[size] for size in sizes]
    return float(np.interp(image_size * image_size, areas, values))

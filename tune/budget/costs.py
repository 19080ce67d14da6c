"""What training costs on this hardware, in seconds and GPU memory, from a few measurements."""

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

RERUN_MARGIN = 1.15  # how much longer than its first run a rerun may take
FORWARD_COST = 0.35  # of a forward pass, relative to a training step
GPU_SHARES = (1 / 4, 1 / 3, 1 / 2, 1.0)  # few, because Ray reuses a worker only for an equal request
MEMORY_MARGIN = 1.15  # over the measured bytes: allocator gaps, the moving average, other batch shapes
CONTEXT_BYTES = 2**30  # of CUDA itself in each process, invisible to torch's allocator
_GROUPS = 16  # about as many layer groups as a backbone has, and more than a schedule has stages


@dataclass(frozen=True)
class Compiled:
    """The effect of torch.compile on a backbone, measured at one size."""

    seconds: float  # to compile, up to the end of the first step
    ratio: float  # of a compiled step's time to an eager one's


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of training, by backbone and image size, with all layers trainable."""

    seconds: Mapping[str, Mapping[int, float]]  # per training image; backbone -> measured size -> seconds
    train: int  # images
    val: int
    holdout_and_test: int = 0  # images that a trial predicts once, at its end
    caches_features: bool = True  # whether a frozen backbone's features are stored; only pretrained ones are
    memory: Mapping[str, Mapping[int, float]] = field(default_factory=dict)  # bytes on a GPU, as `seconds`
    compiled: Mapping[str, Compiled] = field(default_factory=dict)  # by backbone, where it was measured

    def image(self, backbone: str, image_size: int) -> float:
        """Seconds of a training step for one image; infinite for a size that memory does not hold."""
        return _interpolate(self.seconds[backbone], image_size)

    def epoch(self, config: TrialConfig, number: int) -> float:
        """Seconds of epoch `number`, counted from 1.

        Epochs with a frozen backbone reuse stored features, unless MixUp or CutMix mixes the images.
        """
        area = (config.train_image_size(number) / config.image_size) ** 2
        val = FORWARD_COST * self.val * _eval_area(config)
        if _open_groups(config, number):
            train = self.train * area
        elif self.caches_features and not (config.mixup or config.cutmix):
            train = FORWARD_COST * self.train * (number <= VIEWS_KEPT)
            val *= number == 1
        else:
            train = FORWARD_COST * self.train * area
        images = train + val  # in training steps of one image
        return self.image(config.backbone, config.image_size) * images if images else 0.0

    def inference(self, config: TrialConfig) -> float:
        """Seconds to predict one image with a trained model."""
        return FORWARD_COST * _eval_area(config) * self.image(config.backbone, config.image_size)

    def final_predictions(self, config: TrialConfig) -> float:
        """Seconds to predict val, holdout and test at the end of a trial."""
        return (self.val + self.holdout_and_test) * self.inference(config)

    def schedule(self, config: TrialConfig) -> float:
        """Seconds of a whole trial: all epochs and the final predictions."""
        epochs = sum(self.epoch(config, number) for number in range(1, config.epochs + 1))
        return epochs + self.final_predictions(config)

    def gpu_share(self, config: TrialConfig, gpu_bytes: float) -> float:
        """The smallest of `GPU_SHARES` of a GPU with `gpu_bytes` that holds the configuration."""
        measured = self.memory.get(config.backbone)
        if not measured:
            return 1.0
        needed = MEMORY_MARGIN * _interpolate(measured, config.image_size) + CONTEXT_BYTES
        return next((share for share in GPU_SHARES if needed <= share * gpu_bytes), 1.0)

    def pays_to_compile(self, config: TrialConfig) -> bool:
        """Whether torch.compile saves more time over the schedule than compiling takes.

        It compiles again for each new set of trainable layers and each new image size, so with gradual
        unfreezing it rarely pays.
        """
        compiled = self.compiled.get(config.backbone)
        if compiled is None:
            return False
        unfrozen = [n for n in range(1, config.epochs + 1) if _open_groups(config, n)]
        stages = {(_open_groups(config, n), config.train_image_size(n)) for n in unfrozen}
        training = sum(self.epoch(config, n) for n in unfrozen)
        return training * (1 - compiled.ratio) > compiled.seconds * len(stages)


def rerun_seconds(record: TrialRecord, costs: Costs | None = None) -> float:
    """Seconds to run a recorded trial's whole schedule again, with a margin.

    By the pace of the epochs it ran; by `costs` where the pace misleads, because the trial shared a GPU.
    """
    if costs is not None:
        return RERUN_MARGIN * costs.schedule(record.config)
    return RERUN_MARGIN * record.seconds / max(1, record.epochs_run) * record.config.epochs


def cost_ratio(new: TrialConfig, old: TrialConfig, train: float = 1.0) -> float:
    """How many times as long `new` trains as `old`, with the same backbone and image size.

    `train` is the ratio of their numbers of training images. Leaves out val, which is small.
    """
    unit = Costs({old.backbone: {old.image_size: 1.0}}, train=1, val=0)
    return train * unit.schedule(new) / unit.schedule(old)


def _eval_area(config: TrialConfig) -> float:
    """The area of an image at evaluation, relative to training."""
    return (config.eval_size / config.image_size) ** 2


def _open_groups(config: TrialConfig, number: int) -> int:
    """About how many layer groups are trainable in an epoch; 0 is exact."""
    return trainable_groups(UNFREEZE[config.unfreeze], epoch=number, epochs=config.epochs, groups=_GROUPS)


def _interpolate(measured: Mapping[int, float], image_size: int) -> float:
    """Linear in the image's area between measured sizes; infinite above the largest finite one."""
    sizes = sorted(size for size, value in measured.items() if math.isfinite(value))
    if not sizes or image_size > max(sizes):
        return math.inf
    areas, values = [size * size for size in sizes], [measured[size] for size in sizes]
    return float(np.interp(image_size * image_size, areas, values))

"""The presets: search spaces for demo, CPU and GPU. And the baseline.

Edit a preset here. `--set NAME=...` changes it for one search only.
"""

from __future__ import annotations

from carmodels.models.facts import facts_of
from carmodels.space import FINE_TUNING, HEAD_DEPTHS, Choice, Range, Space
from carmodels.training.config import TrialConfig


def baseline(space: Space) -> TrialConfig:
    """The baseline, as close to it as the space allows.

    The baseline is Xception at 224 px: one hidden layer with BatchNorm and dropout, Adam at 1e-3, the head
    alone first and then the whole network, the rate reduced on a plateau, flips and small shifts. Without
    Xception the space's largest backbone takes its place; without 224 px the nearest size.
    """
    backbones = space.backbones
    xception = [b for b in ("legacy_xception", "xception41") if b in backbones]
    backbone = xception[0] if xception else max(backbones, key=lambda b: facts_of(b).millions)
    return space.config(
        {
            **space.fixed,
            "backbone": backbone,
            "image_size": min(space.image_sizes, key=lambda size: (abs(size - 224), size)),
            "head": "relu256",
            "head_depth": 1,
            "dropout": 0.25,
            "optimizer": "adam",
            "lr": 1e-3,
            "weight_decay": 0.0,
            "lr_ratio": 1.0,
            "unfreeze": "head_first",
            "schedule": "plateau",
            "augment": "shift",
            "label_smoothing": 0.0,
            "mixup": 0.0,
            "cutmix": 0.0,
            "ema": 0.0,
            "clip_norm": 0.0,
            "patience": 0,
            "start_image_size": 0,
            "eval_image_size": 0,
        }
    )


SPACES: dict[str, Space] = {
    "demo": Space(
        dimensions={
            "backbone": Choice(("test_efficientnet", "test_resnet")),
            "image_size": Choice((32, 48, 64, 96)),
            "unfreeze": Choice(("frozen", "full", "head_first", "gradual")),
            "lr": Range(2e-4, 2e-2, log=True),
            "head_depth": Choice((0, 1, 2)),
            "dropout": Range(0.0, 0.5, when=("head_depth", HEAD_DEPTHS)),
            "lr_ratio": Range(0.05, 1.0, log=True, when=("unfreeze", FINE_TUNING)),
            "augment": Choice(("shift", "crop", "color")),
        },
        fixed={"epochs": 8, "batch_size": 32},
        trials=24,
    ),
    "cpu": Space(
        dimensions={
            "backbone": Choice(
                (
                    "mobilenetv2_035",
                    "mobilenetv2_100",
                    "mobilenetv1_100",
                    "mobilenetv3_small_100",
                    "mobilenetv3_large_100",
                    "lcnet_050",
                    "lcnet_100",
                    "efficientnet_b0",
                    "tf_efficientnet_lite0",
                    "tf_efficientnet_lite1",
                    "tf_efficientnet_lite2",
                )
            ),
            "image_size": Choice((64, 96, 128, 160, 192)),
            "unfreeze": Choice(("frozen", "full", "head_first", "gradual")),
            "lr": Range(3e-4, 2e-2, log=True),
            "head_depth": Choice((0, 1, 2)),
            "dropout": Range(0.0, 0.5, when=("head_depth", HEAD_DEPTHS)),
            "lr_ratio": Range(1e-3, 1.0, log=True, when=("unfreeze", FINE_TUNING)),
            "augment": Choice(("shift", "crop", "color")),
            "label_smoothing": Choice((0.0, 0.1)),
        },
        fixed={"epochs": 8, "batch_size": 32},
    ),
    "gpu": Space(
        dimensions={
            "backbone": Choice(
                (
                    "xception41",
                    "efficientnet_b0",
                    "efficientnet_b2",
                    "efficientnet_b3",
                    "efficientnet_b4",
                    "tf_efficientnetv2_s",
                    "convnext_nano",
                    "convnext_tiny",
                    "convnext_small",
                    "swin_tiny_patch4_window7_224",
                    "swin_base_patch4_window7_224",
                    "vit_small_patch16_224",
                    "resnet50",
                )
            ),
            "image_size": Choice((224, 288, 352, 416)),
            "unfreeze": Choice(("frozen", "full", "head_first", "gradual")),
            "lr": Range(3e-5, 3e-3, log=True),
            "head_depth": Choice((0, 1, 2)),
            "dropout": Range(0.0, 0.5, when=("head_depth", HEAD_DEPTHS)),
            "lr_ratio": Range(3e-3, 1.0, log=True, when=("unfreeze", FINE_TUNING)),
            "augment": Choice(("crop", "color", "strong")),
            "label_smoothing": Choice((0.0, 0.1)),
            "mixup": Choice((0.0, 0.2)),
            "ema": Choice((0.0, 0.998), when=("unfreeze", FINE_TUNING)),
        },
        fixed={"epochs": 12, "batch_size": 32},
    ),
}

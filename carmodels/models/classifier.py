"""timm backbones with heads of our own: their weights, layer groups, what is frozen, optimizer groups."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from timm.models import group_parameters
from torch import nn

from carmodels.catalog import HEADS, Head
from carmodels.files import write_atomic
from carmodels.models.backbones import TimmNetwork, create_backbone
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig

_CACHED = 2**17  # floats that stay in a core's second-level cache


def create_head(row: Head, *, depth: int, dropout: float, features: int, classes: int) -> nn.Sequential:
    """`depth` blocks of linear, BatchNorm, activation and dropout, then a linear layer: (B, F) -> (B, C)."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        activation = getattr(nn, row.activation)()
        layers += [nn.Linear(features, row.width), nn.BatchNorm1d(row.width), activation, nn.Dropout(dropout)]
        features = row.width
    return nn.Sequential(*layers, nn.Linear(features, classes))


class Classifier(nn.Module):
    """A backbone and a head. Takes 8-bit images, normalises them on the device, returns logits."""

    backbone: nn.Module
    head: nn.Module
    scale: torch.Tensor  # (3,), 8-bit values times this ...
    shift: torch.Tensor  # (3,), ... plus this are what the backbone was trained with

    def __init__(self, backbone: TimmNetwork, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        mean, std = (255 * torch.tensor(backbone.pretrained_cfg[name]) for name in ("mean", "std"))
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        groups = group_parameters(backbone, backbone.group_matcher(coarse=True))
        self.groups: tuple[tuple[str, ...], ...] = tuple(tuple(groups[k]) for k in sorted(groups))

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8 -> float32 with the statistics the backbone was trained with, channels last.

        Done on whole rows of pixels, on a CPU so many at a time as its cache holds: (images - mean) / std
        takes ten times as long there.
        """
        if torch.compiler.is_exporting():  # the loop below would fix the size of a batch
            return images.float() * self.scale[:, None, None] + self.shift[:, None, None]
        batch, channels, height, width = images.shape
        rows = images.permute(0, 2, 3, 1).reshape(batch * height, width * channels)
        scale, shift = self.scale.repeat(width), self.shift.repeat(width)
        found = torch.empty(rows.shape, device=rows.device)
        at_once = max(1, _CACHED // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
        for given, part in zip(rows.split(at_once), found.split(at_once), strict=True):
            torch.addcmul(shift, given.float(), scale, out=part)
        return found.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8, or floats already normalised -> (B, C) logits."""
        if images.dtype == torch.uint8:
            images = self.normalise(images)
        return self.head(self.backbone(images))

    def freeze_to(self, count: int) -> None:
        """Let the backbone's top `count` layer groups learn, freeze those below; the head always learns."""
        parameters = dict(self.backbone.named_parameters())
        for index, names in enumerate(self.groups):
            for name in names:
                parameters[name].requires_grad_(index >= len(self.groups) - count)

    def train(self, mode: bool = True) -> Classifier:
        """Like torch's, but what is frozen stays in eval mode: BatchNorm statistics, dropout, drop path."""
        super().train(mode)
        if mode:
            for module in self.backbone.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self


def build(config: TrialConfig, *, classes: int, weights: Weights) -> Classifier:
    """The configuration's classifier; the head is drawn from torch's global random state."""
    backbone = create_backbone(config.backbone, image_size=config.image_size, weights=weights)
    features = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    head = create_head(
        HEADS[config.head],
        depth=config.head_depth,
        dropout=config.dropout,
        features=features,
        classes=classes,
    )
    return Classifier(backbone, head)


def save_weights(model: Classifier, path: Path) -> None:
    """Write a trained model's parameters and buffers as safetensors, whole or not at all."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomic(path, save(state))


def weights_damage(path: Path) -> str:
    """What is wrong with what `save_weights` wrote, by its header and length; empty where nothing is."""
    try:
        with safe_open(path, "pt"):
            return ""
    except (SafetensorError, OSError) as error:
        return str(error)[:200]


def load_weights(config: TrialConfig, path: Path, *, classes: int) -> Classifier:
    """The configuration's classifier with what `save_weights` wrote; ValueError names a damaged file."""
    model = build(config, classes=classes, weights=Weights("none"))
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or of another configuration ({str(error)[:200]})") from error
    return model.to(memory_format=torch.channels_last)

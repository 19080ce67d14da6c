"""The classifier: a timm backbone and a head. Normalisation, freezing, saving and loading."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from carmodels.catalog import HEADS, Head
from carmodels.files import write_atomic
from carmodels.models.backbones import TimmNetwork, create_backbone, layer_groups
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig

_CACHE_FLOATS = 2**17  # that fit a core's second-level cache


def create_head(row: Head, *, depth: int, dropout: float, features: int, classes: int) -> nn.Sequential:
    """`depth` blocks of the row, then a linear layer: (B, F) -> (B, C)."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        activation = getattr(nn, row.activation)()
        layers += [nn.Linear(features, row.width), nn.BatchNorm1d(row.width), activation, nn.Dropout(dropout)]
        features = row.width
    return nn.Sequential(*layers, nn.Linear(features, classes))


class Classifier(nn.Module):
    """A backbone and a head. Normalises 8-bit images on the device and returns logits."""

    backbone: nn.Module
    head: nn.Module
    scale: torch.Tensor  # (3,), 1 / std of the backbone's training data, for 8-bit pixels
    shift: torch.Tensor  # (3,), -mean / std

    def __init__(self, backbone: TimmNetwork, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        mean, std = (255 * torch.tensor(backbone.pretrained_cfg[name]) for name in ("mean", "std"))
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.groups = layer_groups(backbone)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8 -> float32, channels last, with the backbone's mean and std.

        Works on rows of pixels, on a CPU in chunks that fit its cache: ten times as fast as
        (images - mean) / std.
        """
        if torch.compiler.is_exporting():  # the loop below would fix the batch size
            return images.float() * self.scale[:, None, None] + self.shift[:, None, None]
        batch, channels, height, width = images.shape
        rows = images.permute(0, 2, 3, 1).reshape(batch * height, width * channels)
        scale, shift = self.scale.repeat(width), self.shift.repeat(width)
        normalised = torch.empty(rows.shape, device=rows.device)
        chunk = max(1, _CACHE_FLOATS // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
        for pixels, out in zip(rows.split(chunk), normalised.split(chunk), strict=True):
            torch.addcmul(shift, pixels.float(), scale, out=out)
        return normalised.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S), uint8 or normalised floats -> (B, C) logits."""
        if images.dtype == torch.uint8:
            images = self.normalise(images)
        return self.head(self.backbone(images))

    def unfreeze_top(self, count: int) -> None:
        """Unfreeze the backbone's top `count` layer groups and freeze the rest. The head always trains."""
        parameters = dict(self.backbone.named_parameters())
        for index, names in enumerate(self.groups):
            for name in names:
                parameters[name].requires_grad_(index >= len(self.groups) - count)

    def train(self, mode: bool = True) -> Classifier:
        """Like nn.Module's, but frozen modules stay in eval mode (BatchNorm, dropout, drop path)."""
        super().train(mode)
        if mode:
            for module in self.backbone.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self


def create_classifier(config: TrialConfig, *, classes: int, weights: Weights) -> Classifier:
    """The configuration's classifier. The head is initialised from torch's global random state."""
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
    """Write the model's state to a safetensors file, atomically."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomic(path, save(state))


def weights_damage(path: Path) -> str:
    """What is wrong with a safetensors file, by its header and length; "" if nothing is."""
    try:
        with safe_open(path, "pt"):
            return ""
    except (SafetensorError, OSError) as error:
        return str(error)[:200]


def load_weights(config: TrialConfig, path: Path, *, classes: int) -> Classifier:
    """The configuration's classifier with saved weights. Raises ValueError naming a damaged file."""
    model = create_classifier(config, classes=classes, weights=Weights("none"))
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or of another configuration ({str(error)[:200]})") from error
    return model.to(memory_format=torch.channels_last)

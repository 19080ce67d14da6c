"""timm backbones with heads of our own: their weights, layer groups, what is frozen, optimizer groups."""

from __future__ import annotations

import hashlib
import math
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import HTTPError  # of the hub's transport, its timeouts too
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from timm.models import group_parameters
from torch import nn

from carmodels.catalog import BACKBONES, HEADS, UNFREEZE, Head, Unfreeze
from carmodels.files import user_path, write_whole
from carmodels.space import TrialConfig

_CACHED = 2**17  # floats that stay in a core's second-level cache
TimmNetwork = Any  # an nn.Module; torch's annotations hide the attributes that timm gives it


@dataclass(frozen=True)
class Weights:
    """Where a backbone's weights come from: `hub` (timm's download), `none` (random) or a folder of files."""

    source: str  # "hub", "none", or the absolute path of a folder holding <timm name>.safetensors

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Raises ValueError when text is neither hub nor none nor a folder with weights in it."""
        if text in ("hub", "none"):
            return cls(text)
        folder = user_path(text).resolve()
        if not folder.is_dir():
            raise ValueError(
                f"--weights {text} is no folder; give a folder of <timm name>.safetensors, hub or none"
            )
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"--weights {text} holds no .safetensors file; name the files <timm name>.safetensors"
            )
        return cls(str(folder))

    @property
    def is_folder(self) -> bool:
        return self.source not in ("hub", "none")

    def file(self, backbone: str) -> Path | None:
        """The backbone's file in the folder; None for hub and none."""
        return Path(self.source) / f"{backbone}.safetensors" if self.is_folder else None

    def identity(self, backbone: str) -> str:
        """What tells these weights of a backbone from others: the file's content, or timm's name for them."""
        path = self.file(backbone)
        if path is not None:
            return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        published = timm.models.get_pretrained_cfg(backbone)
        return f"{self.source}:{published.hf_hub_id or published.url}" if published else self.source

    def has(self, backbone: str) -> bool:
        """Whether this source can give the backbone its weights, as far as can be told without a network."""
        if self.source == "none":
            return True
        if self.source == "hub":
            published = timm.models.get_pretrained_cfg(backbone)
            return bool(published and published.has_weights)
        path = self.file(backbone)
        return path is not None and path.is_file()

    def fetch(self, backbones: Iterable[str]) -> None:
        """Bring every backbone's weights to this machine, once, before the first trial needs them.

        Raises ValueError, naming the backbone and the way out, for a hub out of reach or a damaged file.
        """
        if self.source == "hub" and not _hub_answers():
            huggingface_hub.constants.HF_HUB_OFFLINE = True  # what is on this disk will do, without retries
        for name in backbones:
            try:
                network = _seeded_backbone(name, self)
                if self.is_folder:
                    _check_loaded(network, _seeded_backbone(name, Weights("none")))
            except (OSError, RuntimeError, ValueError, SafetensorError, HTTPError) as error:
                where = "from the hub" if self.source == "hub" else f"from {self.file(name)}"
                first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                raise ValueError(
                    f"the weights of {name} could not be loaded {where} ({first}); "
                    "give --weights DIR with <timm name>.safetensors files, or --weights none"
                ) from error


def _hub_answers() -> bool:
    """Whether anything answers at the hub's address within ten seconds."""
    try:
        urllib.request.urlopen(
            urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD"), timeout=10
        )
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def create_backbone(name: str, *, image_size: int, weights: Weights) -> TimmNetwork:
    """A timm network that maps (B, 3, S, S) floats to (B, F) pooled features."""
    arguments: dict[str, Any] = {"img_size": image_size} if BACKBONES[name].sized else {}
    if path := weights.file(name):
        arguments["pretrained_cfg_overlay"] = {"file": str(path)}
    return timm.create_model(name, pretrained=weights.source != "none", num_classes=0, **arguments)


def _seeded_backbone(name: str, weights: Weights) -> TimmNetwork:
    """As `create_backbone`; what is not loaded is the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_backbone(name, image_size=224, weights=weights)


def _check_loaded(loaded: nn.Module, random: nn.Module) -> None:
    """Raises ValueError where weights are as they were made: timm takes of a file what fits by name."""
    made = dict(random.named_parameters())
    for key, value in loaded.named_parameters():
        if value.ndim > 1 and value.std() > 0 and torch.equal(value, made[key]):
            raise ValueError(f"it holds nothing for {key}, as timm calls it")


def create_head(row: Head, *, depth: int, dropout: float, features: int, classes: int) -> nn.Sequential:
    """`depth` blocks of linear, BatchNorm, activation and dropout, then a linear layer: (B, F) -> (B, C)."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        activation = getattr(nn, row.activation)()
        layers += [nn.Linear(features, row.width), nn.BatchNorm1d(row.width), activation, nn.Dropout(dropout)]
        features = row.width
    return nn.Sequential(*layers, nn.Linear(features, classes))


class Classifier(nn.Module):
    """A backbone and a head. Takes 8-bit pictures, normalises them on the device, returns logits."""

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

    def set_open(self, count: int) -> None:
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


def open_groups(row: Unfreeze, *, epoch: int, epochs: int, groups: int) -> int:
    """How many of the backbone's `groups` learn, from the top, in this epoch (the first is 1) of `epochs`."""
    if row.head_only_epochs is None or epoch <= row.head_only_epochs:
        return 0
    steps = max(1, round(row.all_open_at * epochs) - row.head_only_epochs)
    return math.ceil(groups * min(1.0, (epoch - row.head_only_epochs) / steps))


def optimizer_groups(model: Classifier, config: TrialConfig) -> list[dict[str, object]]:
    """Parameters with their rate and decay: the head at lr, the g-th group below it at lr * layer_decay ** g.

    Biases and normalisation weights (one-dimensional) are not decayed. Layer-wise decay: Howard and Ruder,
    2018; Clark et al., 2020 (ELECTRA).
    """
    named = dict(model.backbone.named_parameters())
    levels = [(config.lr, list(model.head.parameters()))]
    if UNFREEZE[config.unfreeze].head_only_epochs is not None:
        for below, names in enumerate(reversed(model.groups), start=1):
            levels.append((config.lr * config.layer_decay**below, [named[n] for n in names]))
    return [
        {"params": chosen, "lr": lr, "weight_decay": decay}
        for lr, parameters in levels
        for decay, chosen in (
            (config.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        )
        if chosen
    ]


def save_weights(model: Classifier, path: Path) -> None:
    """Write a trained model's parameters and buffers as safetensors, whole or not at all."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_whole(path, save(state))


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

"""timm networks that turn images into pooled features."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import HTTPError  # of the hub's transport, its timeouts too
from safetensors import SafetensorError
from torch import nn

from carmodels.catalog import BACKBONES
from carmodels.models.weights import Weights

TimmNetwork = Any  # an nn.Module; torch's annotations hide the attributes that timm gives it


def create_backbone(name: str, *, image_size: int, weights: Weights) -> TimmNetwork:
    """A timm network that maps (B, 3, S, S) floats to (B, F) pooled features."""
    arguments: dict[str, Any] = {"img_size": image_size} if BACKBONES[name].fixed_size else {}
    if path := weights.file(name):
        arguments["pretrained_cfg_overlay"] = {"file": str(path)}
    return timm.create_model(name, pretrained=weights.source != "none", num_classes=0, **arguments)


def fetch_weights(weights: Weights, backbones: Iterable[str]) -> None:
    """Bring every backbone's weights to this machine, once, before the first trial needs them.

    Raises ValueError, naming the backbone and the way out, for a hub out of reach or a damaged file.
    """
    if weights.source == "hub" and not _hub_answers():
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # what is on this disk will do, without retries
    for name in backbones:
        try:
            network = _seeded_backbone(name, weights)
            if weights.is_folder:
                _check_loaded(network, _seeded_backbone(name, Weights("none")))
        except (OSError, RuntimeError, ValueError, SafetensorError, HTTPError) as error:
            where = "from the hub" if weights.source == "hub" else f"from {weights.file(name)}"
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

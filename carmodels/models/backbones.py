"""timm backbones and their pretrained weights."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import HTTPError  # timeouts included
from safetensors import SafetensorError
from torch import nn

from carmodels.catalog import BACKBONES
from carmodels.models.weights import Weights

TimmNetwork = Any  # an nn.Module with attributes that torch's annotations do not know


def create_backbone(name: str, *, image_size: int, weights: Weights) -> TimmNetwork:
    """A timm network that maps (B, 3, S, S) floats to (B, F) pooled features.

    Raises OSError if a download fails.
    """
    arguments: dict[str, Any] = {"img_size": image_size} if BACKBONES[name].fixed_size else {}
    if path := weights.file(name):
        arguments["pretrained_cfg_overlay"] = {"file": str(path)}
    try:
        return timm.create_model(name, pretrained=weights.source != "none", num_classes=0, **arguments)
    except HTTPError as error:  # not always an OSError, and one that Ray cannot bring to the driver
        raise ConnectionError(str(error) or type(error).__name__) from error


def fetch_weights(weights: Weights, backbones: Iterable[str]) -> None:
    """Download or check the weights of all backbones, before the first trial needs them.

    Raises ValueError naming the backbone if the hub is unreachable or a file is damaged.
    """
    if weights.source == "hub" and not _hub_is_reachable():
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # use cached files and do not retry
    for name in backbones:
        try:
            network = _seeded_backbone(name, weights)
            if weights.is_folder:
                _check_loaded(network, _seeded_backbone(name, Weights("none")))
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            where = "from the hub" if weights.source == "hub" else f"from {weights.file(name)}"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ValueError(
                f"the weights of {name} could not be loaded {where} ({reason}); "
                "give --weights DIR with <timm name>.safetensors files, or --weights none"
            ) from error


def _hub_is_reachable() -> bool:
    """Whether the hub answers within ten seconds, be it with an error."""
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
    """Like `create_backbone`, with the same initial weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_backbone(name, image_size=224, weights=weights)


def _check_loaded(loaded: nn.Module, initial: nn.Module) -> None:
    """Raises ValueError for a weight that still has its initial value: timm skips names a file lacks."""
    before = dict(initial.named_parameters())
    for key, value in loaded.named_parameters():
        if value.ndim > 1 and value.std() > 0 and torch.equal(value, before[key]):
            raise ValueError(f"it holds nothing for {key}, as timm calls it")

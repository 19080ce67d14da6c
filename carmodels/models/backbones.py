"""timm backbones and their pretrained weights."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from safetensors import SafetensorError
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import nn

from carmodels.formatting import first_line
from carmodels.models.facts import facts_of
from carmodels.models.weights import Provenance, Weights

TimmNetwork = Any  # an nn.Module with attributes that torch's annotations do not know


def create_backbone(name: str, *, image_size: int, weights: Weights) -> TimmNetwork:
    """A timm network that maps (B, 3, S, S) floats to (B, F) pooled features.

    Raises OSError if a download fails.
    """
    row = facts_of(name)
    arguments: dict[str, Any] = {"img_size": image_size} if row.fixed_size or row.dynamic else {}
    if row.dynamic:
        arguments["dynamic_img_size"] = True
    return build(name, row.saved, file=weights.file(name), **arguments)


def build(
    name: str,
    saved: Mapping[str, Any] | None,
    *,
    file: Path | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
    **arguments: Any,
) -> TimmNetwork:
    """A timm network without a classifier; weights from `file` or `state`, by default random.

    `saved` is the architecture and arguments of a network that is not called by a name of timm's.
    """
    given = {"file": str(file)} if file else {"state_dict": state} if state else {}
    if saved is None:
        return timm.create_model(
            name, pretrained=bool(given), pretrained_cfg_overlay=given, num_classes=0, **arguments
        )
    return timm.create_model(
        saved["architecture"],
        pretrained=bool(given),
        pretrained_cfg={**saved["pretrained_cfg"], **given},
        pretrained_model_args=saved["model_args"] or None,
        **{**saved["model_args"], "num_classes": 0, **arguments},
    )


def layer_groups(backbone: TimmNetwork) -> tuple[tuple[str, ...], ...]:
    """Names of all parameters in groups of layers, from the stem up: timm's, or automatic ones."""
    try:
        groups = group_parameters(backbone, backbone.group_matcher(coarse=True))
    except (AttributeError, AssertionError, NotImplementedError):  # it has none, or no coarse ones
        groups = {}
        for name, number in auto_group_layers(backbone).items():
            groups.setdefault(number, []).append(name)
    return tuple(tuple(groups[k]) for k in sorted(groups) if groups[k])


def fetch_weights(weights: Weights, backbones: Iterable[str]) -> dict[str, Provenance]:
    """Download or check the weights of all backbones, before the first trial needs them.

    Returns where they come from. Raises ValueError naming the backbone if the hub is unreachable or a file is
    damaged.
    """
    if weights.source == "hub" and not _hub_is_reachable():
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # use cached files and do not retry
    found = {}
    for name in backbones:
        try:
            network = _seeded_backbone(name, weights)
            if weights.is_folder or facts_of(name).saved:
                _check_loaded(network, _seeded_backbone(name, Weights("none")))
            found[name] = weights.provenance(name)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            where = f"from {weights.place(name)}"
            raise ValueError(
                f"the weights of {name} could not be loaded {where} ({first_line(error)}); "
                "give --weights DIR with <timm name>.safetensors files, or --weights none"
            ) from error
    return found


def known_backbones(weights: Weights, backbones: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Facts about each backbone and its weights, which are fetched, in JSON's types. Raises ValueError."""
    return {
        name: {**asdict(facts_of(name)), **asdict(found), "non_commercial": found.non_commercial}
        for name, found in fetch_weights(weights, backbones).items()
    }


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
        return create_backbone(name, image_size=facts_of(name).fit(224), weights=weights)


def _check_loaded(loaded: nn.Module, initial: nn.Module) -> None:
    """Raises ValueError for a weight that still has its initial value: timm skips names a file lacks."""
    before = dict(initial.named_parameters())
    for key, value in loaded.named_parameters():
        if value.ndim > 1 and value.std() > 0 and torch.equal(value, before[key]):
            raise ValueError(f"it holds nothing for {key}, as timm calls it")

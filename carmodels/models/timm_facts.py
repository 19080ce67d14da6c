"""Asks timm about a backbone: it is built on the meta device, and tried at several image sizes there."""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from typing import Any

import timm
import torch
from huggingface_hub.errors import HTTPError  # timeouts included
from timm.models import get_pretrained_cfg, is_model, load_model_config_from_hf, split_model_name_tag
from timm.models._hub import load_model_config_from_path

from carmodels.catalog import Backbone
from carmodels.formatting import first_line
from carmodels.models.backbones import TimmNetwork, build
from carmodels.models.facts import HUB, LOCAL

_MULTIPLES = (1, 2, 4, 7, 8, 14, 16, 28, 32, 48, 56, 64, 128)  # pixels
_SMALLEST = (16, 32, 48, 64, 96, 128, 160, 192)  # pixels
_LISTED = 5  # names in an error
_ELSEWHERE = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "label_names", "label_descriptions")
_REFUSALS = (RuntimeError, AssertionError, ValueError, TypeError, LookupError, ArithmeticError)  # of timm


def ask_timm(name: str) -> Backbone:
    """A backbone's parameters and image sizes. Raises ValueError for a name that timm does not know."""
    saved = _saved(name)
    if saved is None:
        _check_name(name)
    try:
        return _Probe(name, saved).facts()
    except _REFUSALS as error:
        raise ValueError(f"backbone={name!r}: timm cannot build it ({first_line(error)})") from error


class _Probe:
    """A network on the meta device, where building and running it takes no memory and little time."""

    def __init__(self, name: str, saved: dict[str, Any] | None) -> None:
        self._name, self._saved = name, saved
        self._plain = self._built()
        self._native = int(self._plain.pretrained_cfg["input_size"][-1])  # side, pixels
        self._dynamic = "dynamic_img_size" in inspect.signature(type(self._plain).__init__).parameters
        self._fixed = bool(self._plain.pretrained_cfg.get("fixed_input_size")) and not self._dynamic
        self._arguments = {"dynamic_img_size": True} if self._dynamic else {}
        self._flexible = self._built(**self._arguments) if self._dynamic else self._plain

    def facts(self) -> Backbone:
        millions = round(sum(p.numel() for p in self._plain.parameters()) / 1e6, 1)
        multiple = self._multiple() if self._weights_fit(2 * self._native) else 0
        if not multiple:
            return Backbone(millions, only_size=self._native, saved=self._saved)
        tried = (multiple * math.ceil(size / multiple) for size in _SMALLEST)
        smallest = next((size for size in tried if self._takes(size)), self._native)
        return Backbone(millions, multiple, self._fixed, self._dynamic, smallest, saved=self._saved)

    def _built(self, **arguments: Any) -> TimmNetwork:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's, about names that it is going to drop
            return build(self._name, self._saved, **arguments).eval()

    def _weights_fit(self, size: int) -> bool:
        """Whether the network of another size can load the weights of this one, as timm converts them."""
        if not (self._fixed or self._dynamic):
            return True
        try:
            self._built(state=self._plain.state_dict(), img_size=size, **self._arguments)
        except _REFUSALS:
            return False
        return True

    def _takes(self, size: int) -> bool:
        """Whether images of this side pass."""
        try:
            network = self._built(img_size=size) if self._fixed else self._flexible
            with torch.inference_mode():
                network(torch.empty(2, 3, size, size, device="meta"))
        except _REFUSALS:
            return False
        return True

    def _multiple(self) -> int:
        """The smallest number of pixels whose multiples pass; 0: only the network's own size does.

        Three sizes are tried, of which one is no multiple of a larger number. Networks that are built for a
        size keep whole patches in their last stage, whether they pad or not.
        """
        native = self._native
        found = (m for m in _MULTIPLES if native % m == 0)
        multiple = next((m for m in found if all(self._takes(native + k * m) for k in (1, -1, 2))), 0)
        info = getattr(self._plain, "feature_info", None)
        if not (multiple and info and (self._fixed or self._dynamic)):
            return multiple
        whole = math.lcm(multiple, int(info[-1]["reduction"]))
        return multiple if native % whole else whole


def _saved(name: str) -> dict[str, Any] | None:
    """Architecture and arguments by the config.json of a repository or a folder; None for timm's names."""
    source = next((source for source in (HUB, LOCAL) if name.startswith(source)), None)
    if source is None:
        return None
    read = load_model_config_from_hf if source == HUB else load_model_config_from_path
    try:
        settings, architecture, arguments = read(name.removeprefix(source))
    except (OSError, HTTPError, *_REFUSALS) as error:
        raise ValueError(
            f"backbone={name!r}: its config.json is missing or not in timm's format ({first_line(error)})"
        ) from error
    if not is_model(architecture):
        raise ValueError(f"backbone={name!r}: its architecture {architecture!r} is not known to timm")
    kept = {key: value for key, value in settings.items() if key not in _ELSEWHERE}
    return {"architecture": architecture, "pretrained_cfg": kept, "model_args": dict(arguments or {})}


def _check_name(name: str) -> None:
    """Raises ValueError unless timm has the network, and weights by the tag."""
    architecture, tag = split_model_name_tag(name)
    if not is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=_LISTED)
        which = f"close names are {', '.join(close)}" if close else "timm.list_models() lists its names"
        raise ValueError(f"backbone={name!r} is not known to timm; {which}")
    if tag:
        try:
            get_pretrained_cfg(name)
        except RuntimeError:
            tags = [n.partition(".")[2] for n in timm.list_models(f"{architecture}.*", pretrained=True)]
            raise ValueError(
                f"backbone={name!r}: timm has no weights {tag!r} of {architecture}; choose from "
                f"{', '.join(tags) or 'none'}"
            ) from None

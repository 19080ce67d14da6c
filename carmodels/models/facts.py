"""What is known of a backbone by its name: the catalog's row, what a study holds, or what timm says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from carmodels.catalog import BACKBONES, Backbone
from carmodels.files import user_path

WEIGHTS_FILE = "model.safetensors"  # as timm's repositories and folders name it
HUB, LOCAL = "hf-hub:", "local-dir:"  # how timm tells names of other sources
_FIELDS = tuple(field.name for field in fields(Backbone))
_known: dict[str, Backbone] = {}  # of this process: asking timm takes a second


def facts_of(name: str) -> Backbone:
    """A backbone's facts. Raises ValueError, with close names, for what is no timm model.

    `name` is a name of timm's, with a tag or without, or one of `hf-hub:` or `local-dir:`.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if name not in _known:
        from carmodels.models.timm_facts import ask_timm  # torch and timm take seconds to import

        _known[name] = ask_timm(name)
    return _known[name]


def remember(backbones: Mapping[str, Mapping[str, Any]]) -> None:
    """Take facts that a study or an export holds: what they came from may be out of reach."""
    for name, values in json.loads(json.dumps(backbones)).items():  # dicts of its own, of the plain kind
        given = {key: values[key] for key in _FIELDS if key in values}
        _known.setdefault(name, Backbone(**{"millions": values["millions"], **given}))


def absolute_name(name: str) -> str:
    """The name with the absolute path of a local folder, which may be given without `local-dir:`.

    Raises ValueError for a path that is no folder, and for one without safetensors.
    """
    path = name.removeprefix(LOCAL)
    if name.startswith(HUB) or (path == name and "/" not in name):
        return name
    folder = user_path(path).resolve()
    if not folder.is_dir():
        raise ValueError(
            f"backbone={name!r}: {path} is no folder; give one with config.json and {WEIGHTS_FILE}, or "
            f"{HUB}ORGANISATION/NAME for a model of the hub"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"backbone={name!r}: {path} holds no {WEIGHTS_FILE}, and a pickle is not opened")
    return f"{LOCAL}{folder}"


def short_name(name: str) -> str:
    """The name for display: of a local folder its last part."""
    return Path(name).name if name.startswith(LOCAL) else name

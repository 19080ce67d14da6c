"""A finished ensemble at work: one network of all its members, from images to probabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from carmodels.catalog import VIEWS
from carmodels.data.decode import read_image, room_for, shrink
from carmodels.data.loader import Loader
from carmodels.data.splits import Split
from carmodels.files import read_json
from carmodels.models.classifier import Classifier, create_classifier, load_weights
from carmodels.models.weights import Weights
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.forward import autocast, view_size

EXPORTED = ("model.json", "ensemble.safetensors", "ensemble.onnx", "README.md")
CELLS = 8  # of an attribution map, a side
SQUARES = (CELLS - 1) ** 2  # looks at an image that a map takes
_FLOOR = float(np.finfo(np.float32).eps)  # as in carmodels.predictions


@dataclass(frozen=True)
class Input:
    """One of the shapes that an ensemble wants to see an image in."""

    view: str  # row of VIEWS
    size: int  # side, pixels

    @property
    def name(self) -> str:
        return f"{self.view}_{self.size}"


@dataclass(frozen=True)
class Member:
    """A trained model of an ensemble, and its share of the answer."""

    trial_id: str
    weight: float
    config: TrialConfig
    temperature: float = 1.0  # of each view's probabilities, before any mean


@dataclass(frozen=True)
class EnsembleSpec:
    """All of an ensemble but its parameters."""

    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    members: tuple[Member, ...]
    views: tuple[str, ...]  # rows of VIEWS, over which every member's probabilities are averaged
    temperature: float
    max_size: int  # pixels; images are shrunk to twice this before anything else

    def shown(self, member: Member) -> tuple[Input, ...]:
        """What a member sees of an image."""
        return tuple(Input(view, view_size(member.config, view)) for view in self.views)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What all members see, each once."""
        return tuple(dict.fromkeys(shape for member in self.members for shape in self.shown(member)))

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        inputs = [{"name": i.name, **asdict(i), "shown": asdict(VIEWS[i.view])} for i in self.inputs]
        found: dict[str, Any] = json.loads(json.dumps({**asdict(self), "inputs": inputs}))
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EnsembleSpec:
        """What `to_dict` gave."""
        members = tuple(
            Member(m["trial_id"], m["weight"], TrialConfig.from_dict(m["config"]), m.get("temperature", 1.0))
            for m in values["members"]
        )
        names = {name: tuple(values[name]) for name in ("classes", "class_names", "views")}
        return cls(
            **names,
            members=members,
            temperature=float(values["temperature"]),
            max_size=int(values["max_size"]),
        )


class Ensemble(nn.Module):
    """The weighted mean over members of each one's mean over views, with all temperatures; in eval mode."""

    def __init__(self, spec: EnsembleSpec, models: Sequence[Classifier]) -> None:
        super().__init__()
        self.spec = spec
        self.models = nn.ModuleList(models)
        self.requires_grad_(False).eval()

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 for each of the spec's inputs, in its order -> (B, C) probabilities."""
        given = dict(zip(self.spec.inputs, images, strict=True))
        members = list(zip(self.spec.members, self.models, strict=True))
        total = sum(member.weight for member, _ in members) * len(self.spec.views)
        means = [
            _tempered(model(given[shape]).float().softmax(dim=1), member.temperature)
            * (member.weight / total)
            for member, model in members
            for shape in self.spec.shown(member)
        ]
        return _tempered(torch.stack(means).sum(dim=0), self.spec.temperature)

    @torch.inference_mode()
    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images (H, W, 3) as `decoded` gives them -> (N, C) float32; in halves where memory runs out."""
        device = next(self.parameters()).device
        try:
            tensors = [prepared(images, shape).to(device) for shape in self.spec.inputs]
            with autocast(device)():
                return self(*tensors).cpu().numpy()
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(images) // 2
        return np.concatenate([self.probabilities(some) for some in (images[:half], images[half:])])


def _tempered(probs: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B, C), as `with_temperature` does it."""
    return (probs.clamp(min=_FLOOR).log() / temperature).softmax(dim=1)


def decoded(path: Path, max_size: int) -> np.ndarray:
    """An image (H, W, 3) as a search's cache would hold it; ValueError, the reason alone, for a bad one."""
    with room_for(path):
        return shrink(read_image(path), max_size)


def prepared(images: Sequence[np.ndarray], shape: Input) -> torch.Tensor:
    """Images (H, W, 3) -> (N, 3, S, S) uint8, channels last: just as the members saw them in the study."""
    rows = np.arange(len(images))
    split = Split("images", tuple(map(str, rows)), None, rows)
    loader = Loader(images, split, image_size=shape.size, batch_size=len(images), view=VIEWS[shape.view])
    return next(iter(loader.epoch(0))).images


def load_ensemble(study: Study, name: str = "ensemble") -> Ensemble:
    """A study's ensemble, or its student; ValueError where it has none, or lacks a member's weights."""
    facts, file = study.metadata, study.results_file(name)
    script = {"ensemble": "ensemble.py", "student": "distil.py"}[name]
    if not file.is_file():
        raise ValueError(f"{study.folder} has no {file.name}; python tune/{script} {study.folder} makes it")
    results = read_json(file)
    configs = {record.trial_id: record.config for record in study.records()}
    if lost := [m["trial_id"] for m in results["members"] if m["trial_id"] not in configs]:
        raise ValueError(
            f"{study.trials_file} has lost {lost[0]}, a member of {file.name}; bring a copy back, or choose "
            f"anew with python tune/{script} {study.folder}"
        )
    members = tuple(
        Member(m["trial_id"], m["weight"], configs[m["trial_id"]], m.get("temperature", 1.0))
        for m in results["members"]
    )
    spec = EnsembleSpec(
        classes=tuple(facts["classes"]),
        class_names=tuple(facts["class_names"]),
        members=members,
        views=tuple(results["tta"]["views"]),
        temperature=results["temperature"],
        max_size=facts["max_size"],
    )
    files = [study.weights_file(member.trial_id) for member in members]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise ValueError(
            f"{missing[0]} is missing: weights are not committed; copy the folders "
            f"{missing[0].parent.name} and predictions from where the search ran, or search again"
        )
    classes = len(spec.classes)
    models = [load_weights(m.config, path, classes=classes) for m, path in zip(members, files, strict=True)]
    return Ensemble(spec, models)


def load_exported(folder: Path) -> Ensemble:
    """What was exported into a folder, without the study; ValueError for one that will not do."""
    described, parameters = (folder / name for name in EXPORTED[:2])
    if not (described.is_file() and parameters.is_file()):
        raise ValueError(f"{folder} is no exported ensemble: it lacks {described.name} or {parameters.name}")
    spec = EnsembleSpec.from_dict(read_json(described))
    classes = len(spec.classes)
    models = [
        create_classifier(member.config, classes=classes, weights=Weights("none")) for member in spec.members
    ]
    ensemble = Ensemble(spec, models)
    try:
        ensemble.load_state_dict(load_file(parameters))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{parameters} is damaged or of another ensemble ({str(error)[:200]})") from error
    return ensemble.to(memory_format=torch.channels_last)


def occlusion(ensemble: Ensemble, image: np.ndarray, column: int) -> np.ndarray:
    """(H, W, 3) -> (CELLS, CELLS): by how much the probability in `column` falls where a part is hidden.

    A square of two by two cells in the image's mean colour goes over it cell by cell; a cell has the mean
    over the squares that hid it (Zeiler and Fergus, 2014). > 0: speaks for the class, < 0: against it.
    """
    tall, wide = (np.linspace(0, side, CELLS + 1).round().astype(int) for side in image.shape[:2])
    corners = [(top, left) for top in range(CELLS - 1) for left in range(CELLS - 1)]
    hidden = np.repeat(image[None], len(corners), axis=0)
    for copy, (top, left) in zip(hidden, corners, strict=True):
        copy[tall[top] : tall[top + 2], wide[left] : wide[left + 2]] = image.mean(axis=(0, 1))
    before = ensemble.probabilities([image])[0, column]
    falls = before - ensemble.probabilities(list(hidden))[:, column]
    totals, counts = np.zeros((CELLS, CELLS)), np.zeros((CELLS, CELLS))
    for fall, (top, left) in zip(falls, corners, strict=True):
        totals[top : top + 2, left : left + 2] += fall
        counts[top : top + 2, left : left + 2] += 1
    found: np.ndarray = totals / counts
    return found

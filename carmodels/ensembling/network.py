"""An ensemble as one torch network, from images to probabilities."""

from __future__ import annotations

import json
import math
from collections import Counter
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
from carmodels.data.decode import decode_slot, read_image, shrink
from carmodels.data.loader import Loader
from carmodels.data.splits import Split
from carmodels.evaluation.metrics import FLOOR
from carmodels.files import MissingKeyError, read_json
from carmodels.models.classifier import Classifier, create_classifier, load_weights
from carmodels.models.facts import facts_of, remember
from carmodels.models.weights import Weights
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.forward import autocast, shown_view, view_size
from carmodels.training.memory import PartwiseForward

EXPORTED = ("model.json", "ensemble.safetensors", "ensemble.onnx", "README.md")


@dataclass(frozen=True)
class InputSpec:
    """One of an ensemble's inputs: a view of the images at one size."""

    view: str  # row of VIEWS
    size: int  # side, pixels

    @property
    def name(self) -> str:
        return f"{self.view}_{self.size}"


@dataclass(frozen=True)
class Member:
    """A trained model of an ensemble."""

    trial_id: str
    weight: float
    config: TrialConfig
    temperature: float = 1.0  # of each view's probabilities, before they are averaged


@dataclass(frozen=True)
class EnsembleSpec:
    """Everything of an ensemble but its parameters."""

    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    members: tuple[Member, ...]
    views: tuple[str, ...]  # rows of VIEWS; every member's probabilities are averaged over them
    temperature: float
    max_size: int  # pixels; the shorter side of an image is first reduced to twice this

    def __post_init__(self) -> None:
        """Raises ValueError for what no ensemble has, such as weights that are not above 0."""
        weights = [member.weight for member in self.members]
        temperatures = [self.temperature, *(member.temperature for member in self.members)]
        if not weights or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(f"the members' weights are {weights}, must be numbers above 0")
        if not (min(temperatures) > 0 and max(temperatures) < math.inf):
            raise ValueError(f"the temperatures are {temperatures}, must be numbers above 0")
        if not self.views or not set(self.views) <= set(VIEWS):
            raise ValueError(f"the views are {list(self.views)}, must be of {', '.join(VIEWS)}")

    def inputs_of(self, member: Member) -> tuple[InputSpec, ...]:
        """The member's input for each view; equal ones where it is shown two views alike."""
        config = member.config
        return tuple(InputSpec(shown_view(config, view), view_size(config, view)) for view in self.views)

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The distinct inputs of all members, in order."""
        return tuple(dict.fromkeys(spec for member in self.members for spec in self.inputs_of(member)))

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        inputs = [{"name": i.name, **asdict(i), "shown": asdict(VIEWS[i.view])} for i in self.inputs]
        names = sorted({member.config.backbone for member in self.members})
        backbones = {name: asdict(facts_of(name)) for name in names}
        content = {**asdict(self), "inputs": inputs, "backbones": backbones}
        values: dict[str, Any] = json.loads(json.dumps(content))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EnsembleSpec:
        """The inverse of `to_dict`."""
        remember(values.get("backbones", {}))
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
    """The weighted mean of the members' probabilities, each averaged over views. In eval mode."""

    def __init__(self, spec: EnsembleSpec, models: Sequence[Classifier]) -> None:
        super().__init__()
        self.spec = spec
        self.models = nn.ModuleList(models)
        self.requires_grad_(False).eval()
        self._forward = PartwiseForward(self._probabilities)

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 for each of `spec.inputs` -> (B, C) probabilities."""
        by_input = dict(zip(self.spec.inputs, images, strict=True))
        members = list(zip(self.spec.members, self.models, strict=True))
        total = sum(member.weight for member, _ in members) * len(self.spec.views)
        means = [
            _tempered(model(by_input[spec]).float().softmax(dim=1), member.temperature)
            * (count * member.weight / total)
            for member, model in members
            for spec, count in Counter(self.spec.inputs_of(member)).items()
        ]
        return _tempered(torch.stack(means).sum(dim=0), self.spec.temperature)

    @torch.inference_mode()
    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images (H, W, 3) uint8 -> (N, C) float32. Halves the batch on out-of-memory."""
        inputs = [preprocess(images, spec) for spec in self.spec.inputs]
        with autocast(next(self.parameters()).device)():
            return self._forward(*inputs).numpy()

    def _probabilities(self, *images: torch.Tensor) -> torch.Tensor:
        """`forward` of images on any device. Returns to the CPU."""
        device = next(self.parameters()).device
        probs: torch.Tensor = self(*(batch.to(device) for batch in images))
        return probs.cpu()


def _tempered(probs: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B, C) -> (B, C), as calibration.tempered does in NumPy."""
    return (probs.clamp(min=FLOOR).log() / temperature).softmax(dim=1)


def load_image(path: Path, max_size: int) -> np.ndarray:
    """An image (H, W, 3) uint8 as the image cache holds it. Raises ValueError with the reason alone."""
    with decode_slot(path):
        return shrink(read_image(path), max_size)


def preprocess(images: Sequence[np.ndarray], spec: InputSpec) -> torch.Tensor:
    """Images (H, W, 3) uint8 -> (N, 3, S, S) uint8, channels last, as a loader of the study makes them."""
    rows = np.arange(len(images))
    split = Split("images", tuple(map(str, rows)), None, rows)
    loader = Loader(images, split, image_size=spec.size, batch_size=len(images), view=VIEWS[spec.view])
    return next(iter(loader.epoch(0))).images


def load_ensemble(study: Study, name: str = "ensemble") -> Ensemble:
    """A study's ensemble, or its student. Raises ValueError if it has none, or lacks a member's weights."""
    metadata, file = study.metadata, study.results_file(name)
    script = {"ensemble": "ensemble.py", "student": "distil.py"}[name]
    if not file.is_file():
        raise ValueError(f"{study.folder} has no {file.name}; python tune/{script} {study.folder} makes it")
    results = study.results(name)
    configs = {record.trial_id: record.config for record in study.records()}
    if missing := [m["trial_id"] for m in results["members"] if m["trial_id"] not in configs]:
        raise ValueError(
            f"{study.trials_file} has lost {missing[0]}, a member of {file.name}; bring a copy back, or "
            f"choose anew with python tune/{script} {study.folder}"
        )
    members = tuple(
        Member(m["trial_id"], m["weight"], configs[m["trial_id"]], m.get("temperature", 1.0))
        for m in results["members"]
    )
    try:
        spec = EnsembleSpec(
            classes=tuple(metadata["classes"]),
            class_names=tuple(metadata["class_names"]),
            members=members,
            views=tuple(results["tta"]["views"]),
            temperature=results["temperature"],
            max_size=metadata["max_size"],
        )
    except MissingKeyError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged ({error}); bring a copy back, or choose anew with python tune/{script} "
            f"{study.folder}"
        ) from None
    files = [study.weights_file(member.trial_id) for member in members]
    if missing_files := [path for path in files if not path.is_file()]:
        raise ValueError(
            f"{missing_files[0]} is missing: weights are not committed; copy the folders "
            f"{missing_files[0].parent.name} and predictions from where the search ran, or search again"
        )
    classes = len(spec.classes)
    models = [load_weights(m.config, path, classes=classes) for m, path in zip(members, files, strict=True)]
    return Ensemble(spec, models)


def load_exported(folder: Path) -> Ensemble:
    """An exported ensemble, without its study. Raises ValueError if a file is missing or damaged."""
    spec_file, weights_file = (folder / name for name in EXPORTED[:2])
    if not (spec_file.is_file() and weights_file.is_file()):
        raise ValueError(f"{folder} is no exported ensemble: it lacks {' or '.join(EXPORTED[:2])}")
    spec = EnsembleSpec.from_dict(read_json(spec_file))
    classes, untrained = len(spec.classes), Weights("none")
    models = [create_classifier(m.config, classes=classes, weights=untrained) for m in spec.members]
    ensemble = Ensemble(spec, models)
    try:
        ensemble.load_state_dict(load_file(weights_file))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights_file} is damaged or of another ensemble ({str(error)[:200]})") from error
    return ensemble.to(memory_format=torch.channels_last)

"""An ensemble for elsewhere: safetensors and ONNX, the latter held against torch before it is handed out."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from carmodels.ensembling.network import EXPORTED, Ensemble
from carmodels.files import write_atomic

TOLERANCE = 1e-4  # by which probabilities may differ between onnxruntime and torch
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_BATCHES = (1, 3)  # sizes that are compared; 2 is exported
_INSIDE = 1_900_000_000  # bytes of parameters that one file holds; past 2 GB a second one is needed


def check_packages() -> None:
    """ValueError with the way out where a package is missing that ONNX needs."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}: pip install -e '.[export]'")


def export(ensemble: Ensemble, folder: Path) -> float:
    """Write description, parameters and ONNX into a folder; the largest difference of a probability.

    The ensemble must be on the CPU. ValueError where onnxruntime's probabilities are further than TOLERANCE
    from torch's, in which case nothing is left in the folder that was not there.
    """
    check_packages()
    folder.mkdir(parents=True, exist_ok=True)
    described, parameters, graph = (folder / name for name in EXPORTED[:3])
    with tempfile.TemporaryDirectory(dir=folder) as unchecked:
        _write_onnx(ensemble, Path(unchecked) / graph.name)
        difference = _difference(ensemble, Path(unchecked) / graph.name)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"onnxruntime is {difference:.1e} away from torch, more than {TOLERANCE:.0e}: "
                f"the study itself answers with torch, python tune/predict.py"
            )
        for file in Path(unchecked).iterdir():  # the graph, and its parameters where they are too many for it
            file.replace(folder / file.name)
    state = {name: value.detach().contiguous() for name, value in ensemble.state_dict().items()}
    write_atomic(parameters, save(state, metadata={"format": "pt"}))
    write_atomic(described, json.dumps(ensemble.spec.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return difference


def _write_onnx(ensemble: Ensemble, path: Path) -> None:
    names = [shape.name for shape in ensemble.spec.inputs]
    batch = torch.export.Dim("batch", min=1, max=1024)
    size = sum(value.numel() * value.element_size() for value in ensemble.state_dict().values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about its parts
        torch.onnx.export(
            ensemble,
            tuple(torch.from_numpy(image) for image in _drawn(ensemble, 2)),
            path,
            input_names=names,
            output_names=["probabilities"],
            dynamic_shapes=(tuple({0: batch} for _ in names),),
            dynamo=True,
            external_data=size > _INSIDE,
            verbose=False,
        )


def _difference(ensemble: Ensemble, path: Path) -> float:
    """The largest over batches of different sizes; infinite for a value that is no number."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in _BATCHES:
        images = _drawn(ensemble, count)
        named = {shape.name: image for shape, image in zip(ensemble.spec.inputs, images, strict=True)}
        [found] = session.run(None, named)
        with torch.inference_mode():
            expected = ensemble(*map(torch.from_numpy, images)).numpy()
        worst = max(worst, float(np.nan_to_num(np.abs(found - expected).max(), nan=np.inf)))
    return worst


def _drawn(ensemble: Ensemble, count: int) -> list[np.ndarray]:
    """(B, 3, S, S) uint8 for each input: flat grounds with noise, so that not all rows are alike."""
    rng = np.random.default_rng(count)
    ground = rng.integers(0, 256, (count, 3, 1, 1))
    return [
        (ground + rng.integers(-60, 61, (count, 3, shape.size, shape.size))).clip(0, 255).astype(np.uint8)
        for shape in ensemble.spec.inputs
    ]

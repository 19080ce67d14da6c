"""Export of an ensemble to safetensors and ONNX. The ONNX file is checked against torch."""

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

TOLERANCE = 1e-4  # largest difference of a probability between onnxruntime and torch
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_EXPORTED_BATCH = 2  # 1 would fix the batch size
_CHECKED_BATCHES = (1, 3)
_MAX_EMBEDDED_BYTES = 1_900_000_000  # an ONNX file holds up to 2 GB; more parameters need a second file


def check_packages() -> None:
    """Raises ValueError if a package that ONNX needs is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}: pip install -e '.[export]'")


def export(ensemble: Ensemble, folder: Path) -> float:
    """Write spec, weights and ONNX. Returns the largest difference of a probability from torch's.

    The ensemble must be on the CPU. Raises ValueError, and adds nothing to the folder, if the difference is
    above TOLERANCE.
    """
    check_packages()
    folder.mkdir(parents=True, exist_ok=True)
    spec_file, weights_file, onnx_file = (folder / name for name in EXPORTED[:3])
    with tempfile.TemporaryDirectory(dir=folder) as unchecked:
        _write_onnx(ensemble, Path(unchecked) / onnx_file.name)
        difference = _max_difference(ensemble, Path(unchecked) / onnx_file.name)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"onnxruntime is {difference:.1e} away from torch, more than {TOLERANCE:.0e}: "
                f"the study itself answers with torch, python tune/predict.py"
            )
        for file in Path(unchecked).iterdir():  # the graph, and parameters that it does not embed
            file.replace(folder / file.name)
    state = {name: value.detach().contiguous() for name, value in ensemble.state_dict().items()}
    write_atomic(weights_file, save(state, metadata={"format": "pt"}))
    write_atomic(spec_file, json.dumps(ensemble.spec.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return difference


def _write_onnx(ensemble: Ensemble, path: Path) -> None:
    names = [spec.name for spec in ensemble.spec.inputs]
    batch = torch.export.Dim("batch", min=1, max=1024)
    size = sum(value.numel() * value.element_size() for value in ensemble.state_dict().values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own deprecated parts
        torch.onnx.export(
            ensemble,
            tuple(torch.from_numpy(batch) for batch in _random_inputs(ensemble, _EXPORTED_BATCH)),
            path,
            input_names=names,
            output_names=["probabilities"],
            dynamic_shapes=(tuple({0: batch} for _ in names),),
            dynamo=True,
            external_data=size > _MAX_EMBEDDED_BYTES,
            verbose=False,
        )


def _max_difference(ensemble: Ensemble, path: Path) -> float:
    """Largest difference from torch over batches of different sizes; infinite for NaN."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for count in _CHECKED_BATCHES:
        batches = _random_inputs(ensemble, count)
        by_name = {spec.name: batch for spec, batch in zip(ensemble.spec.inputs, batches, strict=True)}
        [probs] = session.run(None, by_name)
        with torch.inference_mode():
            expected = ensemble(*map(torch.from_numpy, batches)).numpy()
        largest = max(largest, float(np.nan_to_num(np.abs(probs - expected).max(), nan=np.inf)))
    return largest


def _random_inputs(ensemble: Ensemble, count: int) -> list[np.ndarray]:
    """(B, 3, S, S) uint8 for each input: random colours with noise, so that the probabilities vary."""
    rng = np.random.default_rng(count)
    colours = rng.integers(0, 256, (count, 3, 1, 1))
    return [
        (colours + rng.integers(-60, 61, (count, 3, spec.size, spec.size))).clip(0, 255).astype(np.uint8)
        for spec in ensemble.spec.inputs
    ]

"""Export of an ensemble to safetensors and ONNX. The ONNX file is checked against torch."""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
import warnings
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Onnx:
    """What became of the ONNX file."""

    difference: float  # largest one of a probability from torch's; infinite without a file
    refusal: str = ""  # why there is no file


def export(ensemble: Ensemble, folder: Path) -> Onnx:
    """Write spec and weights, and ONNX where torch's exporter can and onnxruntime agrees with torch.

    The ensemble must be on the CPU. An earlier ONNX file is deleted.
    """
    check_packages()
    folder.mkdir(parents=True, exist_ok=True)
    spec_file, weights_file, onnx_file = (folder / name for name in EXPORTED[:3])
    for earlier in folder.glob(f"{onnx_file.name}*"):  # the graph, and parameters that it does not embed
        earlier.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as unchecked:
        onnx = _checked_onnx(ensemble, Path(unchecked) / onnx_file.name)
        for file in () if onnx.refusal else Path(unchecked).iterdir():
            file.replace(folder / file.name)
    state = {name: value.detach().contiguous() for name, value in ensemble.state_dict().items()}
    write_atomic(weights_file, save(state, metadata={"format": "pt"}))
    write_atomic(spec_file, json.dumps(ensemble.spec.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return onnx


def _checked_onnx(ensemble: Ensemble, path: Path) -> Onnx:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, NotImplemented

    try:
        _write_onnx(ensemble, path)
        difference = _max_difference(ensemble, path)
    except torch.onnx.OnnxExporterError as error:
        return Onnx(math.inf, f"torch cannot export it ({_reason(error)})")
    except (Fail, InvalidGraph, NotImplemented) as error:
        return Onnx(math.inf, f"onnxruntime cannot run it ({_reason(error)})")
    if not difference <= TOLERANCE:
        far = f"onnxruntime is {difference:.1e} away from torch, more than {TOLERANCE:.0e}"
        return Onnx(difference, far)
    return Onnx(difference)


def _reason(error: BaseException) -> str:
    """The first cause of an error, in one line: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


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

"""Showing images to a network: precision, memory, probabilities of a split."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from carmodels.catalog import BACKBONES, VIEWS
from carmodels.data.dataset import Splits
from carmodels.data.loader import Loader
from carmodels.data.splits import Split
from carmodels.evaluation.predictions import Predictions
from carmodels.models.classifier import Classifier
from carmodels.training.config import BOUNDS, TrialConfig


def in_parts(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """network(images) without gradients, in halves, and halves of those, where memory runs out."""
    try:
        return network(images)
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
    if images.is_cuda:
        torch.cuda.empty_cache()
    return torch.cat([in_parts(network, half) for half in images.tensor_split(2)])


def autocast(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A context for the forward pass: bf16 on GPUs that have it natively, else fp16; float32 on CPUs."""
    if device.type != "cuda":
        return nullcontext
    dtype = torch.bfloat16 if has_bf16() else torch.float16
    return lambda: torch.autocast(device.type, dtype)


def has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


@torch.inference_mode()
def predict_probs(model: Classifier, loader: Loader, device: torch.device) -> np.ndarray:
    """(N, C) float32 in the order of the loader's split."""
    model.eval()
    precision = autocast(device)
    parts: list[torch.Tensor] = []
    for batch in loader.epoch(0):
        with precision():
            images = batch.images.to(device, non_blocking=True)
            logits = in_parts(model, images.contiguous(memory_format=torch.channels_last))
        parts.append(logits.float().softmax(dim=1))
    return torch.cat(parts).cpu().numpy()


def predict(
    model: Classifier,
    splits: Splits,
    split: Split,
    *,
    config: TrialConfig,
    view: str = "plain",
    device: str = "cpu",
    processes: int = 0,
) -> Predictions:
    """A trained model's probabilities for every image of a split, seen through one row of VIEWS."""
    loader = Loader(
        splits.images,
        split,
        image_size=view_size(config, view),
        batch_size=2 * config.batch_size,
        view=VIEWS[view],
        processes=processes,
    )
    probs = predict_probs(model.to(device), loader, torch.device(device))
    return Predictions(split.ids, splits.classes, probs)


def view_size(config: TrialConfig, view: str) -> int:
    """Side in pixels at which a view shows its images, within what a configuration may have.

    Backbones built for one size keep theirs.
    """
    row, (low, high) = BACKBONES[config.backbone], BOUNDS["image_size"]
    if row.fixed_size:
        return config.image_size
    least, most = math.ceil(low / row.multiple), int(high // row.multiple)
    steps = round(config.eval_size * VIEWS[view].scale / row.multiple)
    return row.multiple * min(max(steps, least), most)

"""Inference: mixed precision, halving on out-of-memory, probabilities of a split."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from carmodels.catalog import VIEWS
from carmodels.data.dataset import Splits
from carmodels.data.loader import Loader
from carmodels.data.splits import Split
from carmodels.evaluation.predictions import Predictions
from carmodels.models.classifier import Classifier
from carmodels.models.facts import facts_of
from carmodels.training.config import TrialConfig


def forward_in_halves(network: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """network(*inputs), without gradients. On out-of-memory, halves the batch until it fits."""
    try:
        return network(*inputs)
    except torch.OutOfMemoryError:
        if len(inputs[0]) == 1:
            raise
    torch.cuda.empty_cache()
    halves = zip(*(batch.tensor_split(2) for batch in inputs), strict=True)
    return torch.cat([forward_in_halves(network, *half) for half in halves])


def autocast(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A context for the forward pass: bf16 on GPUs that support it, fp16 on others, float32 on CPUs."""
    if device.type != "cuda":
        return nullcontext
    dtype = torch.bfloat16 if has_bf16() else torch.float16
    return lambda: torch.autocast(device.type, dtype)


def has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


@torch.inference_mode()
def predict_probs(model: Classifier, loader: Loader, device: torch.device) -> np.ndarray:
    """(N, C) float32, in the order of the loader's split."""
    model.eval()
    precision = autocast(device)
    probs: list[torch.Tensor] = []
    for batch in loader.epoch(0):
        with precision():
            images = batch.images.to(device, non_blocking=True)
            logits = forward_in_halves(model, images.contiguous(memory_format=torch.channels_last))
        probs.append(logits.float().softmax(dim=1))
    return torch.cat(probs).cpu().numpy()


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
    """A trained model's probabilities for all images of a split, under one view (a row of VIEWS)."""
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
    """Side of a view's images, pixels: a multiple that the backbone accepts, within the bounds of image_size.

    A backbone with a fixed size keeps that.
    """
    row = facts_of(config.backbone)
    return config.image_size if row.fixed_size else row.fit(config.eval_size * VIEWS[view].scale)

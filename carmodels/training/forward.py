"""Inference: mixed precision, sizes of views, probabilities of a split."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
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
from carmodels.training.memory import PartwiseForward, try_twice


def autocast(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A context for the forward pass in `precision`."""
    dtype = precision(device)
    return nullcontext if dtype == torch.float32 else lambda: torch.autocast(device.type, dtype)


def precision(device: torch.device) -> torch.dtype:
    """bf16 on GPUs that support it, fp16 on others, float32 on CPUs."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if has_bf16() else torch.float16


def has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


@torch.inference_mode()
def predict_probs(
    model: Classifier, loader: Loader, device: torch.device, forward: PartwiseForward | None = None
) -> np.ndarray:
    """(N, C) float32, in the order of the loader's split.

    `forward` is the model's, kept from one call to the next: it knows how many images memory holds.
    """
    model.eval()
    mixed, forward = autocast(device), forward or PartwiseForward(model)
    probs: list[torch.Tensor] = []
    for batch in loader.epoch(0):
        with mixed():
            images = batch.images.to(device, non_blocking=True)
            logits = forward(images.contiguous(memory_format=torch.channels_last))
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
    model = try_twice(lambda: model.to(device))
    probs = predict_probs(model, loader, torch.device(device))
    return Predictions(split.ids, splits.classes, probs)


def view_size(config: TrialConfig, view: str) -> int:
    """Side of a view's images, pixels: a multiple that the backbone accepts, within the bounds of image_size.

    A backbone with a fixed size keeps that.
    """
    row = facts_of(config.backbone)
    return config.image_size if row.fixed_size else row.fit(config.eval_size * VIEWS[view].scale)


def shown_view(config: TrialConfig, view: str) -> str:
    """The first row of VIEWS that shows the configuration's backbone the same images.

    A view of another scale is another view only if its size differs.
    """
    size, unscaled = view_size(config, view), replace(VIEWS[view], scale=1.0)
    same = (name for name, row in VIEWS.items() if replace(row, scale=1.0) == unscaled)
    return next(name for name in same if view_size(config, name) == size)

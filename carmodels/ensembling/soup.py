"""Model soups: one model whose weights are the mean of several models' weights (Wortsman et al., 2022)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn

from carmodels.catalog import UNFREEZE
from carmodels.data.dataset import Splits
from carmodels.evaluation.metrics import METRICS, log_loss
from carmodels.evaluation.predictions import Predictions
from carmodels.models.classifier import Classifier, create_classifier
from carmodels.models.weights import Weights
from carmodels.steady_clock import steady_time
from carmodels.training.forward import autocast, predict
from carmodels.training.memory import named_out_of_memory
from carmodels.training.run import Run
from carmodels.training.trainer import make_train_loader


@dataclass(frozen=True)
class Ingredient:
    """A trained model, as a candidate for a soup."""

    trial_id: str
    run: Run
    weights: Path
    val: Predictions


@dataclass(frozen=True)
class Soup:
    """A model with the mean of its ingredients' weights and BatchNorm statistics of its own."""

    ingredients: tuple[Ingredient, ...]
    model: Classifier
    val: Predictions
    tried: int  # candidates that there was time to try


def soup_key(run: Run) -> Hashable | None:
    """Equal for runs whose weights can be averaged: same backbone, sizes, head and initial weights.

    Training from other initial weights ends in another loss basin (Neyshabur et al., 2020). None for runs
    that make no soup: with a frozen backbone, a soup is no more than an ensemble of linear models; models of
    folds are trained on each other's val.
    """
    config, origin = run.config, run.origin
    if UNFREEZE[config.unfreeze].head_only_epochs is None or origin.fold is not None:
        return None
    sizes = (config.image_size, config.eval_image_size)
    return (config.backbone, *sizes, config.head, config.head_depth, origin.init_seed)


def greedy_soup(
    candidates: Sequence[Ingredient],
    splits: Splits,
    *,
    device: str = "cpu",
    processes: int = 0,
    until: float = float("inf"),
) -> Soup | None:
    """The greedy soup (Wortsman et al., 2022, recipe 1) of models with one `soup_key`, the best on val first.

    Tries one candidate after the other and keeps those with which val does not get worse by the metric or, at
    the same score, by log loss. None if only the first is kept. Tries no further candidate after `until`, in
    steady_time()'s seconds.
    """
    assert splits.val.labels is not None
    labels = splits.val.labels
    metric = METRICS[candidates[0].run.origin.metric]

    def score(val: Predictions) -> tuple[float, float]:
        probs = val.aligned(splits.val.ids).probs
        return metric.gain(metric.score(probs, labels), 0.0), -log_loss(probs, labels)

    kept, soup, tried = [candidates[0]], None, 1
    best = score(candidates[0].val)
    for candidate in candidates[1:]:
        if steady_time() > until:
            break
        larger = _average([*kept, candidate], splits, device, processes)
        if score(larger.val) >= best:
            best, soup = score(larger.val), larger
            kept.append(candidate)
        tried += 1
    return replace(soup, tried=tried) if soup else None


def _average(ingredients: Sequence[Ingredient], splits: Splits, device: str, processes: int) -> Soup:
    run = ingredients[0].run
    model = create_classifier(run.config, classes=len(splits.classes), weights=Weights("none"))
    model.load_state_dict(mean_state([ingredient.weights for ingredient in ingredients]))
    model = model.to(device).to(memory_format=torch.channels_last)
    update_batch_norm(model, run, splits, device=device, processes=processes)
    val = predict(model, splits, splits.val, config=run.config, device=device, processes=processes)
    return Soup(tuple(ingredients), model, val, len(ingredients))


def mean_state(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The mean of several files of weights. Integers, which count batches, are the first file's."""
    total = load_file(paths[0])
    for path in paths[1:]:
        for name, value in load_file(path).items():
            if value.is_floating_point():
                total[name] = total[name] + value
    return {name: value / len(paths) if value.is_floating_point() else value for name, value in total.items()}


def update_batch_norm(
    model: Classifier, run: Run, splits: Splits, *, device: str, processes: int = 0
) -> None:
    """Recompute BatchNorm's running statistics in a pass over the augmented train images.

    The mean of the ingredients' statistics would belong to other weights (Izmailov et al., 2018).
    """
    loader, target = make_train_loader(run, splits, processes=processes), torch.device(device)
    with autocast(target)(), named_out_of_memory():
        update_bn((batch.images for batch in loader.epoch(0)), model, target)
    model.eval()

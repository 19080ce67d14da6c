"""Weight soups: one model whose weights are the mean of several models' weights (Wortsman et al., 2022)."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn

from carmodels.catalog import AUGMENTS, UNFREEZE
from carmodels.data.dataset import Splits
from carmodels.data.loader import Loader
from carmodels.evaluation.metrics import METRICS, log_loss
from carmodels.evaluation.predictions import Predictions
from carmodels.models.classifier import Classifier, create_classifier
from carmodels.models.weights import Weights
from carmodels.training.forward import autocast, predict
from carmodels.training.run import Run


@dataclass(frozen=True)
class Ingredient:
    """A trained model that may go into a soup."""

    trial_id: str
    run: Run
    weights: Path
    val: Predictions


@dataclass(frozen=True)
class Soup:
    """A model whose weights are the mean of its ingredients', with BatchNorm statistics of its own."""

    ingredients: tuple[Ingredient, ...]
    model: Classifier
    val: Predictions
    tried: int  # models that it was tried from: fewer than were given where the time was up


def kind(run: Run) -> Hashable | None:
    """What models must share for the mean of their weights to be a model; None: no soup for it.

    Backbone, head, size and initial weights: from other initial weights training ends in another valley
    (Neyshabur et al., 2020). Frozen backbones are left out, as their means are those of a linear model's
    outputs, which an ensemble has as well; so are models of folds, which have learnt from each other's val.
    """
    config, origin = run.config, run.origin
    if UNFREEZE[config.unfreeze].head_only_epochs is None or origin.fold is not None:
        return None
    sizes = (config.image_size, config.eval_image_size)
    return (config.backbone, *sizes, config.head, config.head_depth, origin.init_seed)


def greedy_soup(
    ingredients: Sequence[Ingredient],
    splits: Splits,
    *,
    device: str = "cpu",
    processes: int = 0,
    until: float = float("inf"),
) -> Soup | None:
    """The greedy soup (Wortsman et al., 2022, recipe 1) of models of one kind, the best on val first.

    One after the other is put in and stays where val does not get worse by the metric, or, at the same score,
    by log loss. None where that leaves the first one alone. No further one is tried after `until`,
    time.time().
    """
    assert splits.val.labels is not None
    labels = splits.val.labels
    metric = METRICS[ingredients[0].run.origin.metric]

    def worth(val: Predictions) -> tuple[float, float]:
        probs = val.aligned(splits.val.ids).probs
        return metric.gain(metric.score(probs, labels), 0.0), -log_loss(probs, labels)

    chosen, soup, tried = [ingredients[0]], None, 1
    best = worth(ingredients[0].val)
    for candidate in ingredients[1:]:
        if time.time() > until:
            break
        mixed = _mixed([*chosen, candidate], splits, device, processes)
        if worth(mixed.val) >= best:
            best, soup = worth(mixed.val), mixed
            chosen.append(candidate)
        tried += 1
    return replace(soup, tried=tried) if soup else None


def _mixed(ingredients: Sequence[Ingredient], splits: Splits, device: str, processes: int) -> Soup:
    run = ingredients[0].run
    config = run.config
    model = create_classifier(config, classes=len(splits.classes), weights=Weights("none"))
    model.load_state_dict(mean_state([ingredient.weights for ingredient in ingredients]))
    model = model.to(device).to(memory_format=torch.channels_last)
    refresh_statistics(model, run, splits, device=device, processes=processes)
    val = predict(model, splits, splits.val, config=config, device=device, processes=processes)
    return Soup(tuple(ingredients), model, val, len(ingredients))


def mean_state(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The mean of what `save_weights` wrote; counters are the first one's."""
    total = load_file(paths[0])
    for path in paths[1:]:
        for name, value in load_file(path).items():
            if value.is_floating_point():
                total[name] = total[name] + value
    return {name: value / len(paths) if value.is_floating_point() else value for name, value in total.items()}


def refresh_statistics(
    model: Classifier, run: Run, splits: Splits, *, device: str, processes: int = 0
) -> None:
    """Set BatchNorm's means and variances anew by a pass over train, varied as in training.

    Those of the ingredients are of other weights (Izmailov et al., 2018). In networks without BatchNorm
    nothing happens.
    """
    config = run.config
    loader = Loader(
        splits.images,
        splits.train,
        image_size=config.image_size,
        batch_size=config.batch_size,
        augment=AUGMENTS[config.augment],
        seed=run.origin.seed,
        processes=processes,
        shuffle=True,
        drop_last=len(splits.train) > config.batch_size,
    )
    where = torch.device(device)
    with autocast(where)():
        update_bn((batch.images for batch in loader.epoch(0)), model, where)
    model.eval()

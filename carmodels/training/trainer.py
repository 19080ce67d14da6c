"""Training a run (`fit`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.transforms import v2

from carmodels.catalog import AUGMENTS, SCHEDULES, UNFREEZE
from carmodels.data.dataset import Splits
from carmodels.data.loader import Loader
from carmodels.data.splits import Split
from carmodels.evaluation.metrics import METRICS, accuracy, log_loss
from carmodels.models.classifier import Classifier, create_classifier, load_weights
from carmodels.models.parameter_groups import optimizer_groups, trainable_groups
from carmodels.models.weights import Weights
from carmodels.steady_clock import steady_time
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.features import FeatureStore
from carmodels.training.forward import autocast, has_bf16, predict_probs
from carmodels.training.frozen_features import FrozenFeatures
from carmodels.training.held_out import splits_for
from carmodels.training.memory import (
    PartwiseForward,
    allocate_state,
    free_memory,
    named_out_of_memory,
    try_twice,
)
from carmodels.training.run import Run
from carmodels.training.schedule import LearningRate


@dataclass(frozen=True)
class TrainResult:
    """A trained model, with the weights of the kept epoch: the best on val, or the last."""

    run: Run
    model: Classifier
    history: tuple[EpochMetrics, ...]
    best: EpochMetrics | None  # the kept epoch; None if the first epoch diverged

    @property
    def ending(self) -> str:
        """Why training ended: `schedule`, `patience`, `time` or `diverged`."""
        return self.history[-1].ending


def fit(
    run: Run,
    splits: Splits,
    *,
    weights: Weights,
    on_epoch: Callable[[EpochMetrics], None] = lambda metrics: None,
    device: str = "cpu",
    processes: int = 0,
    features: FeatureStore | None = None,
    compiled: bool = False,
    until: float = math.inf,
    epoch_seconds: Callable[[int], float] | None = None,
    targets: np.ndarray | None = None,
    start: Path | None = None,
) -> TrainResult:
    """Train a run and keep the epoch with the best value of the run's metric on val. Log loss breaks ties.

    With folds, trains on the other K-1 folds and keeps the last epoch, so that the held-out fold never
    influences selection. With `fold_in`, trains on all labelled images and keeps the last epoch; its metrics
    on val are NaN. A run that `continues` another loads the weights file `start` and restarts the schedule
    (warm restart, Loshchilov and Hutter, 2017).

    `on_epoch` is called after every epoch. A non-finite loss ends training as "diverged". With `features`,
    epochs with a frozen backbone train the head on its stored outputs. With `targets`, (V, N, C)
    probabilities take the place of the labels (distillation, Hinton et al., 2015): epoch e augments the N
    train images as a loader does in its epoch v = (e - 1) mod V, and trains on `targets[v]`.

    Training ends early if another epoch would not end by `until` (steady_time()). `epoch_seconds`
    returns what an epoch should take. Without it, the next one should take what the last one took.

    On out-of-memory, falls back to gradient accumulation, which `EpochMetrics.microbatches` tells. Raises
    torch.OutOfMemoryError if that does not help. On a CPU, the same run with the same number of threads gives
    the same numbers, bit by bit.
    """
    if bool(run.origin.continues) != (start is not None):
        raise ValueError(f"continues={run.origin.continues!r}, start={start}: give both or neither")
    trainer = Trainer(
        run,
        splits_for(run.origin, splits),
        weights=weights,
        device=torch.device(device),
        processes=processes,
        features=features,
        compiled=compiled,
        targets=targets,
        start=start,
    )
    history: list[EpochMetrics] = []
    best: EpochMetrics | None = None
    best_state: dict[str, torch.Tensor] = {}
    for epoch in range(1, run.config.epochs + 1):
        started = time.monotonic()
        train_loss, probs = trainer.epoch(epoch)
        metrics = _measure(run, epoch, train_loss, probs, trainer.val_labels, time.monotonic() - started)
        if not metrics.ending and _should_keep(run, metrics, best):
            best = metrics
            best_state = {k: v.detach().cpu().clone() for k, v in trainer.eval_model.state_dict().items()}
        ending = _ending(run, [*history, metrics])
        next_seconds = _next_seconds(metrics, trainer.uses_features(epoch), epoch_seconds)
        if not ending and steady_time() + next_seconds > until:
            ending = "time"
        metrics = replace(metrics, ending=ending, microbatches=trainer.microbatches)
        history.append(metrics)
        on_epoch(metrics)
        if metrics.ending:
            break
    if best_state:
        trainer.model.load_state_dict(best_state)
    return TrainResult(run, trainer.model, tuple(history), best)


def _next_seconds(last: EpochMetrics, on_features: bool, expected: Callable[[int], float] | None) -> float:
    """Seconds that the next epoch is expected to take, at the pace of the last one.

    An epoch on stored features (`on_features`) says nothing of the pace: it may have found them all.
    """
    if expected is None:
        return last.seconds
    planned, following = expected(last.epoch), expected(last.epoch + 1)
    if on_features or not 0 < planned < math.inf:
        return max(last.seconds, following)
    return last.seconds * following / planned


def _measure(
    run: Run, epoch: int, train_loss: float, probs: np.ndarray, labels: np.ndarray, seconds: float
) -> EpochMetrics:
    metric = METRICS[run.origin.metric]
    if run.origin.fold_in and math.isfinite(train_loss):
        return EpochMetrics(epoch, train_loss, math.nan, math.nan, math.nan, seconds)
    if not (math.isfinite(train_loss) and np.isfinite(probs).all()):
        worst = metric.score(np.array([[0.0, 1.0]]), np.array([0]))
        return EpochMetrics(epoch, train_loss, math.nan, 0.0, worst, seconds, ending="diverged")
    value = metric.score(probs, labels)
    return EpochMetrics(epoch, train_loss, log_loss(probs, labels), accuracy(probs, labels), value, seconds)


def _should_keep(run: Run, metrics: EpochMetrics, best: EpochMetrics | None) -> bool:
    if run.origin.keeps_last_epoch or best is None:
        return True
    gain = METRICS[run.origin.metric].gain(metrics.value, best.value)
    return gain > 0 or (gain == 0 and metrics.val_loss < best.val_loss)


def _ending(run: Run, history: Sequence[EpochMetrics]) -> str:
    """Why the last epoch of the history is the last of all; "" if it is not."""
    last, patience = history[-1], run.config.patience
    if last.ending:
        return last.ending
    if last.epoch == run.config.epochs:
        return "schedule"
    return "patience" if patience and last.epoch - _last_gain(run, history) >= patience else ""


def _last_gain(run: Run, history: Sequence[EpochMetrics]) -> int:
    """The epoch that first had the best value. A tie with a lower log loss is no gain of the metric."""
    metric = METRICS[run.origin.metric]
    first = history[0]
    for metrics in history:
        first = metrics if metric.gain(metrics.value, first.value) > 0 else first
    return first.epoch


class Trainer:
    """The state of one training run: model, optimizer, schedule, loaders."""

    @named_out_of_memory()
    def __init__(
        self,
        run: Run,
        splits: Splits,
        *,
        weights: Weights,
        device: torch.device,
        processes: int = 0,
        features: FeatureStore | None = None,
        compiled: bool = False,
        targets: np.ndarray | None = None,
        start: Path | None = None,
    ) -> None:
        config, origin, classes = run.config, run.origin, len(splits.classes)
        self.config, self.origin, self.device, self.classes = config, origin, device, classes

        def initial_model() -> Classifier:
            torch.manual_seed(origin.init_seed)
            if start is None:
                model = create_classifier(config, classes=classes, weights=weights)
            else:
                model = load_weights(config, start, classes=classes)
            return model.to(device).to(memory_format=torch.channels_last)

        self.model = try_twice(initial_model)
        if origin.head_seed is not None:
            torch.manual_seed(origin.seed)
        self.network: nn.Module = cast(nn.Module, torch.compile(self.model)) if compiled else self.model
        # timm's warm-up of the decay: without it the average of a short schedule holds the initial weights.
        self.average = (
            try_twice(lambda: ModelEmaV3(self.model, decay=config.ema, use_warmup=True))
            if config.ema
            else None
        )
        self.val_forward = PartwiseForward(self.eval_model)
        self.steps = 0
        self.microbatches = 1  # into which a batch is split; doubled on out-of-memory
        self.train_loader = make_train_loader(run, splits, processes=processes)
        self.val_labels = _labels(splits.val)
        self.val_loader = Loader(
            splits.images,
            splits.val,
            image_size=config.eval_size,
            batch_size=2 * config.batch_size,
            processes=processes,
        )
        self.optimizer = _make_optimizer(self.model, config, fused=device.type in ("cpu", "cuda"))
        self.schedule = LearningRate(
            SCHEDULES[config.schedule], self.optimizer, config.epochs * len(self.train_loader)
        )
        self.loss = nn.CrossEntropyLoss(
            weight=_class_weights(splits).to(device) if config.class_weights else None,
            label_smoothing=config.label_smoothing,
        )
        self.mix = _make_mix(config, classes)
        # Other initial weights of the backbone are other features, and mixing needs images.
        shareable = weights.source != "none" and start is None and self.mix is None
        self.features = (
            FrozenFeatures(features, config, weights, splits, self.model, processes)
            if features and shareable
            else None
        )
        if targets is not None and (self.features or self.mix):
            raise ValueError("targets belong to single images: leave out mixup, cutmix and features")
        self.targets = None if targets is None else torch.from_numpy(targets)
        self.precision = autocast(device)
        fp16 = device.type == "cuda" and not has_bf16()
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    @property
    def eval_model(self) -> Classifier:
        """The model that is scored and kept: the moving average, if there is one."""
        return cast(Classifier, self.average.module) if self.average is not None else self.model

    def epoch(self, number: int) -> tuple[float, np.ndarray]:
        """One pass over train and one over val: mean train loss, and probabilities (N, C) of val.

        The first epoch is 1. After a non-finite train loss the probabilities are NaN.
        """
        self.model.unfreeze_top(self._trainable(number))
        self.model.train()
        try_twice(lambda: allocate_state(self.optimizer))
        features = self.features if self.uses_features(number) else None
        if features is None:
            batches = self.train_batches(number)
        else:
            batches = features.train_batches(number, self.train_loader.batch_positions(number))
        total = torch.zeros((), device=self.device)  # stays on the device: reading it each step synchronises
        for inputs, labels in batches:
            total += self.step(inputs, labels)
        train_loss = float(total) / len(self.train_loader)
        if not math.isfinite(train_loss):
            return train_loss, np.full((1, 1), np.nan, np.float32)
        if not len(self.val_labels):
            self.schedule.epoch_ended(train_loss)
            return train_loss, np.empty((0, self.classes), np.float32)
        probs = self._val_probs(features)
        if np.isfinite(probs).all():
            loss = train_loss if self.origin.keeps_last_epoch else log_loss(probs, self.val_labels)
            self.schedule.epoch_ended(loss)
        return train_loss, probs

    def _trainable(self, number: int) -> int:
        """Layer groups of the backbone that train in an epoch."""
        row, groups = UNFREEZE[self.config.unfreeze], len(self.model.groups)
        return trainable_groups(row, epoch=number, epochs=self.config.epochs, groups=groups)

    def uses_features(self, number: int) -> bool:
        """Whether an epoch trains on stored features."""
        return self.features is not None and self._trainable(number) == 0

    def train_batches(self, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """An epoch's batches of images with their labels (B,) or targets (B, C)."""
        size, strength = self.config.train_image_size(number), self.config.augment_strength(number)
        if self.targets is None:
            batches = self.train_loader.epoch(number, size=size, strength=strength)
            return ((batch.images, batch.labels) for batch in batches)
        view = (number - 1) % len(self.targets)
        targets = self.targets[view]
        batches = self.train_loader.epoch(number, augment_epoch=view, size=size, strength=strength)
        return ((batch.images, targets[batch.positions]) for batch in batches)

    @torch.inference_mode()
    def _val_probs(self, features: FrozenFeatures | None) -> np.ndarray:
        """(N, C) probabilities of val, from stored features if there are any."""
        if features is None:
            return predict_probs(self.eval_model, self.val_loader, self.device, self.val_forward)
        self.eval_model.eval()
        val = features.val(self.val_loader)
        with self.precision():
            logits = self.eval_model.head(val)
        return logits.float().softmax(dim=1).cpu().numpy()

    def step(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One optimizer step on images (B, 3, S, S) uint8 or features (B, F). Returns the loss."""
        network: nn.Module = self.network if inputs.ndim == 4 else self.model.head
        loss = self._backward(network, *try_twice(lambda: self._on_device(inputs, labels)))
        if self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            try_twice(lambda: nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm))
        with named_out_of_memory():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step_ended()
        if (average := self.average) is not None:
            self.steps += 1
            try_twice(lambda: average.update(self.model, step=self.steps))
        return loss

    def _on_device(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images normalised and mixed, or features, and their targets."""
        inputs = inputs.to(self.device, non_blocking=True)
        targets = labels.to(self.device, non_blocking=True)
        if inputs.ndim == 4:
            inputs = self.model.normalise(inputs)
        if self.mix is not None:
            inputs, targets = self.mix(inputs, targets)
        return inputs, targets

    def _backward(self, network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute a batch's gradients. Returns the loss.

        On out-of-memory, doubles the number of micro-batches for the rest of the run. The gradients stay the
        same, except that BatchNorm sees fewer images at a time. Raises OutOfMemoryError if micro-batches of
        three images do not fit.
        """
        while True:
            try:
                with named_out_of_memory():
                    return self._accumulate(network, inputs, targets)
            except torch.OutOfMemoryError:
                if len(inputs) < 4 * self.microbatches:
                    raise
            self.microbatches *= 2
            free_memory()

    def _accumulate(self, network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Accumulate a batch's gradients over micro-batches. Returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        splits = (tensor.tensor_split(self.microbatches) for tensor in (inputs, targets))
        for part, part_targets in zip(*splits, strict=True):
            with self.precision():
                logits = network(part)
            loss = self.loss(logits.float(), part_targets) * self._loss_share(part_targets, targets)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _loss_share(self, part: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | float:
        """The weight of a micro-batch's mean loss in the batch's: by images, or by their class weights."""
        if self.loss.weight is None or targets.ndim > 1:  # torch averages soft targets over images
            return len(part) / len(targets)
        return self.loss.weight[part].sum() / self.loss.weight[targets].sum()


def make_train_loader(run: Run, splits: Splits, *, processes: int) -> Loader:
    """A loader of train as a run sees it: augmented, shuffled, in full batches."""
    return Loader(
        splits.images,
        splits.train,
        image_size=run.config.image_size,
        batch_size=run.config.batch_size,
        augment=AUGMENTS[run.config.augment],
        seed=run.origin.seed,
        processes=processes,
        shuffle=True,
        drop_last=len(splits.train) > run.config.batch_size,
    )


def _make_optimizer(model: Classifier, config: TrialConfig, *, fused: bool) -> torch.optim.Optimizer:
    groups = optimizer_groups(model, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=fused)
    optimizer = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return optimizer(groups, lr=config.lr, fused=fused)


def _make_mix(config: TrialConfig, classes: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """Mixup and cutmix of a batch, one of them at random if both are on; None if both are off."""
    mixes: list[nn.Module] = []
    if config.mixup:
        mixes.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix:
        mixes.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
    return v2.RandomChoice(mixes) if mixes else None


def _labels(split: Split) -> np.ndarray:
    """(N,) class indices of a labelled split."""
    assert split.labels is not None, f"{split.name} has no labels"
    return split.labels


def _class_weights(splits: Splits) -> torch.Tensor:
    """(C,) inverse class frequencies of train, scaled to a mean of 1 over the images."""
    counts = np.bincount(_labels(splits.train), minlength=len(splits.classes))
    return torch.tensor(counts.sum() / (len(counts) * np.maximum(counts, 1)), dtype=torch.float32)

"""Training one configuration (`fit`)."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
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
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.features import VIEWS_KEPT, FeatureStore
from carmodels.training.forward import autocast, has_bf16, in_parts, predict_probs
from carmodels.training.held_out import splits_for
from carmodels.training.run import Run
from carmodels.training.schedule import LearningRate


@dataclass(frozen=True)
class TrainResult:
    """A trained model, with the weights of its best epoch, or of its last where val had no say."""

    run: Run
    model: Classifier
    history: tuple[EpochMetrics, ...]
    best: EpochMetrics | None  # the epoch that was kept; None where the first one already diverged

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
    targets: np.ndarray | None = None,
    start: Path | None = None,
) -> TrainResult:
    """Train by the configuration's schedule and keep the epoch that is best by its metric on val.

    With a fold, training is on the other folds of train and val, val is the fold, and the last epoch is kept,
    so that the fold has no say; so it is where everything is learnt from and there is no val: its metrics are
    NaN then.
    `on_epoch` is called once an epoch. A non-finite loss ends training with `ending` = "diverged". On a
    CPU, the same configuration gives the same numbers to the bit for the same number of threads. With
    `features`, epochs in which the whole backbone is frozen train the head on its stored outputs, for
    VIEWS_KEPT fixed views of every image instead of a new one each epoch. `compiled` trains through
    torch.compile. Where memory runs out batches are trained on in parts. Training ends early, with the best
    epoch so far, where one more epoch would not end by `until`, in seconds of time.time(). `targets`,
    (V, N, C) probabilities, are learnt in the place of the labels (distillation, Hinton et al., 2015): epoch
    e shows each of the N train images as in epoch v = (e - 1) mod V of a loader, where `targets[v]` is what
    to say of it. A configuration that `continues` another run begins with the weights that `save_weights`
    wrote to the file `start`, and with the first step of its schedule (a warm restart, Loshchilov and Hutter,
    2017).
    """
    if bool(run.origin.continues) != (start is not None):
        raise ValueError(f"continues={run.origin.continues!r}, start={start}: one takes the other")
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
        if not metrics.ending and _to_keep(run, metrics, best):
            best = metrics
            best_state = {
                name: value.detach().cpu().clone() for name, value in trainer.tested.state_dict().items()
            }
        ending = _ending(run, metrics, best)
        if not ending and time.time() + metrics.seconds > until:
            ending = "time"
        metrics = replace(metrics, ending=ending)
        history.append(metrics)
        on_epoch(metrics)
        if metrics.ending:
            break
    if best_state:
        trainer.model.load_state_dict(best_state)
    return TrainResult(run, trainer.model, tuple(history), best)


def _to_keep(run: Run, metrics: EpochMetrics, best: EpochMetrics | None) -> bool:
    if run.origin.keeps_last_epoch or best is None:
        return True
    return METRICS[run.origin.metric].gain(metrics.value, best.value) > 0


def _ending(run: Run, metrics: EpochMetrics, best: EpochMetrics | None) -> str:
    if metrics.ending:
        return metrics.ending
    if metrics.epoch == run.config.epochs:
        return "schedule"
    late = best is not None and metrics.epoch - best.epoch >= run.config.patience
    return "patience" if run.config.patience and late else ""


def _measure(
    run: Run, epoch: int, train_loss: float, probs: np.ndarray, labels: np.ndarray, seconds: float
) -> EpochMetrics:
    metric = METRICS[run.origin.metric]
    if run.origin.fold_in and math.isfinite(train_loss):
        return EpochMetrics(epoch, train_loss, math.nan, math.nan, math.nan, seconds)
    if not (math.isfinite(train_loss) and np.isfinite(probs).all()):
        certain_and_wrong = metric.score(np.array([[0.0, 1.0]]), np.array([0]))
        return EpochMetrics(epoch, train_loss, math.nan, 0.0, certain_and_wrong, seconds, ending="diverged")
    value = metric.score(probs, labels)
    return EpochMetrics(epoch, train_loss, log_loss(probs, labels), accuracy(probs, labels), value, seconds)


class Trainer:
    """The moving parts of one training run."""

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
        config, origin = run.config, run.origin
        torch.manual_seed(origin.init_seed)
        self.config, self.origin, self.device, self.splits, self.processes = (
            config,
            origin,
            device,
            splits,
            processes,
        )
        self.weights = weights
        if start is None:
            self.model = create_classifier(config, classes=len(splits.classes), weights=weights).to(device)
        else:
            self.model = load_weights(config, start, classes=len(splits.classes)).to(device)
        if origin.head_seed is not None:
            torch.manual_seed(origin.seed)
        self.model = self.model.to(memory_format=torch.channels_last)
        self.network: nn.Module = cast(nn.Module, torch.compile(self.model)) if compiled else self.model
        # With timm's warm-up of the decay: short schedules would average the first weights otherwise.
        self.average = ModelEmaV3(self.model, decay=config.ema, use_warmup=True) if config.ema else None
        self.steps = 0
        self.parts = 1  # of a batch, one after the other; more where memory ran out
        self.train_loader = Loader(
            splits.images,
            splits.train,
            image_size=config.image_size,
            batch_size=config.batch_size,
            augment=AUGMENTS[config.augment],
            seed=origin.seed,
            processes=processes,
            shuffle=True,
            drop_last=len(splits.train) > config.batch_size,
        )
        self.val_labels = _labels(splits.val)
        self.val_loader = Loader(
            splits.images,
            splits.val,
            image_size=config.eval_size,
            batch_size=2 * config.batch_size,
            processes=processes,
        )
        self.optimizer = _optimizer(self.model, config, fused=device.type in ("cpu", "cuda"))
        self.schedule = LearningRate(
            SCHEDULES[config.schedule], self.optimizer, config.epochs * len(self.train_loader)
        )
        self.loss = nn.CrossEntropyLoss(
            weight=_class_weights(splits).to(device) if config.class_weights else None,
            label_smoothing=config.label_smoothing,
        )
        self.mix = _mixer(config, len(splits.classes))
        # Random and trained weights are another backbone for every seed, and mixing asks for images.
        pretrained = weights.source != "none" and start is None
        self.features = features if pretrained and self.mix is None else None
        if targets is not None and (self.features or self.mix):
            raise ValueError("targets are of single images as a loader shows them: no mixup, no features")
        self.targets = None if targets is None else torch.from_numpy(targets)
        self.precision = autocast(device)
        half = device.type == "cuda" and not has_bf16()
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)

    @property
    def tested(self) -> Classifier:
        """The model that is scored and kept: the moving average where there is one."""
        return cast(Classifier, self.average.module) if self.average is not None else self.model

    def epoch(self, number: int) -> tuple[float, np.ndarray]:
        """One pass over train and one over val: mean loss, and (N, C) probabilities of val."""
        row = UNFREEZE[self.config.unfreeze]
        groups = len(self.model.groups)
        opened = trainable_groups(row, epoch=number, epochs=self.config.epochs, groups=groups)
        self.model.unfreeze_top(opened)
        self.model.train()
        stored = self.features if opened == 0 else None
        total = torch.zeros((), device=self.device)  # stays there: reading it each step would wait for it
        for inputs, labels in self.shown(number) if stored is None else self._remembered(stored, number):
            total += self.step(inputs, labels)
        train_loss = float(total) / len(self.train_loader)
        if not math.isfinite(train_loss):
            return train_loss, np.full((1, 1), np.nan, np.float32)
        if not len(self.val_labels):
            self.schedule.epoch_ended(train_loss)
            return train_loss, np.empty((0, len(self.splits.classes)), np.float32)
        if stored is None:
            probs = predict_probs(self.tested, self.val_loader, self.device)
        else:
            probs = self._remembered_val(stored)
        if np.isfinite(probs).all():
            self.schedule.epoch_ended(
                train_loss if self.origin.keeps_last_epoch else log_loss(probs, self.val_labels)
            )
        return train_loss, probs

    @cached_property
    def known(self) -> dict[str, str | int]:
        """What the outputs of the frozen backbone depend on, save the augmentation."""
        return {
            "backbone": self.config.backbone,
            "weights": self.weights.identity(self.config.backbone),
            "data": self.splits.fingerprint,
            "split": self.splits.split_hash,
            "decoded": self.splits.opening.max_size,
            "device": self.device.type,
        }

    def shown(self, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of images with their labels, (B,), or targets, (B, C)."""
        size, strength = self.config.train_image_size(number), self.config.augment_strength(number)
        if self.targets is None:
            batches = self.train_loader.epoch(number, size=size, strength=strength)
            return ((batch.images, batch.labels) for batch in batches)
        view = (number - 1) % len(self.targets)
        targets = self.targets[view]
        batches = self.train_loader.epoch(number, like=view, size=size, strength=strength)
        return ((batch.images, targets[batch.rows]) for batch in batches)

    def _remembered(self, store: FeatureStore, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of the frozen backbone's outputs for one of the stored views, in this epoch's order."""
        loader = self.train_loader
        view = (number - 1) % VIEWS_KEPT
        shown = Loader(
            self.splits.images,
            self.splits.train,
            image_size=self.config.image_size,
            batch_size=2 * self.config.batch_size,
            augment=AUGMENTS[self.config.augment],
            processes=self.processes,
        )
        content = {
            **self.known,
            "image_size": self.config.image_size,
            "augment": asdict(AUGMENTS[self.config.augment]),
            "view": view,
        }
        found = store.get(content, len(self.splits.train), lambda: self._outputs(shown, view))
        outputs = torch.from_numpy(np.array(found)).to(self.device)  # all of them, once
        labels = torch.from_numpy(_labels(self.splits.train)).to(self.device)
        for order in loader.orders(number):
            chosen = torch.from_numpy(order).to(self.device)
            yield outputs[chosen].float(), labels[chosen]

    @torch.inference_mode()
    def _remembered_val(self, store: FeatureStore) -> np.ndarray:
        """(N, C) probabilities of val from the frozen backbone's stored outputs."""
        content = {**self.known, "image_size": self.config.eval_size, "part": "val"}
        found = store.get(content, len(self.val_labels), lambda: self._outputs(self.val_loader, 0))
        self.tested.eval()
        outputs = torch.from_numpy(found.astype(np.float32)).to(self.device)
        with self.precision():
            logits = self.tested.head(outputs)
        return logits.float().softmax(dim=1).cpu().numpy()

    @torch.inference_mode()
    def _outputs(self, loader: Loader, number: int) -> np.ndarray:
        """(N, F) outputs of the frozen backbone for every image of an unshuffled loader."""
        parts: list[torch.Tensor] = []
        for batch in loader.epoch(number):
            with self.precision():
                images = self.model.normalise(batch.images.to(self.device, non_blocking=True))
                parts.append(in_parts(self.model.backbone, images).float())
        return torch.cat(parts).cpu().numpy()

    def step(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One step on 8-bit images (B, 3, S, S) or on outputs of the frozen backbone (B, F); the loss."""
        inputs = inputs.to(self.device, non_blocking=True)
        targets = labels.to(self.device, non_blocking=True)
        network: nn.Module = self.model.head
        if inputs.ndim == 4:
            network, inputs = self.network, self.model.normalise(inputs)
        if self.mix is not None:
            inputs, targets = self.mix(inputs, targets)
        loss = self._gradients(network, inputs, targets)
        if self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step_ended()
        if self.average is not None:
            self.steps += 1
            self.average.update(self.model, step=self.steps)
        return loss

    def _gradients(self, network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Leave a batch's gradients in the parameters; the loss.

        Where memory runs out the batch is cut in two, and again, for the rest of the run: gradients add up to
        the same, BatchNorm sees fewer images at a time. Raises OutOfMemoryError where three do not fit.
        """
        while True:
            try:
                return self._accumulated(network, inputs, targets)
            except torch.OutOfMemoryError:
                if len(inputs) < 4 * self.parts:
                    raise
            self.parts *= 2  # outside the handler, whose exception holds on to what was computed
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _accumulated(self, network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        parts = zip(inputs.tensor_split(self.parts), targets.tensor_split(self.parts), strict=True)
        for some, their_targets in parts:
            with self.precision():
                logits = network(some)
            loss = self.loss(logits.float(), their_targets) * self._share(their_targets, targets)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _share(self, some: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | float:
        """What a part's mean loss counts for in the batch's: by images, or by their classes' weights."""
        if self.loss.weight is None or targets.ndim > 1:  # torch takes the mean of soft targets over images
            return len(some) / len(targets)
        return self.loss.weight[some].sum() / self.loss.weight[targets].sum()


def _optimizer(model: Classifier, config: TrialConfig, *, fused: bool) -> torch.optim.Optimizer:
    groups = optimizer_groups(model, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=fused)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return kind(groups, lr=config.lr, fused=fused)


def _mixer(config: TrialConfig, classes: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """Mixup and cutmix on a batch of normalised images; one of them at random where both are on."""
    mixes: list[nn.Module] = []
    if config.mixup:
        mixes.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix:
        mixes.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
    return v2.RandomChoice(mixes) if mixes else None


def _labels(split: Split) -> np.ndarray:
    """(N,) class indices of a split that has them."""
    assert split.labels is not None, f"{split.name} has no labels"
    return split.labels


def _class_weights(splits: Splits) -> torch.Tensor:
    """(C,) inverse class frequencies of train, with mean 1 over the images."""
    counts = np.bincount(_labels(splits.train), minlength=len(splits.classes))
    return torch.tensor(counts.sum() / (len(counts) * np.maximum(counts, 1)), dtype=torch.float32)

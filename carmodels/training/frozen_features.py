"""Training on stored features: while the backbone is frozen, an epoch needs only its pooled outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import timm
import torch

from carmodels.catalog import AUGMENTS
from carmodels.data.cache import CACHE_VERSION
from carmodels.data.dataset import Splits
from carmodels.data.loader import Loader
from carmodels.models.classifier import Classifier
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig
from carmodels.training.features import VIEWS_KEPT, FeatureStore
from carmodels.training.forward import autocast, precision
from carmodels.training.memory import PartwiseForward, try_twice


@dataclass(frozen=True, eq=False)
class FrozenFeatures:
    """A frozen backbone's features (B, F) of train and val. What the store lacks is computed and stored.

    A training image has `VIEWS_KEPT` random views, which the epochs use in turn. A val image has its plain
    view.
    """

    store: FeatureStore
    config: TrialConfig
    weights: Weights  # those of the backbone
    splits: Splits
    model: Classifier
    processes: int  # of loaders

    def train_batches(
        self, epoch: int, orders: Sequence[np.ndarray]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Features and labels (B,), one batch for each of `orders`: positions in train."""
        view, train = (epoch - 1) % VIEWS_KEPT, self.splits.train
        loader = Loader(
            self.splits.images,
            train,
            image_size=self.config.image_size,
            batch_size=2 * self.config.batch_size,
            augment=AUGMENTS[self.config.augment],
            processes=self.processes,
        )
        content = {
            **self._content,
            "image_size": self.config.image_size,
            "augment": asdict(AUGMENTS[self.config.augment]),
            "view": view,
        }
        stored = self.store.get(content, len(train), lambda: self._compute(loader, view))
        images = torch.from_numpy(np.array(stored))
        features = try_twice(lambda: images.to(self._device))  # in one transfer
        assert train.labels is not None
        labels = torch.from_numpy(train.labels).to(self._device)
        for order in orders:
            rows = torch.from_numpy(order).to(self._device)
            yield features[rows].float(), labels[rows]

    def val(self, loader: Loader) -> torch.Tensor:
        """Features (N, F) of val, whose images the loader gives in order."""
        content = {**self._content, "image_size": self.config.eval_size, "part": "val"}
        stored = self.store.get(content, len(self.splits.val), lambda: self._compute(loader, 0))
        return torch.from_numpy(stored.astype(np.float32)).to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.model.scale.device

    @cached_property
    def _content(self) -> dict[str, Any]:
        """What the features of any split depend on; lazy, as it hashes the file of weights."""
        return {
            "backbone": self.config.backbone,
            "weights": self.weights.identity(self.config.backbone),
            "data": self.splits.fingerprint,
            "split": self.splits.split_hash,
            "decoded": self.splits.open_arguments.max_size,
            "cache": CACHE_VERSION,
            "timm": timm.__version__,
            "device": self._device.type,
            "precision": str(precision(self._device)),
        }

    @cached_property
    def _forward(self) -> PartwiseForward:
        return PartwiseForward(lambda images: self.model.backbone(self.model.normalise(images)))

    @torch.inference_mode()
    def _compute(self, loader: Loader, epoch: int) -> np.ndarray:
        """(N, F) features of all images of an unshuffled loader."""
        mixed = autocast(self._device)
        features: list[torch.Tensor] = []
        for batch in loader.epoch(epoch):
            with mixed():
                features.append(self._forward(batch.images.to(self._device, non_blocking=True)).float())
        return torch.cat(features).cpu().numpy()

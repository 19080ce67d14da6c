"""A run: a configuration (`TrialConfig`) and an `Origin`. Its id names the files it writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from carmodels.training.config import METRIC_NAMES, TrialConfig, check_option

_MAX_SEED, _MAX_FOLDS = 2**31 - 1, 100


@dataclass(frozen=True)
class Origin:
    """A run's data, split, seeds and starting weights. Raises ValueError for values that do not fit."""

    metric: str = "accuracy"  # selects the epoch whose weights are kept
    seed: int = 0  # of shuffling, augmentation, dropout and the folds
    data: str = ""  # fingerprint of the data set
    split: str = ""  # hash of the split
    folds: int = 0  # K of K-fold cross-validation over train and val; 0: the study's train and val
    fold: int | None = None  # the held-out fold; None: all K models together
    fold_in: bool = False  # trains on all labelled images, holdout included: nothing is left to score it
    head_seed: int | None = None  # of the head's initial weights; None: `seed`
    continues: str = ""  # trial_id of the run whose weights it starts from; "": pretrained backbone, new head

    def __post_init__(self) -> None:
        check_option("metric", self.metric, METRIC_NAMES)
        for name, maximum in (("seed", _MAX_SEED), ("folds", _MAX_FOLDS)):
            _check_integer(name, getattr(self, name), maximum)
        if self.head_seed is not None:
            _check_integer("head_seed", self.head_seed, _MAX_SEED)
        if self.folds == 1 or self.fold not in (None, *range(self.folds)):
            raise ValueError(
                f"fold={self.fold} of folds={self.folds}: there must be 2 folds or more, the first is fold 0"
            )
        if self.folds and self.fold_in:
            raise ValueError(f"folds={self.folds}: with fold_in nothing is held out; leave one of them out")
        if self.keeps_last_epoch and self.continues:
            raise ValueError(
                f"continues={self.continues!r}: that run has learnt from what is held out here, or was "
                "chosen by it; leave it out with folds and fold_in"
            )

    @property
    def keeps_last_epoch(self) -> bool:
        """Whether the last epoch is kept, because held-out images must not influence selection."""
        return self.folds > 0 or self.fold_in

    @property
    def init_seed(self) -> int:
        """The seed of the head's initial weights."""
        return self.seed if self.head_seed is None else self.head_seed

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Origin:
        """Raises ValueError for a key that is no field."""
        for name in values:
            check_option("origin key", name, tuple(f.name for f in fields(cls)))
        return cls(**values)


@dataclass(frozen=True)
class Run:
    """Everything that determines a trained model. Raises ValueError for parts that do not fit together."""

    config: TrialConfig
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        if self.origin.keeps_last_epoch and self.config.patience:
            raise ValueError(
                f"patience={self.config.patience}: what is held out must not end training; leave it out with "
                "folds"
            )

    @property
    def id(self) -> str:
        """12 hex digits of a hash of the content. The name of the run's files."""
        content = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """The configuration's title, for display."""
        return self.config.title

    def with_config(self, **changes: Any) -> Run:
        """The run with other hyperparameters."""
        return replace(self, config=replace(self.config, **changes))

    def with_origin(self, **changes: Any) -> Run:
        """The run with another seed, fold or start."""
        return replace(self, origin=replace(self.origin, **changes))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The fields in JSON's types, under `config` and `origin`. Ray passes this to a worker."""
        return {"config": asdict(self.config), "origin": asdict(self.origin)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> Run:
        """The inverse of `to_dict`. Raises ValueError for a key that is no field."""
        return cls(TrialConfig.from_dict(values["config"]), Origin.from_dict(values["origin"]))


def _check_integer(name: str, value: object, maximum: int) -> None:
    if not isinstance(value, int) or not 0 <= value <= maximum:
        raise ValueError(f"{name}={value!r} must be a whole number from 0 to {maximum}")

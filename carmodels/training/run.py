"""A run: a configuration and where it comes from (`Origin`). Its id names every file it leaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from carmodels.training.config import METRIC_NAMES, TrialConfig, check_member

_MOST_SEED, _MOST_FOLDS = 2**31 - 1, 100


@dataclass(frozen=True)
class Origin:
    """Data, split, seeds and start of a run. Checked when made (ValueError)."""

    metric: str = "accuracy"  # chooses the epoch whose weights are kept
    seed: int = 0  # of shuffling and augmentation; also of the head's first weights, without `head_seed`
    data: str = ""  # fingerprint of the data set
    split: str = ""  # hash of the split
    folds: int = 0  # into which `seed` cuts train and val together; 0: the study's own train and val
    fold: int | None = None  # the one that is held out; None: the models of all folds together
    fold_in: bool = False  # learns from all labelled images, holdout too, so that none is left to score it
    head_seed: int | None = None  # of the head's first weights; None: `seed`
    continues: str = (
        ""  # trial_id of the run whose weights it starts from; empty: pretrained ones, a new head
    )

    def __post_init__(self) -> None:
        check_member("metric", self.metric, METRIC_NAMES)
        for name, most in (("seed", _MOST_SEED), ("folds", _MOST_FOLDS)):
            _check_whole(name, getattr(self, name), most)
        if self.head_seed is not None:
            _check_whole("head_seed", self.head_seed, _MOST_SEED)
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
        """Whether the last epoch is kept, so that the held-out images never influence selection."""
        return self.folds > 0 or self.fold_in

    @property
    def init_seed(self) -> int:
        """The seed of the head's first weights."""
        return self.seed if self.head_seed is None else self.head_seed


@dataclass(frozen=True)
class Run:
    """All that decides a run's weights. Checked when made (ValueError)."""

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
        """12 hex digits of the content: equal for equal runs, and the name of every file a run leaves."""
        content = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """Short name for people: backbone, size, head and strategy."""
        return self.config.title

    def with_config(self, **changes: Any) -> Run:
        """The run with other hyperparameters."""
        return replace(self, config=replace(self.config, **changes))

    def with_origin(self, **changes: Any) -> Run:
        """The run from elsewhere: another seed, fold or start."""
        return replace(self, origin=replace(self.origin, **changes))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The fields in JSON's types, under `config` and `origin`: what Ray hands to a worker."""
        return {"config": asdict(self.config), "origin": asdict(self.origin)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> Run:
        """What `to_dict` gave. Raises ValueError for a key that is no field."""
        return cls(TrialConfig.from_dict(values["config"]), origin_from_dict(values["origin"]))


def origin_from_dict(values: Mapping[str, Any]) -> Origin:
    """Raises ValueError for a key that is no field."""
    known = tuple(f.name for f in fields(Origin))
    for name in values:
        check_member("origin key", name, known)
    return Origin(**values)


def _check_whole(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{name}={value!r} must be a whole number from 0 to {most}")

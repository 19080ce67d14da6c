"""Outputs of a frozen backbone are computed once, shared, and change nothing but the time a trial takes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from carmodels.data.dataset import Splits
from carmodels.models.weights import Weights
from carmodels.training import frozen_features
from carmodels.training.config import TrialConfig
from carmodels.training.features import VIEWS_KEPT, FeatureStore
from carmodels.training.run import Origin, Run
from carmodels.training.trainer import Trainer, fit


def counted(calls: list[int], value: float = 1.0) -> np.ndarray:
    calls.append(1)
    return np.full((3, 2), value, np.float32)


def files(store: FeatureStore) -> dict[str, float]:
    return {p.name: p.stat().st_size for p in store.folder.glob("*.npy")}


def test_what_is_stored_is_not_computed_again(tmp_path: Path) -> None:
    store, calls = FeatureStore(tmp_path), []
    for _ in range(3):
        found = store.get({"backbone": "a"}, 3, lambda: counted(calls))
    assert len(calls) == 1
    assert (found.dtype, found.shape) == (np.float16, (3, 2))
    store.get({"backbone": "b"}, 3, lambda: counted(calls))
    assert len(calls) == 2


@pytest.mark.parametrize("kept", [0, 10, 100, 138])
def test_a_file_cut_short_is_computed_again(tmp_path: Path, kept: int) -> None:
    store, calls = FeatureStore(tmp_path), []
    store.get({}, 3, lambda: counted(calls))
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:kept])
    np.testing.assert_array_equal(store.get({}, 3, lambda: counted(calls)), np.ones((3, 2)))
    assert len(calls) == 2


def test_the_folder_stays_within_its_limit_and_what_was_read_last_stays(tmp_path: Path) -> None:
    store, calls = FeatureStore(tmp_path, max_bytes=300), []
    for number, name in enumerate("ab"):
        store.get({"n": name}, 3, lambda: counted(calls))
        for path in tmp_path.glob("*.npy"):
            if path.stat().st_mtime > 1e9:
                os.utime(path, (number, number))
    store.get({"n": "a"}, 3, lambda: counted(calls))  # read again: now the newest
    store.get({"n": "c"}, 3, lambda: counted(calls))
    assert len(files(store)) == 2
    store.get({"n": "a"}, 3, lambda: counted(calls))
    assert len(calls) == 3
    store.get({"n": "b"}, 3, lambda: counted(calls))
    assert len(calls) == 4


def test_a_trial_gets_the_same_numbers_whether_it_fills_the_store_or_finds_it_full(
    config: TrialConfig, splits: Splits, weights: Weights, tmp_path: Path
) -> None:
    config = replace(config, unfreeze="head_first", epochs=4, head_depth=1, ema=0.9)
    first, again, other = (
        fit(Run(config), splits, weights=weights, features=FeatureStore(tmp_path / name)) for name in "aab"
    )
    values = [[(m.train_loss, m.val_loss, m.value) for m in f.history] for f in (first, again, other)]
    assert values[0] == values[1] == values[2]
    for one, two in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert len(files(FeatureStore(tmp_path / "a"))) == 2 + 1  # two head-only epochs, and val


def test_a_frozen_trial_needs_its_views_once_and_a_new_seed_shares_them(
    config: TrialConfig, splits: Splits, weights: Weights, tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path)
    frozen = replace(config, unfreeze="frozen", epochs=VIEWS_KEPT + 2)
    fit(Run(frozen), splits, weights=weights, features=store)
    before = files(store)
    assert len(before) == VIEWS_KEPT + 1
    other = Run(replace(frozen, lr=1e-3, head_depth=2), Origin(seed=1))
    fit(other, splits, weights=weights, features=store)
    assert files(store) == before
    fit(Run(replace(frozen, image_size=48)), splits, weights=weights, features=store)
    fit(Run(replace(frozen, augment="shift")), splits, weights=weights, features=store)
    # another size shares nothing, another augmentation the plain view of val
    assert len(files(store)) == len(before) + (VIEWS_KEPT + 1) + VIEWS_KEPT


@pytest.mark.parametrize(
    ("place", "name", "other"),
    [
        (frozen_features, "CACHE_VERSION", -1),
        (timm, "__version__", "0.0"),
        (frozen_features, "precision", lambda device: torch.bfloat16),
    ],
    ids=["the image cache's version", "timm's version", "the precision"],
)
def test_what_the_images_or_the_network_depend_on_makes_other_features(
    place: Any,
    name: str,
    other: Any,
    config: TrialConfig,
    splits: Splits,
    weights: Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, run = FeatureStore(tmp_path), Run(replace(config, unfreeze="frozen", epochs=1))
    fit(run, splits, weights=weights, features=store)
    before = files(store)
    monkeypatch.setattr(place, name, other)
    fit(run, splits, weights=weights, features=store)
    assert len(files(store)) == 2 * len(before)


def test_the_first_view_gives_what_the_frozen_backbone_gives(
    config: TrialConfig, splits: Splits, weights: Weights, tmp_path: Path
) -> None:
    trainer = Trainer(
        Run(replace(config, unfreeze="frozen", augment="none")),
        splits,
        weights=weights,
        device=torch.device("cpu"),
        features=FeatureStore(tmp_path),
    )
    trainer.model.unfreeze_top(0)
    trainer.model.train()
    batches = trainer.features.train_batches(1, trainer.train_loader.batch_positions(1))
    stored = torch.cat([features for features, _ in batches])
    with torch.inference_mode():
        computed = torch.cat(
            [
                trainer.model.backbone(trainer.model.normalise(images))
                for images, _ in trainer.train_batches(1)
            ]
        )
    torch.testing.assert_close(stored, computed, rtol=2e-3, atol=2e-3)  # float16 on disk


@pytest.mark.parametrize("change", [{"mixup": 0.2, "unfreeze": "frozen"}, {"unfreeze": "full"}], ids=str)
def test_where_images_are_needed_nothing_is_stored(
    change: dict[str, Any], config: TrialConfig, splits: Splits, weights: Weights, tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path)
    fit(Run(replace(config, **change)), splits, weights=weights, features=store)
    assert not files(store)


def test_random_weights_are_not_shared(config: TrialConfig, splits: Splits, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    fit(Run(replace(config, unfreeze="frozen")), splits, weights=Weights("none"), features=store)
    assert not files(store)

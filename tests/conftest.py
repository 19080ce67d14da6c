"""Data and helpers that several tests share: a small drawn data set in the competition's layout."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import pytest
import torch

from carmodels import demo
from carmodels.data import Splits, open_dataset
from carmodels.models import Weights
from carmodels.space import TrialConfig

DEMO_WEIGHTS = Path(demo.__file__).with_name("weights")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a drawn data set: 200 labelled pictures, 20 to classify."""
    folder = tmp_path_factory.mktemp("drawn") / "cars"
    demo.draw_demo(folder, seed=1, train=200, test=20)
    return folder


@pytest.fixture(scope="session")
def splits(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """The drawn data set, ready to learn from at up to 48 px."""
    return open_dataset(drawn, cache_dir=tmp_path_factory.mktemp("cache"), max_size=48)


@pytest.fixture(scope="session")
def weights() -> Weights:
    """The small weights that come with the project."""
    return Weights.parse(str(DEMO_WEIGHTS))


@pytest.fixture
def config() -> TrialConfig:
    """A configuration that trains in about a second."""
    return TrialConfig(backbone="test_resnet", image_size=32, epochs=2, lr=3e-3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As in a worker, and so that numbers can be compared to the bit."""
    torch.set_num_threads(1)

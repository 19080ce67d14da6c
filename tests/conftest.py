"""Data and helpers that several tests share: a small drawn data set in the competition's layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture
def browser() -> Iterator[Any]:
    """A Chromium that notes errors and requests; the test is skipped where there is none."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1440,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As in a worker, and so that numbers can be compared to the bit."""
    torch.set_num_threads(1)

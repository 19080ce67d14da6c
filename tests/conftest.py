"""Data and helpers that several tests share: a small drawn data set in the competition's layout."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from carmodels.demo.folder import DEMO_WEIGHTS, draw_demo

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import pytest
import ray
import torch
from threadpoolctl import threadpool_limits

from carmodels.data.dataset import Splits, open_dataset
from carmodels.models.weights import Weights
from carmodels.training.config import TrialConfig
from tune.runtime.cluster import start_ray

from skips import pytest_addoption, pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use `browser` or `own_ray` have the marker; the latter run last, as they share a Ray.

    While it runs, a search that a test starts would find it.
    """
    used = {item: getattr(item, "fixturenames", ()) for item in items}
    for item, names in used.items():
        for name, marker in (("browser", "browser"), ("own_ray", "ray")):
            if name in names:
                item.add_marker(marker)
    items.sort(key=lambda item: "own_ray" in used[item])


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a drawn data set: 200 labelled images, 20 to classify."""
    folder = tmp_path_factory.mktemp("drawn") / "cars"
    draw_demo(folder, seed=1, train=200, test=20)
    return folder


@pytest.fixture(scope="session")
def splits(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """The drawn data set, ready to learn from at up to 48 px."""
    return open_dataset(drawn, cache_dir=tmp_path_factory.mktemp("cache"), max_size=48)


@pytest.fixture(scope="session")
def weights() -> Weights:
    """The small weights that come with the project."""
    return Weights.parse(str(DEMO_WEIGHTS))


@pytest.fixture(scope="session")
def own_ray() -> Iterator[str]:
    """The dashboard's address of a Ray in this process, with two cores, started as for a search."""
    yield start_ray(address=None, cores=2, gpus=0)
    ray.shutdown()


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


@pytest.fixture
def open_page(browser: Any) -> Callable[..., None]:
    """Opens a page from disk in `browser`: all charts are drawn, no error, no request, nothing too wide."""
    from selenium.webdriver.support.ui import WebDriverWait

    def drawn(count: int) -> bool:
        return len(browser.find_elements("css selector", ".chart svg.marks")) == count

    def opened(page: Path, *, charts: int, width: int = 1440, scheme: str = "light") -> None:
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        screen = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(page.as_uri())
        WebDriverWait(browser, 100).until(lambda _: drawn(charts))
        assert not browser.get_log("browser")
        asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        urls = {m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"}
        assert page.as_uri() in urls
        assert all(url.startswith(("file:", "data:", "blob:")) for url in urls)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")

    return opened


@pytest.fixture
def light_collections() -> Iterator[None]:
    """Leaves what all modules hold out of garbage collections, of which a trial asks for several."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """Linear algebra on one thread: on small matrices two take three times as long."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As in a worker, and so that numbers can be compared to the bit."""
    torch.set_num_threads(1)

"""What a run exports: the gauges of a trial, the reasons of its end, and all of it in a real Prometheus."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.util.metrics import Counter, Gauge

from carmodels.records import Cause, State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run
from tune.budget.clock import Clock
from tune.monitor.prometheus import SERIES, exported, reason_tag
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.recorder import Recorder
from tune.runtime.worker import trial_name

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "tune" / "monitor"
Seen = list[tuple[str, float, dict[str, str]]]


def record(
    run: Run,
    state: State,
    value: float | None,
    *,
    epochs_run: int = 2,
    cause: Cause | None = None,
    ending: str = "",
) -> TrialRecord:
    """A trial that ended; `ending`: of the last epoch of its curve."""
    last = EpochMetrics(epochs_run, 1.0, 1.0, 0.5, 0.5, 3.0, ending)
    return TrialRecord(
        run.id,
        run.config,
        state,
        epochs_run,
        value,
        3.0,
        "a sentence for people",
        cause=cause,
        cut_short=ending == "time",
        origin=run.origin,
        curve=(last,),
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every value that a series is set to, as it happens."""
    found: Seen = []
    for kind, method in ((Gauge, "set"), (Counter, "inc")):
        monkeypatch.setattr(kind, method, lambda self, v, tags: found.append((self.info["name"], v, tags)))
    return found


def images(run: Run) -> int:
    return 70 if run.origin.folds else 140


def recorder(tmp_path: Path) -> Recorder:
    return Recorder(Study(tmp_path), "search", 0.0, {}, ProgressCallback())


def last(seen: Seen) -> dict[str, float]:
    return {name: value for name, value, _ in seen}


def test_an_epoch_sets_the_gauges_of_its_trial_by_a_readable_name(config: TrialConfig, seen: Seen) -> None:
    run = Run(config)
    watch = exported("cars", "accuracy", images=images, clock=Clock(time.time(), 60))
    watch.on_epoch("search", run, EpochMetrics(2, 1.0, 1.0, 0.5, 0.6, 4.0), 2**30)
    assert last(seen) == {
        "carmodels_value": 0.6,
        "carmodels_epoch": 2,
        "carmodels_epochs_per_second": 0.25,
        "carmodels_images_per_second": 35.0,
        "carmodels_gpu_bytes": 2**30,
    }
    for name, _, tags in seen:
        assert set(tags) == set(SERIES[name][2])
        assert tags["trial"] == trial_name(run) == f"test_resnet-32px-full-{run.id}"
        assert (tags["backbone"], tags["image_size"], tags["strategy"]) == ("test_resnet", "32", "full")


def test_a_fold_learns_from_as_many_images_as_are_in_the_others(config: TrialConfig, seen: Seen) -> None:
    watch = exported("cars", "accuracy", images=images, clock=Clock(time.time(), 60))
    fold = Run(config, Origin(folds=2, fold=1))
    watch.on_epoch("fold", fold, EpochMetrics(2, 1.0, 1.0, 0.5, 0.6, 4.0), 2**30)
    assert last(seen)["carmodels_images_per_second"] == 17.5


def test_a_trial_that_trains_slowly_is_set_again_at_every_step_and_one_that_ended_is_not(
    config: TrialConfig, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune.monitor.prometheus.REFRESH_SECONDS", 0.0)
    watch = exported("cars", "accuracy", images=images, clock=Clock(time.time()))
    slow, done = Run(config), Run(config, Origin(seed=1))
    for each in (slow, done):
        watch.on_epoch("search", each, EpochMetrics(1, 1.0, 1.0, 0.5, 0.6, 4.0), 0)
    seen.clear()
    watch.on_record(record(done, State.PRUNED, 0.6))
    assert {n: v for n, v, t in seen if t.get("trial") == trial_name(done)} == {
        "carmodels_epochs_per_second": 0.0,
        "carmodels_images_per_second": 0.0,
        "carmodels_gpu_bytes": 0.0,
    }
    seen.clear()
    watch.on_step(recorder(tmp_path))
    assert {t["trial"] for _, _, t in seen if "trial" in t} == {trial_name(slow)}
    assert "carmodels_seconds_left" not in last(seen)  # nothing bounds the time


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 0.8), ("log_loss", 0.3)])
def test_the_best_is_that_of_complete_trials_those_of_an_earlier_run_among_them(
    config: TrialConfig, seen: Seen, metric: str, best: float
) -> None:
    run = Run(config)
    earlier = [record(run, State.COMPLETE, value) for value in (0.3, 0.7)]
    watch = exported("cars", metric, images=images, clock=Clock(time.time()), records=earlier)
    for value, state in ((0.8, State.COMPLETE), (0.5, State.COMPLETE), (0.99, State.PRUNED)):
        watch.on_record(record(run, state, value))
    watch.on_record(record(run, State.OUT_OF_TIME, 0.01))
    assert last(seen)["carmodels_best"] == best


def test_a_loss_that_is_not_finite_is_not_exported(config: TrialConfig, seen: Seen) -> None:
    watch = exported("cars", "log_loss", images=images, clock=Clock(time.time()))
    watch.on_epoch("search", Run(config), EpochMetrics(1, 1.0, float("nan"), 0.1, float("nan"), 1.0), 0)
    assert "carmodels_value" not in last(seen)
    assert last(seen)["carmodels_epoch"] == 1


@pytest.mark.parametrize(
    ("state", "more", "tag"),
    [
        (State.PRUNED, {"epochs_run": 4}, "rung at epoch 4"),
        (State.OUT_OF_TIME, {}, "time"),
        (State.COMPLETE, {"ending": "time"}, "time"),
        (State.COMPLETE, {"ending": "patience"}, "patience"),
        (State.COMPLETE, {"ending": "schedule"}, "schedule"),
        (State.INTERRUPTED, {}, "interrupted"),
        (State.FAILED, {"cause": Cause.DIVERGED, "ending": "diverged"}, "diverged"),
        (State.FAILED, {"cause": Cause.OUT_OF_MEMORY}, "out_of_memory"),
        (State.FAILED, {"cause": Cause.MACHINE}, "machine"),
        (State.FAILED, {"cause": Cause.ERROR}, "error"),
    ],
)
def test_reasons_are_few(config: TrialConfig, state: State, more: dict[str, Any], tag: str) -> None:
    assert reason_tag(record(Run(config), state, 0.5, **more)) == tag


def expressions() -> list[str]:
    """Every query of the Grafana dashboard, over all studies."""
    board = json.loads((MONITORING / "grafana.json").read_text(encoding="utf-8"))
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [expr.replace("$study", ".*") for expr in found]


def prometheus_name(name: str) -> str:
    return f"ray_{name}_total" if SERIES[name][0] is Counter else f"ray_{name}"


def test_the_dashboard_shows_every_series_and_no_other() -> None:
    asked = {name for expr in expressions() for name in re.findall(r"ray_carmodels_\w+", expr)}
    assert asked == {prometheus_name(name) for name in SERIES}


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """A folder for Ray with a path short enough for its sockets."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Searching:
    """A search that goes on for long."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def study(self) -> Study:
        return Study(self.folder / "results" / "cars")

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    @property
    def goes_on(self) -> bool:
        return self.process.poll() is None


@pytest.fixture(scope="module")
def searching(drawn: Path, ray_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searching]:
    folder = tmp_path_factory.mktemp("searching")
    options = {
        "--data": drawn,
        "--weights": ROOT / "carmodels" / "demo" / "weights",
        "--cache": folder / "cache",
        "--results": folder / "results",
        "--study": "cars",
        "--preset": "demo",
        "--trials": 500,
        "--until": "search",
    }
    given = [str(part) for option in options.items() for part in option]
    with (folder / "said.txt").open("wb") as said:
        process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tune" / "search.py"),
                *given,
                "--set",
                "image_size=32",
                "--set",
                "epochs=12",
            ],
            cwd=folder,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_TMPDIR": str(ray_folder), "RAY_metrics_report_interval_ms": "1000"},
        )
    yield Searching(folder, process)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=100)


@pytest.fixture
def prometheus(tmp_path: Path, ray_folder: Path) -> Iterator[str]:
    """The address of a Prometheus with the project's configuration, that looks where this test's Ray is."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    text = (MONITORING / "prometheus.yml").read_text(encoding="utf-8")
    assert text.count("/tmp/ray/") == 1
    file = tmp_path / "prometheus.yml"
    file.write_text(
        text.replace("/tmp/ray/", f"{ray_folder}/ray/").replace("scrape_interval: 5s", "scrape_interval: 1s")
    )
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            program,
            f"--config.file={file}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield address
    process.terminate()
    process.wait(timeout=30)


def asked(address: str, expression: str) -> list[dict[str, Any]]:
    """The series that an instant query finds; none while Prometheus starts."""
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{query}", timeout=10) as answer:
            found = json.load(answer)
    except OSError as error:
        if getattr(error, "code", 0) == 400:  # no valid query
            raise
        return []
    return list(found["data"]["result"])


@pytest.mark.ray
@pytest.mark.server
def test_a_real_prometheus_scrapes_a_running_search(prometheus: str, searching: Searching) -> None:
    wanted = [e for e in expressions() if not e.endswith("> 0")]  # the memory of GPUs that may not be there
    series = [prometheus_name(name) for name in SERIES if name != "carmodels_seconds_left"]
    wanted = [e for e in wanted if "seconds_left" not in e] + series  # only --trials bounds this search
    deadline = time.time() + 200
    while wanted and time.time() < deadline and searching.goes_on:
        time.sleep(0.5)
        wanted = [expression for expression in wanted if not asked(prometheus, expression)]
    assert not wanted, searching.said
    values = asked(prometheus, "last_over_time(ray_carmodels_value[10m])")
    assert {v["metric"]["study"] for v in values} == {"cars"}
    names = {trial_name(r.run) for r in searching.study.records()}
    assert names & {v["metric"]["trial"] for v in values}
    reasons = {v["metric"]["reason"] for v in asked(prometheus, "ray_carmodels_ended_total")}
    assert "schedule" in reasons
    assert "\x1b" not in searching.said


def dashboard_of(searching: Searching) -> str:
    """The address that a search prints."""
    deadline = time.time() + 200
    while time.time() < deadline and searching.goes_on:
        if found := re.search(r"Ray dashboard: (http://127\.0\.0\.1:\d+)", searching.said):
            return found.group(1)
        time.sleep(0.2)
    raise AssertionError(searching.said)


@pytest.mark.ray
@pytest.mark.server
def test_rays_dashboard_asks_for_the_token_and_shows_the_running_trials_by_name(
    browser: Any, searching: Searching
) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    study, wait = searching.study, WebDriverWait(browser, 100)
    browser.get(f"{dashboard_of(searching)}/#/cluster")
    asks = wait.until(lambda b: b.find_element("css selector", "[role=dialog] input"))
    token = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    asks.send_keys(token.stdout.strip())
    [button] = [b for b in browser.find_elements("css selector", "[role=dialog] button") if b.text]
    button.click()

    def seen(driver: Any) -> bool:
        shown = set(re.findall(r"ray::(\S+px-\S+)", driver.find_element("css selector", "body").text))
        return bool(shown) and shown <= {trial_name(record.run) for record in study.records()}

    wait.until(seen)

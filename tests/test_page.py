"""The report says what the study holds, stays small, and opens without a network, in a browser too."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from carmodels.predictions import Predictions
from carmodels.space import SPACES, EpochMetrics, TrialConfig, suggest
from carmodels.study import Status, Study, TrialRecord, read_json, write_json
from tune import charts
from tune.console import Screen
from tune.dimensions import CAVEAT, UNKNOWN, edges, importances
from tune.page import reliability, render, write_report
from tune.search import describe_space
from tune.stops import audited

ROOT = Path(__file__).parents[1]
SPACE = SPACES["demo"]
NAMES = ["sedan", "van", "pick<up>"]
EVIL = '</script><script>document.title = "broken"</script> & "quoted"'


def records(count: int) -> list[TrialRecord]:
    """Random configurations; every third one was stopped, one failed."""
    drawing = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        config = TrialConfig.from_dict({**suggest(drawing.ask(), SPACE), "seed": number})
        values = np.sort(rng.random(8 if number % 3 else 3)).tolist()
        curve = tuple(EpochMetrics(n, 1.0, 1.0, v, v, 2.0) for n, v in enumerate(values, start=1))
        status = Status.FINISHED if number % 3 else Status.STOPPED
        found.append(
            TrialRecord(
                config.id,
                config,
                status,
                len(curve),
                values[-1],
                2.0 * len(curve),
                "why",
                at=60.0 * number,
                curve=curve,
            )
        )
    broken = replace(found[0].config, seed=10_000)
    return [*found, TrialRecord(broken.id, broken, Status.FAILED, 0, None, 0.0, EVIL)]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return made(tmp_path / "a study", 40)


def made(folder: Path, count: int) -> Study:
    """A study with so many trials, an ensemble and its answers."""
    study = Study(folder)
    truth = np.arange(60) % 3
    ids = tuple(f"{n}.jpg" for n in range(60))
    facts = {
        "command": "python tune/search.py --data 'my <cars>'",
        "begun": "2026-01-01 12:00:00",
        "preset": "demo",
        "space": describe_space(SPACE),
        "seed": 0,
        "metric": "accuracy",
        "fingerprint": "abc",
        "split_hash": "def",
        "classes": ["0", "1", "2"],
        "class_names": NAMES,
        "excluded": [],
        "versions": {"torch": "2"},
        "hardware": {"device": "a CPU"},
    }
    rows = [(split, f"{i}", int(k)) for split in ("val", "audit") for i, k in zip(ids, truth, strict=True)]
    study.begin(facts, rows)
    trials = records(count)
    for record in trials:
        study.append(record)
    probs = np.full((60, 3), 0.1) + 0.7 * np.eye(3)[np.where(np.arange(60) < 50, truth, 0)]
    probs = (probs / probs.sum(1, keepdims=True)).astype(np.float32)
    Predictions(ids, ("0", "1", "2"), probs).save(study.predictions_file("ensemble", "audit"))
    best = (study.leaderboard() or trials)[0]
    interval = {"value": 0.9, "low": 0.85, "high": 0.94}
    write_json(
        study.ensemble_file,
        {
            "metric": "accuracy",
            "members": [
                {
                    "trial_id": best.trial_id,
                    "title": best.config.title,
                    "stage": "search",
                    "weight": 1.0,
                    "val": 0.9,
                }
            ],
            "temperature": 0.5,
            "tta": {"sentence": "kept flip"},
            "val": {"ensemble": 0.91, "single": {"trial_id": best.trial_id, "value": best.value}},
            "audit": {
                "ensemble": interval,
                "single": interval,
                "gain_over_recipe": {"value": 0.034, "low": -0.01, "high": 0.08},
                "pictures": 60,
                "looks": 1,
            },
            "submission": {"file": "submission.csv", "rows": 7},
            "hidden": {"value": 0.9, "low": 0.8, "high": 0.95, "pictures": 7},
        },
    )
    return study


def drawn(page: str) -> dict[str, Any]:
    """The charts in a page, by name."""
    names = re.findall(r'class="chart" id="(\w+)"', page)
    found = {}
    for name in names:
        start = page.index(f"{name}: {{", page.index("const charts"))
        found[name] = json.JSONDecoder().raw_decode(page, page.index("{", start + len(name)))[0]
    return found


def test_the_page_says_what_to_submit_what_it_is_worth_and_every_trial(study: Study) -> None:
    page = write_report(study).read_text()
    assert "<b>90.0 % (85.0 to 94.0)</b>accuracy of the ensemble on audit, 95 %" in page
    assert "<b>+3.4 (-1.0 to +8.0)</b>points over the competitor&#39;s recipe" in page
    assert "<b>90.0 % (80.0 to 95.0)</b>accuracy expected on the 7 hidden pictures, in 95 of 100" in page
    assert "Submit <code>submission.csv</code> (7 rows)" in page
    for record in study.records():
        assert record.trial_id in page
    assert set(drawn(page)) == {
        "curves",
        "progress",
        "parallel",
        "cost",
        "importance",
        "confusion",
        "calibration",
    }


def cells(page: str, name: str) -> list[list[str]]:
    """The rows of the table of this name, heading first, as text."""
    table = page[page.index(f'<table id="{name}">') :].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in table.split("<tr>")[1:]]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in rows]


def test_the_page_says_which_configurations_cannot_be_told_apart(study: Study) -> None:
    first = study.leaderboard()[0]
    for seed, less in ((1, 0.01), (2, 0.02)):
        config = replace(first.config, seed=first.config.seed + seed)
        rerun = replace(first, trial_id=config.id, config=config, value=first.value - less, stage="confirm")
        study.append(rerun)
    page = render(study)
    rows = cells(page, "standings")
    assert rows[1][:4] == [
        first.config.title,
        first.trial_id,
        "3",
        f"{100 * (first.value - 0.01):.1f} %",
    ]
    assert [row[-1] for row in rows[1:3]] == ["the best", "yes"]
    assert len(rows) == 1 + 4
    assert f"The best is {first.config.title} ({first.trial_id}), by 3 runs. Cannot be told apart" in page
    assert "Were the stops right?" not in page


def test_the_page_shows_what_became_of_the_stopped_trials_that_were_finished(study: Study) -> None:
    stopped = [r for r in study.records() if r.status is Status.STOPPED][:2]
    done = {
        r.trial_id: replace(r, value=v, curve=2 * r.curve) for r, v in zip(stopped, (0.3, 1.0), strict=True)
    }
    board = study.leaderboard()
    write_json(study.stops_file, audited(stopped, done, board, metric="accuracy", stopped=14))
    page = render(study)
    rows = cells(page, "stops")
    assert [row[-1] for row in rows[1:]] == ["right", "wrong"]
    assert rows[2][4:7] == ["100.0 %", f"{100 * (1 - board[0].value):+.1f}", "6"]
    assert "2 of them finished: 1 better than the best of the search (wrong stops; 95 %" in page


def test_without_test_pictures_there_is_nothing_to_submit(study: Study) -> None:
    results = read_json(study.ensemble_file)
    write_json(study.ensemble_file, {k: v for k, v in results.items() if k not in ("submission", "hidden")})
    page = render(study)
    assert "Submit" not in page
    assert "hidden pictures" not in page


def test_words_from_outside_do_not_become_part_of_the_page(study: Study) -> None:
    page = render(study)
    assert "<script>document.title" not in page
    assert "my &lt;cars&gt;" in page
    assert page.count("<script>") == page.count("</script>") == 2


def test_a_report_of_five_hundred_trials_stays_below_five_megabytes(tmp_path: Path) -> None:
    study = made(tmp_path / "large", 500)
    assert write_report(study).stat().st_size < 5_000_000


def test_a_study_without_an_ensemble_or_a_finished_trial_is_reported_as_far_as_it_went(
    tmp_path: Path,
) -> None:
    study = made(tmp_path / "young", 1)
    study.ensemble_file.unlink()
    assert set(drawn(render(study))) == {"curves"}
    study.trials_file.unlink()
    with pytest.raises(ValueError, match="has no trials yet"):
        render(study)


def edged(study: Study) -> list[TrialRecord]:
    """Adds five trials, the best there are, at the top of the learning rate; returns all records."""
    first = study.leaderboard()[0]
    for number in range(5):
        config = replace(first.config, lr=2e-2, seed=500 + number)
        study.append(replace(first, trial_id=config.id, config=config, value=0.999 + number / 10_000))
    return study.records()


def test_the_page_and_the_console_say_what_mattered_and_which_range_to_widen(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    records = edged(study)
    page = html.unescape(render(study))
    Screen().dimensions(study)
    lines = capsys.readouterr().out.splitlines()
    found = importances(records, SPACE, "accuracy")
    [edge] = [e for e in edges(records, SPACE, "accuracy") if e.name == "lr"]
    assert lines[0] == found.sentence
    assert lines[1].strip() == CAVEAT
    assert f"At the edge: {edge}; another study looks further with --set lr=0.0002:0.063" in lines
    assert f"<p>{found.sentence}</p>" in page
    assert CAVEAT in page
    assert f"<li>{edge}: <code>--set lr=0.0002:0.063</code></li>" in page
    [bars, ticks] = drawn(page)["importance"]["layer"]
    rows = next(iter(drawn(page)["importance"]["datasets"].values()))
    assert {r["dimension"]: (r["share"], r["chance"]) for r in rows} == {
        i.name: (i.share, i.chance) for i in found.dimensions
    }
    assert (bars["encoding"]["x"]["field"], ticks["encoding"]["x"]["field"]) == ("share", "chance")


def test_of_few_trials_the_page_and_the_console_say_that_they_are_too_few(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = made(tmp_path / "few", 12)
    words = "What mattered: 12 trials are too few to say; it takes 20."
    Screen().dimensions(study)
    assert capsys.readouterr().out.splitlines()[0] == words
    page = render(study)
    assert f"<p>{words}</p>" in page
    assert CAVEAT not in page
    assert "importance" not in drawn(page)


@pytest.mark.parametrize("change", [{"space": None}, {"space": {"dimensions": {"colour": {}}}}, {}])
def test_a_space_that_this_version_does_not_know_is_left_out_of_the_page(
    study: Study, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {name: value for name, value in study.facts.items() if name != "space"}
    write_json(study.folder / "study.json", {**facts, **change})
    page = render(study)
    assert f"<p>{UNKNOWN}</p>" in page
    assert "At the edge" not in page
    assert set(drawn(page)) == {"curves", "progress", "cost", "confusion", "calibration"}
    Screen().dimensions(study)
    assert capsys.readouterr().out == f"{UNKNOWN}\n"


def test_nothing_beats_what_is_on_the_pareto_front(study: Study) -> None:
    finished = study.leaderboard()
    front = charts.pareto(finished, "accuracy")
    for record in finished:
        beaten = any(f.value >= record.value and f.seconds <= record.seconds for f in front)
        assert beaten or record in front
    assert [f.value for f in front] == sorted(f.value for f in front)


def test_of_many_trials_the_finished_ones_are_drawn_first() -> None:
    many = records(300)
    shown = charts.thinned(many, 100)
    assert len(shown) == 100
    assert {r.status for r in shown} == {Status.FINISHED}
    assert len(charts.thinned(many, 250)) == 250
    assert charts.thinned(many, 1000) == sorted(many, key=lambda r: r.status is not Status.FINISHED)


def test_reliability_bins_hold_every_picture_once() -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(4), 500)
    labels = probs.argmax(1) * (np.arange(500) % 2)
    bins = reliability(probs, labels)
    assert sum(b["pictures"] for b in bins) == 500
    right = sum(b["pictures"] * b["right"] for b in bins) / 500
    assert right == pytest.approx((probs.argmax(1) == labels).mean())
    assert all(0.25 <= b["confidence"] <= 1 for b in bins)


def test_served_the_page_follows_the_study_on_loopback_alone(study: Study) -> None:
    command = [sys.executable, str(ROOT / "tune" / "report.py"), str(study.folder), "--serve", "--port", "0"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
            assert address is not None
            with urllib.request.urlopen(address.group(), timeout=60) as answer:
                first = answer.read().decode()
            more = replace(study.records()[1].config, seed=77)
            study.append(replace(study.records()[1], trial_id=more.id, config=more))
            with urllib.request.urlopen(address.group(), timeout=60) as answer:
                second = answer.read().decode()
        finally:
            server.terminate()
            server.communicate(timeout=60)
    assert 'http-equiv="refresh"' in first
    assert more.id not in first
    assert more.id in second


def test_a_port_without_a_server_is_refused(study: Study) -> None:
    command = [sys.executable, str(ROOT / "tune" / "report.py"), str(study.folder), "--port", "8000"]
    refused = subprocess.run(command, text=True, capture_output=True, check=False, timeout=100)
    assert refused.returncode == 2
    assert refused.stderr == "error: --port 8000 is for --serve; add that or leave it out\n"


# ---- in a browser, where there is one


def wait_for_charts(browser: Any, count: int) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(
        lambda b: len(b.find_elements("css selector", ".chart svg.marks")) == count
    )


@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_from_disk_and_asks_nothing_of_the_network(
    study: Study, browser: Any, width: int, scheme: str
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(write_report(study).as_uri())
    wait_for_charts(browser, 7)
    assert browser.title == "a study · accuracy"
    assert not browser.get_log("browser")
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"}
    assert all(url.startswith(("file:", "data:", "blob:")) for url in urls)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")


def test_the_table_sorts_and_filters_and_a_point_answers_to_the_mouse(study: Study, browser: Any) -> None:
    from selenium.webdriver import ActionChains

    browser.get(write_report(study).as_uri())
    wait_for_charts(browser, 7)

    def column(name: str) -> list[str]:
        heads = [
            h.text.split(" ▲")[0].split(" ▼")[0] for h in browser.find_elements("css selector", "#trials th")
        ]
        rows = browser.find_elements("css selector", "#trials tbody tr:not([hidden])")
        return [row.find_elements("css selector", "td")[heads.index(name)].text for row in rows]

    def click(name: str) -> None:
        [button] = [b for b in browser.find_elements("css selector", "#trials th button") if b.text == name]
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    click("seconds")
    seconds = [float(text) for text in column("seconds")]
    assert seconds == sorted(seconds)
    click("seconds")
    assert [float(text) for text in column("seconds")] == sorted(seconds, reverse=True)
    click("value")
    values = [float(text) for text in column("value") if text]
    assert values == sorted(values)
    box = browser.find_element("css selector", "#filter")
    box.send_keys("stopped test_resnet")
    assert set(column("status")) == {"stopped"}
    assert set(column("backbone")) == {"test_resnet"}
    assert browser.find_element("css selector", "#shown").text.endswith("of 41")
    dot = browser.find_elements("css selector", "#cost .mark-symbol path")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", dot)
    ActionChains(browser).move_to_element(dot).perform()
    tip = browser.find_element("css selector", "#vg-tooltip-element")
    assert "seconds" in tip.text

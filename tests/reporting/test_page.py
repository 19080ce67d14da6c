"""The report says what the study holds, stays small, and opens without a network, in a browser too."""

from __future__ import annotations

import html
import itertools
import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from carmodels.evaluation.calibration import with_temperature
from carmodels.evaluation.predictions import Predictions
from carmodels.files import read_json, write_json
from carmodels.formatting import duration
from carmodels.holdout import add_look
from carmodels.presets import SPACES
from carmodels.records import Cause, State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run
from tune import report
from tune.cli.options import guarded
from tune.cli.study_folder import describe_space
from tune.commands import run_report
from tune.finalize.stop_check import stops_summary
from tune.monitor.terminal import Screen
from tune.optim.optuna_records import suggest
from tune.reporting import charts
from tune.reporting.mistakes import found_mistakes
from tune.reporting.page import by_class, recall, reliability, render, write_report
from tune.reporting.thumbnails import overlay, thumbnail

ROOT = Path(__file__).parents[2]
SPACE = SPACES["demo"]
NAMES = ["sedan", "van", "pick<up>"]
EVIL = '</script><script>document.title = "broken"</script> & "quoted"'


def records(count: int) -> list[TrialRecord]:
    """Random configurations; every third one was pruned, one failed."""
    drawing = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        run = Run(TrialConfig.from_dict(suggest(drawing.ask(), SPACE)), Origin(seed=number))
        values = np.sort(rng.random(8 if number % 3 else 3)).tolist()
        curve = tuple(EpochMetrics(n, 1.0, 1.0, v, v, 2.0) for n, v in enumerate(values, start=1))
        state = State.COMPLETE if number % 3 else State.PRUNED
        found.append(
            TrialRecord(
                run.id,
                run.config,
                state,
                len(curve),
                values[-1],
                2.0 * len(curve),
                "why",
                at=60.0 * number,
                origin=run.origin,
                curve=curve,
            )
        )
    return [*found, failed(found[0].run.with_origin(seed=10_000), EVIL)]


def failed(run: Run, reason: str, cause: Cause = Cause.ERROR, at: float = 0.0) -> TrialRecord:
    return TrialRecord(
        run.id, run.config, State.FAILED, 0, None, 0.0, reason, cause=cause, at=at, origin=run.origin
    )


def rerun(record: TrialRecord, seed: int, **changes: Any) -> TrialRecord:
    """The same trial with another seed."""
    run = record.run.with_origin(seed=seed)
    return replace(record, trial_id=run.id, origin=run.origin, **changes)


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
    rows = [(split, f"{i}", int(k)) for split in ("val", "holdout") for i, k in zip(ids, truth, strict=True)]
    study.begin(facts, rows)
    trials = records(count)
    for record in trials:
        study.append(record)
    probs = np.full((60, 3), 0.1) + 0.7 * np.eye(3)[np.where(np.arange(60) < 50, truth, 0)]
    probs = (probs / probs.sum(1, keepdims=True)).astype(np.float32)
    for split in ("val", "holdout"):
        Predictions(ids, ("0", "1", "2"), probs).save(study.predictions_file("ensemble", split))
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
                    "gain": 0.0,
                    "val": 0.9,
                }
            ],
            "temperature": 0.5,
            "tta": {
                "views": ["plain"],
                "sentence": "kept flip",
                "tried": [
                    {
                        "views": ["plain", "flip"],
                        "val": 0.92,
                        "log_loss": 0.3,
                        "set_right": 2,
                        "set_wrong": 1,
                    },
                    {"views": ["plain", "flip", "larger"], "left_out": "it would take about 9 s"},
                ],
            },
            "val": {"ensemble": 0.91, "single": {"trial_id": best.trial_id, "value": best.value}},
            "holdout": {
                "ensemble": interval,
                "single": interval,
                "gain_over_baseline": {"value": 0.034, "low": -0.01, "high": 0.08},
                "images": 60,
                "looks": 1,
            },
            "submission": {"file": "submission.csv", "rows": 7},
            "hidden": {"value": 0.9, "low": 0.8, "high": 0.95, "images": 7},
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


def test_the_page_says_whether_the_ensemble_helps_and_what_it_costs(study: Study) -> None:
    results = read_json(study.ensemble_file)
    member = {**results["members"][0], "temperature": 1.25, "seconds_per_1000": 3.04}
    added = {
        "members": [member],
        "nested": {"sentence": "The ensemble is kept: 0.91 against 0.90"},
        "soups": [{"trial_id": "f" * 12, "title": "a soup", "of": ["a", "b"], "val": 0.915}],
        "cost": {"seconds_per_1000": 6.08},
    }
    write_json(study.ensemble_file, {**results, **added})
    page = " ".join(write_report(study).read_text().split())
    assert "The ensemble is kept: 0.91 against 0.90. All of it, with its views, takes a worker 6.1 s" in page
    assert "Weight soups tried: a soup of 2 (91.5 %)." in page
    assert "<th>temperature</th><th>s for 1,000</th>" in page
    assert "<td>1.25</td><td>3.0</td>" in page


def test_the_page_quotes_the_first_look_at_holdout_and_lists_the_others(study: Study) -> None:
    page = write_report(study).read_text()
    assert 'id="looks"' not in page
    results = read_json(study.ensemble_file)
    score = {"value": 0.97, "low": 0.95, "high": 0.99}
    for answer in ("ensemble", "student"):
        again = {
            **results,
            "holdout": {**results["holdout"], answer: score},
            "hidden": {**score, "images": 7},
        }
        add_look(study, answer, again)
    write_json(study.ensemble_file, again)
    page = " ".join(write_report(study).read_text().split())
    assert "90.0 % <small>(85.0 to 94.0)</small></b>accuracy of the ensemble on holdout<" in page
    assert "90.0 % <small>(80.0 to 95.0)</small></b>accuracy expected on the 7 hidden images<" in page
    assert "looked at 3 times. The scores above are those to quote, first look. What" in page
    assert [row[1:] for row in cells(page, "looks")[1:]] == [
        ["an ensemble", "90.0 % (85.0 to 94.0)"],
        ["an ensemble", "97.0 % (95.0 to 99.0)"],
        ["a student", "97.0 % (95.0 to 99.0)"],
    ]


def test_the_page_says_what_to_submit_what_it_is_worth_and_every_trial(study: Study) -> None:
    page = write_report(study).read_text()
    seconds = sum(r.seconds for r in study.records())
    for figure in (
        "90.0 % <small>(85.0 to 94.0)</small></b>accuracy of the ensemble on holdout<",
        "+3.4 <small>(-1.0 to +8.0)</small></b>points better than the baseline, on holdout<",
        "90.0 % <small>(80.0 to 95.0)</small></b>accuracy expected on the 7 hidden images<",
        f"{duration(seconds)}</b>of training in 41 trials<",
    ):
        assert f"<div><b>{figure}" in page
    assert "Submit <code>submission.csv</code> (7 rows)" in page
    assert cells(page, "views")[1:] == [
        ["plain, flip", "92.0 %", "0.3000", "2", "1"],
        ["plain, flip, larger", "left out: it would take about 9 s"],
    ]
    for record in study.records():
        assert record.trial_id in page
    assert set(drawn(page)) == {
        "curves",
        "progress",
        "parallel",
        "cost",
        "confusion",
        "recall",
        "calibration",
    }


def cells(page: str, name: str) -> list[list[str]]:
    """The rows of the table of this name, heading first, as text."""
    table = page[page.index(f'<table id="{name}"') :].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in table.split("<tr>")[1:]]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in rows]


def test_the_page_says_which_configurations_cannot_be_told_apart(study: Study) -> None:
    first = study.leaderboard()[0]
    for seed, less in ((1, 0.01), (2, 0.02)):
        study.append(rerun(first, first.origin.seed + seed, value=first.value - less, stage="confirm"))
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
    assert f"The best is {first.config.title} ({first.trial_id}), by 3 runs. Not clearly worse" in page
    assert "Were the stops right?" not in page


def test_the_page_shows_what_became_of_the_pruned_trials_that_were_finished(study: Study) -> None:
    pruned = [r for r in study.records() if r.state is State.PRUNED][:2]
    done = {
        r.trial_id: replace(r, value=v, curve=2 * r.curve) for r, v in zip(pruned, (0.3, 1.0), strict=True)
    }
    board = study.leaderboard()
    write_json(study.stops_file, stops_summary(pruned, done, board, metric="accuracy", stopped=14))
    page = render(study)
    rows = cells(page, "stops")
    assert [row[-1] for row in rows[1:]] == ["right", "wrong"]
    assert rows[2][4:7] == ["100.0 %", f"{100 * (1 - board[0].value):+.1f}", "6"]
    assert "2 of them finished: 1 better than the best of the search (wrong stops; 95 %" in page


def test_without_test_images_there_is_nothing_to_submit(study: Study) -> None:
    results = read_json(study.ensemble_file)
    write_json(study.ensemble_file, {k: v for k, v in results.items() if k not in ("submission", "hidden")})
    page = render(study)
    assert "Submit" not in page
    assert "hidden images" not in page


def test_the_image_that_was_left_out_is_named(study: Study) -> None:
    lost = {"id": "5.jpg", "path": "train/1/5.jpg", "reason": "the file is empty"}
    write_json(study.folder / "study.json", {**study.metadata, "excluded": [lost]})
    assert "the first is <code>train/1/5.jpg</code> (the file is empty)" in render(study)


def test_words_from_outside_do_not_become_part_of_the_page(study: Study) -> None:
    page = render(study)
    assert "<script>document.title" not in page
    assert "my &lt;cars&gt;" in page
    assert page.count("<script>") == page.count("</script>") == 2


def test_what_failed_is_told_by_reason_the_commonest_first(study: Study) -> None:
    first = study.leaderboard()[0]
    for number in range(5):
        run = first.run.with_origin(seed=700 + number)
        study.append(failed(run, "CUDA out of <memory>", Cause.OUT_OF_MEMORY, at=9e4))
    page = render(study)
    rows = [
        re.sub(r"<[^>]+>", "", row).split("\n")[0]
        for row in page[page.index('id="failures"') :].split("</table>")[0].split("<tr>")[2:]
    ]
    assert rows[0].startswith("5CUDA out of &lt;memory&gt;")
    assert "and 2 more" in page
    assert rows[1].startswith(f"1{html.escape(EVIL, quote=False)[:20]}")


def test_the_best_so_far_is_that_of_the_trials_that_had_ended(study: Study) -> None:
    board = study.leaderboard()
    ends = [replace(board[0], at=at) for at in (60.0, 120.0, 150.0, 210.0)]
    values = [replace(r, value=v) for r, v in zip(ends, (0.5, 0.4, 0.7, 0.6), strict=True)]
    assert searched(values, "accuracy") == [(1, 0.5), (2, 0.5), (2.5, 0.7), (3.5, 0.7)]
    assert searched(values, "log_loss") == [(1, 0.5), (2, 0.4), (2.5, 0.4), (3.5, 0.4)]


def searched(trials: list[TrialRecord], metric: str) -> list[tuple[float, float]]:
    """The points of the chart of the best so far."""
    rows = itertools.chain.from_iterable(charts.progress(trials, metric)["datasets"].values())
    return [(row["minutes"], row["value"]) for row in rows if "minutes" in row]


def test_the_baseline_is_a_rule_and_no_gain_of_the_search(study: Study) -> None:
    first, second = study.leaderboard()[:2]
    trials = [replace(first, at=60.0, value=0.9, baseline=True), replace(second, at=120.0, value=0.6)]
    assert searched(trials, "accuracy") == [(2, 0.6)]
    [line, rule] = charts.progress(trials, "accuracy")["layer"]
    assert (line["mark"]["type"], rule["mark"]["type"]) == ("line", "rule")
    compared = next(iter(charts.rivals({"a study": trials}, "accuracy")["datasets"].values()))
    assert {row["value"] for row in compared} == {0.6}
    assert searched(trials[:1], "accuracy") == []


def test_recall_counts_each_class_by_its_own_images() -> None:
    truth = np.repeat([0, 2], 4)
    probs = np.eye(3)[[0, 0, 0, 1, 0, 0, 2, 2]]
    rows = recall(probs, truth, ["a", "b", "c"], np.arange(8))
    assert [(r["name"], r["recall"], r["images"]) for r in rows] == [("c", 0.5, 4), ("a", 0.75, 4)]
    assert all(r["low"] < r["recall"] < r["high"] for r in rows)
    alike = recall(probs, truth, ["a", "b", "c"], np.repeat([0, 1, 2, 3], 2))
    assert all(wide["high"] > r["high"] for wide, r in zip(alike, rows, strict=True))


def test_calibration_is_shown_as_trained_and_with_all_temperatures(study: Study) -> None:
    results = read_json(study.ensemble_file)
    [member] = results["members"]
    trained = study.predictions("ensemble", "holdout")
    trained.save(study.predictions_file(member["trial_id"], "holdout"))
    tempered = with_temperature(trained, 2.0)
    tempered.save(study.predictions_file("ensemble", "holdout"))
    write_json(
        study.ensemble_file, {**results, "temperature": 1.0, "members": [{**member, "temperature": 2.0}]}
    )
    rows = [row for found in drawn(render(study))["calibration"]["datasets"].values() for row in found]
    sure = {row["when"]: row["confidence"] for row in rows if "when" in row}
    assert sure["as trained"] == pytest.approx(trained.probs.max(1).mean())
    assert sure["with temperatures"] == pytest.approx(tempered.probs.max(1).mean())
    study.predictions_file(member["trial_id"], "holdout").unlink()
    assert "as trained" not in render(study)


def test_of_many_classes_the_least_recognised_are_drawn() -> None:
    truth = np.repeat(np.arange(60), 4)
    told = np.where(truth % 2 == 0, truth, (truth + 2) % 60)
    parts = by_class(np.eye(60)[told], truth, [f"class {k}" for k in range(60)], np.arange(240))
    for part in parts:
        assert "Of 60 classes the 30 that are least often recognised" in part.words
    rows = next(iter(parts[1].chart["datasets"].values()))
    assert {row["name"] for row in rows} == {f"class {k}" for k in range(1, 60, 2)}


def test_shares_count_the_answers_of_classes_that_are_not_drawn() -> None:
    counts = np.array([[3, 0, 7], [1, 1, 0], [0, 0, 2]])
    rows = next(iter(charts.confusion(counts, ["a", "b", "c"], [0, 1])["datasets"].values()))
    found = {(row["truth"], row["answer"]): (row["images"], row["share"]) for row in rows}
    assert found == {("a", "a"): (3, 0.3), ("b", "a"): (1, 0.5), ("b", "b"): (1, 0.5)}


def test_mistakes_are_listed_and_shown_where_there_are_thumbnails(study: Study) -> None:
    page = render(study)
    rows = cells(page, "wrong")
    found = found_mistakes(study)
    assert found is not None
    assert (found.among, found.wrong, len(found.worst)) == (60, 7, 7)
    assert [row[0] for row in rows[1:]] == [m.image for m in found.worst]
    assert "<figure>" not in page
    assert f"python tune/report.py {study.folder} --thumbnails" in page
    image = "data:image/jpeg;base64,AAAA"
    shown = {found.worst[0].image: {"image": image, "map": None}}
    write_json(study.thumbnails_file, shown)
    page = render(study)
    assert page.count("<figure>") == 7
    assert page.count(f'<img src="{image}"') == 1
    assert 'class="map"' not in page
    assert "There was no time to find out what spoke for the answers." in page


def test_a_report_of_five_hundred_trials_stays_below_five_megabytes(tmp_path: Path) -> None:
    assert write_report(large(tmp_path)).stat().st_size < 5_000_000


def large(folder: Path) -> Study:
    """A study of 500 trials with as many thumbnails as a report shows, none of which compresses well."""
    study = made(folder / "large", 500)
    found = found_mistakes(study)
    assert found is not None
    noise = np.random.default_rng(0).integers(0, 256, (480, 480, 3), np.uint8)
    falls = np.random.default_rng(0).normal(size=(8, 8))
    write_json(
        study.thumbnails_file,
        {m.image: {"image": thumbnail(noise), "map": overlay(falls)} for m in found.worst},
    )
    return study


def test_a_study_without_an_ensemble_or_a_complete_trial_is_reported_as_far_as_it_went(
    tmp_path: Path,
) -> None:
    study = made(tmp_path / "young", 1)
    study.ensemble_file.unlink()
    assert set(drawn(render(study))) == {"curves"}
    study.trials_file.unlink()
    with pytest.raises(ValueError, match="has no trials yet"):
        render(study)


@pytest.mark.parametrize("change", [{"space": None}, {"space": {"dimensions": {"colour": {}}}}, {}])
def test_a_space_that_this_version_does_not_know_is_left_out_of_the_page(
    study: Study, change: dict[str, Any]
) -> None:
    facts = {name: value for name, value in study.metadata.items() if name != "space"}
    write_json(study.folder / "study.json", {**facts, **change})
    page = render(study)
    assert set(drawn(page)) == {"curves", "progress", "cost", "confusion", "recall", "calibration"}


def test_the_study_in_the_repository_is_reported() -> None:
    study = Study(ROOT / "results" / "cars9")
    page = render(study)
    assert all(record.trial_id in page for record in study.records())
    assert "79.1 % <small>(74.1 to 83.8)</small>" in page


def test_nothing_beats_what_is_on_the_pareto_front(study: Study) -> None:
    board = study.leaderboard()
    seconds = np.random.default_rng(0).permutation(len(board)) // 2 + 1.0  # some take equally long
    finished = [replace(r, seconds=float(s)) for r, s in zip(board, seconds, strict=True)]
    front = charts.pareto(finished, "accuracy")
    unbeaten = [
        record
        for record in finished
        if not any(
            other.value >= record.value and other.seconds <= record.seconds
            for other in finished
            if (other.value, other.seconds) != (record.value, record.seconds)
        )
    ]
    assert 1 < len(unbeaten) < len(finished)
    assert front == sorted(unbeaten, key=lambda r: r.seconds)


def test_long_studies_are_drawn() -> None:
    done = next(r for r in records(40) if r.state is State.COMPLETE)
    long = replace(done, curve=tuple(replace(done.curve[0], epoch=n) for n in range(1, 7001)))
    assert charts.curves([long], "accuracy")["layer"]


def test_dimensions_whose_parent_is_fixed_are_drawn() -> None:
    space = SPACES["demo"].with_override("unfreeze=full").with_override("head_depth=1")
    like = {"unfreeze": "full", "head_depth": 1}
    shown = [replace(r, config=replace(r.config, **like)) for r in records(40) if r.value is not None]
    rows = charts.parallel(shown, space, "accuracy")["datasets"].values()
    assert {"dropout", "lr_ratio"} <= {row["dimension"] for table in rows for row in table if "trial" in row}


def test_of_many_trials_the_complete_ones_are_drawn_first() -> None:
    many = records(300)
    shown = charts.thinned(many, 100)
    assert len(shown) == 100
    assert {r.state for r in shown} == {State.COMPLETE}
    assert len(charts.thinned(many, 250)) == 250
    assert charts.thinned(many, 1000) == sorted(many, key=lambda r: r.state is not State.COMPLETE)


def test_reliability_bins_hold_every_image_once() -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(4), 500)
    labels = probs.argmax(1) * (np.arange(500) % 2)
    bins = reliability(probs, labels)
    assert sum(b["images"] for b in bins) == 500
    right = sum(b["images"] * b["right"] for b in bins) / 500
    assert right == pytest.approx((probs.argmax(1) == labels).mean())
    assert all(0.25 <= b["confidence"] <= 1 for b in bins)


@pytest.mark.server
def test_served_the_page_follows_the_study_on_loopback_alone(study: Study) -> None:
    command = [sys.executable, str(ROOT / "tune" / "report.py"), str(study.folder), "--serve", "--port", "0"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
            assert address is not None
            with urllib.request.urlopen(address.group(), timeout=60) as answer:
                first = answer.read().decode()
            more = rerun(study.records()[1], 77)
            study.append(more)
            with urllib.request.urlopen(address.group(), timeout=60) as answer:
                second = answer.read().decode()
        finally:
            server.terminate()
            server.communicate(timeout=60)
    assert 'http-equiv="refresh"' in first
    assert more.trial_id not in first
    assert more.trial_id in second


@pytest.mark.server
def test_a_page_that_loads_anew_keeps_what_was_sorted_and_filtered(
    study: Study, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    monkeypatch.setattr(run_report, "REFRESH_SECONDS", 3)
    spoken: list[str] = []
    screen = Screen(plain=True)
    monkeypatch.setattr(screen, "say", spoken.append)
    threading.Thread(
        target=run_report.serve, args=([study], partial(render, study), 0, screen), daemon=True
    ).start()
    wait = WebDriverWait(browser, 100)
    wait.until(lambda _: spoken)
    browser.get(spoken[0].split()[-3])
    browser.find_element("css selector", "#filter").send_keys("pruned")
    browser.find_element("css selector", "#trials th:nth-child(5) button").click()
    more = rerun(study.records()[0], 77)
    study.append(more)
    wait.until(lambda b: more.trial_id in b.page_source)
    wait.until(lambda b: b.find_element("css selector", "#shown").text == "15 of 42")
    assert browser.find_element("css selector", "#filter").get_attribute("value") == "pruned"
    assert browser.find_elements("css selector", "#trials th[aria-sort]")
    assert not browser.get_log("browser")


def test_a_port_without_a_server_is_refused(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    options = report.parser().parse_args([str(study.folder), "--port", "8000"])
    assert guarded(report.run, options) == 2
    assert capsys.readouterr().err == "error: --port 8000 is for --serve; add that or leave it out\n"


# ---- in a browser, where there is one


@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_from_disk_and_asks_nothing_of_the_network(
    study: Study, browser: Any, open_page: Callable[..., None], width: int, scheme: str
) -> None:
    open_page(write_report(study), charts=7, width=width, scheme=scheme)
    assert browser.title == "a study · accuracy"


def test_five_hundred_trials_open_with_images_that_show_what_spoke_for_the_answer(
    browser: Any, open_page: Callable[..., None], tmp_path: Path
) -> None:
    open_page(write_report(large(tmp_path)), charts=7)
    assert len(browser.find_elements("css selector", "#trials tbody tr")) == 501
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('figure img')].map(i => [i.naturalWidth, i.naturalHeight])"
    )
    assert sizes == 7 * [[240, 240], [8, 8]]
    [*maps] = browser.find_elements("css selector", "img.map")
    frame = browser.find_element("css selector", "figure > div")
    assert maps[0].rect == frame.rect
    box = browser.find_element("id", "maps")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    box.click()
    assert not any(one.is_displayed() for one in maps)


def test_the_table_sorts_and_filters_and_a_point_answers_to_the_mouse(
    study: Study, browser: Any, open_page: Callable[..., None]
) -> None:
    from selenium.webdriver import ActionChains

    open_page(write_report(study), charts=7)

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
    box.send_keys("pruned test_resnet")
    assert set(column("state")) == {"pruned"}
    assert set(column("backbone")) == {"test_resnet"}
    assert browser.find_element("css selector", "#shown").text.endswith("of 41")
    dot = browser.find_elements("css selector", "#cost .mark-symbol path")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", dot)
    ActionChains(browser).move_to_element(dot).perform()
    tip = browser.find_element("css selector", "#vg-tooltip-element")
    assert "seconds" in tip.text

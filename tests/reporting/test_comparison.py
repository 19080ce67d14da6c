"""Studies side by side: what differs, what each is worth, and whether one is clearly better."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_page import cells, drawn, made

from carmodels.evaluation.intervals import paired_gain
from carmodels.evaluation.predictions import Predictions
from carmodels.files import read_json, write_json
from carmodels.holdout import add_look
from carmodels.study import Study
from tune import report
from tune.cli.options import guarded
from tune.reporting import charts
from tune.reporting.comparison import (
    differing,
    holdout_warning,
    names,
    opened,
    render,
    verdict,
    write_comparison,
)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Study, Study]:
    """Two studies of the same data; the second has half as many trials and a better ensemble on val."""
    first, second = made(tmp_path / "one", 40), made(tmp_path / "two", 20)
    space = first.metadata["space"]
    other = {**space, "fixed": {**space["fixed"], "epochs": 12}}
    write_json(second.folder / "study.json", {**second.metadata, "seed": 1, "space": other})
    best = second.leaderboard()[0]
    run = best.run.with_config(lr=0.0123)
    second.append(replace(best, trial_id=run.id, config=run.config, value=0.9999, at=best.at + 6000))
    truth = np.arange(60) % 3
    probs = (0.05 + 0.85 * np.eye(3)[truth]).astype(np.float32)
    val = first.predictions("ensemble", "val")
    Predictions(val.ids, val.classes, probs).save(second.predictions_file("ensemble", "val"))
    return first, second


def test_what_differs_is_shown_and_what_does_not_is_named(pair: tuple[Study, Study]) -> None:
    page = render(pair)
    rows = {row[0]: row[1:] for row in cells(page, "settings")}
    assert rows[""] == ["one", "two"]
    assert rows["seed"] == ["0", "1"]
    assert rows["fixed: epochs"] == [str(pair[0].metadata["space"]["fixed"]["epochs"]), "12"]
    assert "space: lr" not in rows
    alike = page[page.index("The same in all:") :].split("</p>")[0]
    for name in ("preset", "fingerprint", "split hash", "space: lr", "version: torch"):
        assert name in alike
    outcomes = {row[0]: row[1:] for row in cells(page, "outcomes")}
    assert outcomes["trials"][1].startswith("22: ")
    assert outcomes["ensemble on holdout"] == ["90.0 % (85.0 to 94.0)"] * 2
    assert outcomes["gain over the baseline, points"] == ["+3.4 (-1.0 to +8.0)"] * 2
    first = opened(pair)[0].best
    assert first is not None
    config = {row[0]: row[1:] for row in cells(page, "config")}
    assert config["lr"] == [charts.short(first.config.lr), "0.0123"]


def test_curves_and_costs_have_a_colour_a_study(pair: tuple[Study, Study]) -> None:
    found = drawn(render(pair))
    assert set(found) == {"rivals", "scores", "spent"}
    for study, name in zip(pair, ("one", "two"), strict=True):
        rows = [r for r in next(iter(found["rivals"]["datasets"].values())) if r["study"] == name]
        assert rows[-1]["value"] == max(r["value"] for r in rows) == study.leaderboard()[0].value
        assert rows[-1]["minutes"] == max(r.at for r in study.records()) / 60
        spent = [r for r in next(iter(found["spent"]["datasets"].values())) if r["study"] == name]
        assert sum(r["minutes"] for r in spent) == pytest.approx(sum(r.seconds for r in study.records()) / 60)


def test_ensembles_are_told_apart_by_the_same_images_of_val(pair: tuple[Study, Study]) -> None:
    first, second = opened(pair)
    labels = np.arange(60) % 3
    mine, theirs = (s.predictions("ensemble", "val").probs for s in pair)
    gain = paired_gain("accuracy", mine, theirs, labels)
    assert gain.high < 0
    assert verdict(first, second, "accuracy") == (
        f"one over two: {100 * gain.value:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f}) "
        "on the same 60 images of val; two is better on val."
    )
    assert verdict(first, first, "accuracy").endswith("neither is clearly better on val.")
    elsewhere = replace(second, metadata={**second.metadata, "split_hash": "other"})
    assert "their images or splits differ" in verdict(first, elsewhere, "accuracy")
    pair[1].predictions_file("ensemble", "val").unlink()
    assert "the probabilities on val are not both there" in verdict(first, second, "accuracy")
    assert "not both have an ensemble yet" in verdict(first, replace(second, results=None), "accuracy")


def test_holdout_names_no_winner_and_choosing_by_it_is_warned_of(pair: tuple[Study, Study]) -> None:
    results = read_json(pair[1].ensemble_file)
    first, better = opened(pair)[1].quoted, {"value": 0.99, "low": 0.98, "high": 1.0}
    add_look(pair[1], "ensemble", {**results, "holdout": {**results["holdout"], "ensemble": better}})
    sides = opened(pair)
    words = (
        "one and two share a holdout, which was looked at 3 times. Choosing among them by it makes it a "
        "validation set, and the score of the chosen one too good to quote: choose by val."
    )
    assert holdout_warning(sides) == words
    page = " ".join(render(pair).split())
    assert words in page
    assert "<b>91.0 %</b>two, ensemble on val" in page
    assert "99.0 %" not in page.replace("99.0 % of", "")
    assert sides[1].quoted == first
    probs = pair[1].predictions("ensemble", "val")
    worse = replace(probs, probs=probs.probs[:, [1, 2, 0]])
    worse.save(pair[1].predictions_file("ensemble", "holdout"))
    assert verdict(*sides, "accuracy").endswith("two is better on val.")
    elsewhere = replace(sides[1], metadata={**sides[1].metadata, "split_hash": "other"})
    assert holdout_warning([sides[0], elsewhere]) == ""
    assert holdout_warning([sides[0], replace(sides[1], results=None)]) == ""


def test_a_study_that_has_not_come_far_is_compared_as_far_as_it_went(pair: tuple[Study, Study]) -> None:
    first, second = pair
    second.ensemble_file.unlink()
    lines = second.trials_file.read_text().splitlines(keepends=True)
    second.trials_file.write_text(lines[0])  # one that was pruned
    page = render(pair)
    outcomes = {row[0]: row[1:] for row in cells(page, "outcomes")}
    assert outcomes["best trial on val"][1] == "-"
    assert outcomes["ensemble on holdout"] == ["90.0 % (85.0 to 94.0)", "-"]
    first.ensemble_file.unlink()
    assert set(drawn(render(pair))) == {"rivals", "spent"}


def test_names_are_as_long_as_it_takes_to_tell_them_apart() -> None:
    assert names([Path("/a/cars"), Path("/a/birds")]) == ["cars", "birds"]
    assert names([Path("/a/x/cars"), Path("/b/x/cars")]) == ["a/x/cars", "b/x/cars"]


def test_a_setting_that_one_study_lacks_differs() -> None:
    assert differing([{"a": "1", "b": "2"}, {"a": "1"}]) == ({"b": ["2", "-"]}, ["a"])


def test_the_page_is_written_beside_the_first_study(
    pair: tuple[Study, Study], capsys: pytest.CaptureFixture[str]
) -> None:
    options = report.parser().parse_args([str(study.folder) for study in pair])
    assert guarded(report.run, options) == 0
    printed = capsys.readouterr()
    path = pair[0].folder.parent / "compare.html"
    written, warned = printed.out.splitlines()
    assert (written, printed.err) == (f"Comparison: {path}", "")
    assert warned == holdout_warning(opened(pair))
    assert path.read_text().startswith("<!doctype html>")


def refusals(first: Study, second: Study, folder: Path) -> list[tuple[list[Study], str]]:
    """Studies that cannot be compared, and what is said of them."""
    loss = Study(folder / "loss")
    shutil.copytree(second.folder, loss.folder)
    write_json(loss.folder / "study.json", {**second.metadata, "metric": "log_loss"})
    empty = Study(folder / "empty")
    empty.begin(dict(first.metadata), [])
    link = Study(folder / "link")
    link.folder.symlink_to(first.folder)
    return [
        (
            [first, Study(folder)],
            f"{folder} is no study: it holds no study.json; give a folder under results/",
        ),
        ([first, second, link], f"{link.folder} is given twice: name each study once"),
        (
            [first, loss],
            f"{loss.folder} was searched for log_loss, {first.folder} for accuracy: compare studies of one "
            "metric",
        ),
        ([first, empty], f"{empty.folder} has no trials yet: there is nothing to report"),
    ]


def test_what_cannot_be_compared_is_named(pair: tuple[Study, Study], tmp_path: Path) -> None:
    for studies, words in refusals(*pair, tmp_path):
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            render(studies)


@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_from_disk_and_a_line_answers_to_the_mouse(
    pair: tuple[Study, Study], browser: Any, open_page: Callable[..., None], width: int, scheme: str
) -> None:
    from selenium.webdriver import ActionChains

    open_page(write_comparison(pair), charts=3, width=width, scheme=scheme)
    assert browser.title == "one, two · accuracy"
    dot = browser.find_elements("css selector", "#rivals .mark-symbol path")[2]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", dot)
    ActionChains(browser).move_to_element(dot).perform()
    assert "minutes" in browser.find_element("css selector", "#vg-tooltip-element").text

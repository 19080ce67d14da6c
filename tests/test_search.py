"""The whole job as a user runs it: real Ray, a small drawn data set, scripts in their own processes."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest

from carmodels.catalog import VIEWS
from carmodels.data.dataset import open_dataset
from carmodels.ensembling.network import load_ensemble
from carmodels.evaluation.calibration import with_temperature
from carmodels.files import read_json
from carmodels.formatting import stops_sentence
from carmodels.holdout import looks, quoted_look
from carmodels.models.weights import Weights
from carmodels.presets import SPACES
from carmodels.records import Cause, State, TrialRecord
from carmodels.study import VERSION, Study
from carmodels.training.config import TrialConfig
from carmodels.training.run import Run
from tune import retrain, search
from tune.budget import clock
from tune.budget.clock import Clock
from tune.cli import session, study_folder
from tune.cli.options import guarded, written
from tune.cli.resources import share_out, this_machine
from tune.commands import run_retrain, run_search
from tune.finalize import blending, confirmation, repeats, retraining
from tune.finalize.schedules import RETRAIN_EPOCHS_RATIO
from tune.finalize.stop_check import pruned_in_search
from tune.monitor.terminal import Screen
from tune.optim.standings import standings_of, standings_sentence
from tune.reporting.mistakes import found_mistakes
from tune.runtime import search_stage
from tune.runtime.job import Job, Workers
from tune.runtime.worker import trial_name

ROOT = Path(__file__).parents[1]
SMALL = ("--set", "image_size=32,48", "--preset", "demo")
EPOCHS = 3


@dataclass(frozen=True)
class Place:
    """Where the runs of these tests happen, away from the project and the user's own cache."""

    folder: Path
    data: Path
    weights: str

    @property
    def study(self) -> Study:
        return Study(self.folder / "results" / "cars")

    def command(self, script: str, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / "tune" / script), *arguments]

    def search(self, *arguments: str, epochs: int = EPOCHS) -> list[str]:
        options = ("--data", str(self.data), "--weights", self.weights, "--cache", str(self.folder / "cache"))
        return self.command("search.py", *options, *SMALL, "--set", f"epochs={epochs}", *arguments)

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            text=True,
            capture_output=True,
            timeout=280,
            check=False,
            env=environment(),
        )


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "150", "NO_ALBUMENTATIONS_UPDATE": "1"}


@pytest.fixture(scope="module")
def place(drawn: Path, tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Place:
    return Place(tmp_path_factory.mktemp("place"), drawn, weights.source)


@pytest.fixture(scope="module")
def whole(place: Place) -> str:
    """What a run of the whole job prints. Tests read its study. Those that write have a copy (`copied`)."""
    result = place.run(place.search("--trials", "6", "--study", "cars", "--confirm", "2", "--thumbnails"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    return result.stdout


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs one of the commands of `Place` in this process."""
    monkeypatch.chdir(place.folder)
    monkeypatch.setenv("COLUMNS", "150")

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        _, script, *arguments = command
        module = importlib.import_module(f"tune.{Path(script).stem}")
        capsys.readouterr()
        code = guarded(module.run, module.parser().parse_args(arguments))
        output, errors = capsys.readouterr()
        return subprocess.CompletedProcess(command, code, output, errors)

    return run


@pytest.fixture
def on_own_ray(own_ray: str, here: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Likewise, on the Ray that tests share."""

    @contextmanager
    def running(options: argparse.Namespace, screen: Screen) -> Iterator[Workers]:
        yield share_out(options, [this_machine()])

    monkeypatch.setattr(session, "ray_running", running)
    return here


@pytest.fixture
def copied(place: Place, whole: str) -> Callable[[str], Study]:
    """Makes a copy of the study of the whole job, which other tests look at."""

    def copy(name: str) -> Study:
        study = Study(place.study.folder.parent / name)
        shutil.copytree(place.study.folder, study.folder)
        return study

    return copy


def table(study: Study) -> list[dict[str, str]]:
    with study.table_file.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.ray
@pytest.mark.usefixtures("whole")
def test_every_configuration_has_a_row_and_the_baseline_ran_its_whole_schedule(place: Place) -> None:
    rows = table(place.study)
    assert [r["stage"] for r in rows].count("search") == 6
    assert [r["stage"] for r in rows].count("confirm") in (0, 2)  # none where the best stands out by far
    reference = [r for r in rows if r["baseline"] == "True"]
    assert [(r["state"], r["epochs_run"], r["cut_short"]) for r in reference] == [("complete", "3", "False")]
    assert reference[0]["note"].startswith("baseline")
    complete = [float(r["value"]) for r in rows if r["state"] == "complete"]
    assert complete == sorted(complete, reverse=True)
    assert all(r["reason"] for r in rows)


@pytest.mark.ray
@pytest.mark.usefixtures("whole")
def test_every_complete_trial_leaves_its_probabilities_by_id(place: Place) -> None:
    study = place.study
    for record in study.leaderboard():
        for split in ("val", "holdout", "test"):
            predictions = study.predictions(record.trial_id, split)
            assert predictions.probs.shape[1] == 10
            if split != "test":
                assert set(predictions.ids) == set(study.labels(split))


@pytest.mark.ray
def test_the_job_ends_with_a_report_of_every_trial(place: Place, whole: str) -> None:
    assert f"Report: {place.study.report_file}" in whole.replace("\n", "")
    page = place.study.report_file.read_text()
    assert all(record.trial_id in page for record in place.study.records())
    assert "of the ensemble on holdout" in page


@pytest.mark.ray
def test_with_images_the_report_shows_the_worst_mistakes_and_what_spoke_for_them(
    place: Place, here: Command, copied: Callable[[str], Study]
) -> None:
    study = copied("shown")
    found = found_mistakes(study)
    assert found is not None
    thumbnails = read_json(study.thumbnails_file)
    assert list(thumbnails) == [mistake.image for mistake in found.worst]
    assert thumbnails
    page = study.report_file.read_text()
    for thumbnail in thumbnails.values():
        assert f'<img src="{thumbnail["image"]}"' in page
        if thumbnail["map"]:  # a busy machine may not get to all of them
            assert f'<img class="map" src="{thumbnail["map"]}"' in page
    out = place.folder / "again.html"
    study.thumbnails_file.unlink()
    cache = ("--cache", str(place.folder / "cache"))
    for options, shown in (((), False), ((*cache, "--thumbnails"), True)):
        command = place.command("report.py", str(study.folder), "--out", str(out), *options)
        done = here(command)
        assert done.returncode == 0, done.stderr
        assert ("<figure>" in out.read_text()) is shown
    again = read_json(study.thumbnails_file)
    assert {i: t["image"] for i, t in again.items()} == {i: t["image"] for i, t in thumbnails.items()}


@contextmanager
def serving(*command: str) -> Iterator[Callable[[str], Any]]:
    """A server that is started with --port; gives a function that asks it for JSON, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def ask(path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return json.load(answer)

    given = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            yield ask
        finally:
            server.terminate()


def patiently(ask: Callable[[], Any], seconds: float = 100) -> Any:
    """The first answer that is not empty."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        with suppress(OSError):
            if found := ask():
                return found
        time.sleep(0.3)
    raise AssertionError("no answer")


@pytest.mark.ray
@pytest.mark.server
@pytest.mark.usefixtures("whole")
def test_optuna_dashboard_opens_the_storage_of_a_study(place: Place) -> None:
    url = f"sqlite:///{place.study.optuna_file}"
    run = "import sys; from optuna_dashboard._cli import main; sys.exit(main())"
    with serving(sys.executable, "-c", run, url) as ask:
        [study] = patiently(lambda: ask("/api/studies")["study_summaries"])
        trials = ask(f"/api/studies/{study['study_id']}?after=0")["trials"]
    stored = optuna.load_study(study_name=None, storage=optuna.storages.RDBStorage(url)).trials
    assert [t["state"].lower() for t in trials] == [
        {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "fail"}[t.state.name] for t in stored
    ]
    assert [{p["name"] for p in t["params"]} for t in trials] == [set(t.params) for t in stored]
    assert len(trials) == 5  # of six: the reference is not the sampler's


@pytest.mark.ray
@pytest.mark.server
@pytest.mark.usefixtures("whole")
def test_tensorboard_shows_the_curve_of_every_trial(place: Place) -> None:
    curves = {f"{r.stage}-{trial_name(r.run)}": r.curve for r in place.study.records() if r.curve}
    run = "import sys; from tensorboard.main import run_main; run_main()"
    with serving(sys.executable, "-c", run, "--logdir", str(place.study.tensorboard_folder)) as ask:

        def loaded() -> Any:
            found = ask("/data/plugin/scalars/tags")
            return found if set(found) >= set(curves) else None

        assert set(patiently(loaded)) == set(curves)
        for name, curve in curves.items():
            query = urllib.parse.urlencode({"run": name, "tag": "val/accuracy"})
            rows = ask(f"/data/plugin/scalars/scalars?{query}")
            assert [row[1] for row in rows] == [epoch.epoch for epoch in curve]
            assert [row[2] for row in rows] == pytest.approx([epoch.value for epoch in curve])


@pytest.mark.ray
@pytest.mark.usefixtures("whole")
def test_a_study_that_another_process_works_on_is_refused(place: Place, here: Command) -> None:
    before = place.study.trials_file.read_bytes()
    with session.held(place.study):
        for command in (
            place.search("--trials", "9", "--study", "cars", "--resume"),
            place.search("--trials", "9", "--study", "cars", "--overwrite"),
            place.command("ensemble.py", str(place.study.folder), "--cache", str(place.folder / "cache")),
        ):
            refused = here(command)
            assert refused.returncode == 2
            assert f"is in use by process {os.getpid()} on" in refused.stderr
    assert place.study.trials_file.read_bytes() == before


@pytest.mark.ray
@pytest.mark.usefixtures("whole")
def test_the_submission_has_the_sample_files_ids_order_and_header(place: Place) -> None:
    with (
        place.study.submission_file.open(newline="") as ours,
        (place.data / "sample-submission.csv").open() as sample,
    ):
        rows, asked = list(csv.reader(ours)), list(csv.reader(sample))
    assert rows[0] == asked[0]
    assert [r[0] for r in rows] == [r[0] for r in asked]
    assert {r[1] for r in rows[1:]} <= {str(i) for i in range(10)}
    assert len({r[1] for r in rows[1:]}) > 1


@pytest.mark.ray
@pytest.mark.usefixtures("whole")
def test_the_ensemble_is_the_blend_of_its_members_scored_once_on_holdout(place: Place) -> None:
    study = place.study
    result = json.loads(study.ensemble_file.read_text())
    assert sum(m["weight"] for m in result["members"]) == pytest.approx(1)
    labels = study.labels("holdout")
    probs = 0
    for member in result["members"]:
        shown = [
            with_temperature(study.predictions(member["trial_id"], "holdout", view), member["temperature"])
            .aligned(list(labels))
            .probs
            for view in result["tta"]["views"]
        ]
        probs = probs + member["weight"] * sum(shown) / len(shown)
    right = (probs.argmax(1) == list(labels.values())).mean()
    assert result["holdout"]["ensemble"]["value"] == pytest.approx(right)
    assert result["holdout"]["looks"] == 1
    assert {"single", "baseline", "gain_over_baseline", "gain_over_single"} <= set(result["holdout"])
    assert [row["views"] for row in result["tta"]["tried"]][: len(VIEWS) - 1] == [
        ["plain", view] for view in VIEWS if view != "plain"
    ]
    assert all({"val", "set_right", "set_wrong"} <= set(row) for row in result["tta"]["tried"])
    assert set(result["nested"]) == {"chosen", "before", "gains", "gain", "helps", "sentence"}
    costs = [member["seconds_per_1000"] for member in result["members"]]
    assert result["cost"]["seconds_per_1000"] >= sum(costs) > 0
    assert sum(row["rows"] for row in result["submission"]["classes"]) == 20


@pytest.mark.ray
@pytest.mark.usefixtures("whole")
def test_the_study_says_what_was_run_on_what(place: Place) -> None:
    facts = place.study.metadata
    assert facts["command"].startswith("python tune/search.py --data ")
    assert facts["images"]["test"] == 20
    assert facts["class_names"][0] != "0"
    assert {"torch", "ray", "optuna", "timm"} <= set(facts["versions"])


@pytest.mark.ray
def test_the_best_is_that_of_all_its_runs_and_none_is_trained_twice(place: Place, whole: str) -> None:
    study = place.study
    best = json.loads(study.best_file.read_text())
    assert best["standings"][0]["trial_id"] == best["trial_id"] == standings_of(study)[0].record.trial_id
    assert sorted(run["seed"] for run in best["retrained"].values()) == [1, 2, 3]
    lines = [json.loads(line) for line in study.trials_file.read_text().splitlines()]
    complete = [row["trial_id"] for row in lines if row["state"] == State.COMPLETE]
    assert len(complete) == len(set(complete))
    reruns = [r for r in study.records() if r.stage == "confirm"]
    trial = next(r for r in study.records() if r.trial_id == best["trial_id"])
    assert best["config"]["epochs"] == RETRAIN_EPOCHS_RATIO * trial.config.epochs  # no time limit
    assert best["origin"]["continues"] == trial.trial_id
    longer = f"{best['config']['epochs']} epochs more each, on from its weights"
    assert longer in " ".join(whole.split())
    for rerun in reruns:
        assert study.weights_file(rerun.trial_id).is_file()
        assert len(study.predictions(rerun.trial_id, "test").ids) == 20


@pytest.mark.ray
def test_the_job_says_which_configurations_cannot_be_told_apart(place: Place, whole: str) -> None:
    assert standings_sentence(standings_of(place.study)) in whole
    page = place.study.report_file.read_text()
    assert standings_sentence(standings_of(place.study)) in page


def test_a_search_that_was_cut_off_among_its_reruns_goes_on_there(
    place: Place, copied: Callable[[str], Study], on_own_ray: Command
) -> None:
    study = copied("cut-rerun")
    before = [r for r in study.records() if r.stage != "confirm"]
    reruns = {r.trial_id: r for r in study.records() if r.stage == "confirm"}
    best = next(r for r in study.leaderboard() if r.stage == "search")
    other_seed = best.run.with_origin(seed=best.origin.seed + 1)
    cut = reruns.get(other_seed.id) or replace(
        best, trial_id=other_seed.id, origin=other_seed.origin, stage="confirm", repeats=best.trial_id
    )
    study.trials_file.unlink()
    for record in (*before, replace(cut, state=State.INTERRUPTED, value=None)):
        study.append(record)
    study.write_table()
    options = ("--trials", "6", "--study", "cut-rerun", "--resume", "--until", "confirm", "--confirm", "1")
    result = on_own_ray(place.search(*options))
    assert result.returncode == 0, result.stderr
    after = {r.trial_id: r for r in study.records()}
    again = after.pop(cut.trial_id)
    assert after == {r.trial_id: r for r in before}
    assert (again.state, again.stage, again.repeats) == (State.COMPLETE, "confirm", best.trial_id)
    best_epoch = max(epoch.value for epoch in again.curve)
    assert again.value == (cut.value if cut.trial_id in reruns else best_epoch)


@pytest.mark.usefixtures("whole")
def test_a_search_begins_with_what_another_study_knows(place: Place, on_own_ray: Command) -> None:
    known = str(place.study.folder)
    options = ("--study", "warm", "--warm-start", known, "--until", "search", "--trials")
    first = on_own_ray(place.search(*options, "2"))
    assert first.returncode == 0, first.stderr
    assert f"Warm start: 5 of 6 trials of {known} are of this space." in first.stdout.replace("\n", " ")
    warm = Study(place.folder / "results" / "warm")
    assert len(warm.records()) == 2
    assert [len(records) for records in warm.earlier().values()] == [6]
    again = on_own_ray(place.search(*options, "3", "--resume"))
    assert again.returncode == 0, again.stderr
    assert "Warm start: 5 of 6 trials" in again.stdout
    cold = on_own_ray(place.search("--study", "warm", "--until", "search", "--trials", "3", "--resume"))
    assert "--resume: warm_start was ['../cars'] in" in cold.stderr
    itself = on_own_ray(place.search("--study", "warm", "--warm-start", str(warm.folder), "--overwrite"))
    assert "is this study itself; --resume goes on with it" in itself.stderr
    assert len(warm.records()) == 3


@pytest.mark.ray
def test_the_output_is_a_line_a_trial_and_the_answer(whole: str) -> None:
    assert "10 classes (" in whole
    assert re.search(r"Ray dashboard: http://127\.0\.0\.1:\d+ \(it asks for the token", whole)
    assert sum(" px" not in line and "ran its 3 epochs" in line for line in whole.splitlines()) >= 4
    assert "baseline" in whole
    assert "Submission: " in whole
    assert re.search(r"(The ensemble is (kept|left out)|One model is the ensemble)", whole)
    assert all(f"  plain, {view}: val " in whole for view in VIEWS if view != "plain")
    assert re.search(r"Ensemble: \d+\.\d s for 1,000 images on 1 CPU core, views included", whole)
    assert len(whole.splitlines()) < 95


@pytest.mark.ray
@pytest.mark.usefixtures("whole")
def test_a_study_that_exists_is_refused_in_one_line(place: Place, here: Command) -> None:
    result = here(place.search("--trials", "3", "--study", "cars"))
    assert result.returncode == 2
    assert result.stderr.strip().startswith(
        f"error: {place.study.folder} holds a study already; give --resume"
    )
    assert len(result.stderr.strip().splitlines()) == 1


def test_resuming_keeps_what_is_there_and_goes_on_to_the_number_asked_for(
    place: Place, copied: Callable[[str], Study], on_own_ray: Command
) -> None:
    study = copied("resumed")
    before = {r.trial_id: r for r in study.records()}
    os.truncate(study.optuna_file, 10_000)  # it is made anew from trials.jsonl
    command = place.search("--trials", "8", "--study", "resumed", "--resume", "--until", "search")
    result = on_own_ray(command)
    assert result.returncode == 0, result.stderr
    assert "Resumed: 6 trials kept, 0 queued again." in result.stdout
    after = {r.trial_id: r for r in study.records()}
    assert {i: after[i] for i in before} == before
    assert len([r for r in after.values() if r.stage == "search"]) == 8
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{study.optuna_file}")
    trials = optuna.load_study(study_name=None, storage=storage).trials
    assert len(trials) == 7  # the reference is not the sampler's
    assert all(t.state.is_finished() for t in trials)
    again = on_own_ray(command)
    assert again.returncode == 0, again.stderr
    assert {r.trial_id: r for r in study.records()} == after


@pytest.mark.ray
@pytest.mark.usefixtures("whole")
def test_another_search_is_not_resumed_into_the_same_folder(place: Place, here: Command) -> None:
    result = here(place.search("--study", "cars", "--resume", "--set", "lr=1e-4:1e-3"))
    assert result.returncode == 2
    assert "error: --resume: space was" in result.stderr


@pytest.mark.ray
def test_retraining_and_ensembling_can_be_run_alone(place: Place, copied: Callable[[str], Study]) -> None:
    study = copied("alone")
    folder = str(study.folder)
    scored = read_json(study.ensemble_file)["holdout"]
    searched = [r for r in study.leaderboard() if r.stage == "search"]
    kept = [r for r in searched if study.weights_file(r.trial_id).is_file()]
    worst = [r for r in kept if r.config.unfreeze != "frozen"][-1]
    cache = ("--cache", str(place.folder / "cache"))
    result = place.run(
        place.command(
            *("retrain.py", folder, "--trial", worst.trial_id, "--onward"),
            *("--seeds", "1", "--epochs", "1", *cache),
        )
    )
    assert result.returncode == 0, result.stderr
    repeats = [r for r in study.records() if r.repeats == worst.trial_id and r.origin.seed == 1]
    (new,) = [r for r in repeats if r.epochs_run == 1]
    assert (new.origin.continues, new.config.unfreeze) == (worst.trial_id, "full")
    assert new.config.backbone == worst.config.backbone
    reference = next(r for r in searched if r.baseline)
    study.predictions_file(reference.trial_id, "holdout").unlink()
    (first,) = looks(study)
    out = place.folder / "mine.csv"
    result = place.run(
        place.command("ensemble.py", folder, "--top", "1", "--tta", "1", "--out", str(out), *cache)
    )
    assert result.returncode == 0, result.stderr
    assert "Holdout was looked at 2 times." in result.stdout
    assert [look.number for look in looks(study)] == [1, 2]
    assert quoted_look(study, "ensemble") == first
    assert first.scores == {k: v for k, v in scored.items() if k != "looks"}
    assert read_json(study.ensemble_file)["holdout"]["looks"] == 2
    assert study.has_predictions(reference.trial_id, "holdout")
    assert out.read_text() == study.submission_file.read_text()


def test_folds_are_members_of_the_ensemble_and_a_last_run_learns_from_everything(
    place: Place, copied: Callable[[str], Study], on_own_ray: Command
) -> None:
    study = copied("folded")
    splits = [study.labels(name) for name in ("train", "val", "holdout")]
    cache = ("--cache", str(place.folder / "cache"))
    options = ("--folds", "2", "--epochs", "1", "--fold-in", *cache)
    command = place.command("retrain.py", str(study.folder), *options)
    result = on_own_ray(command)
    assert result.returncode == 0, result.stderr
    folds = [r for r in study.records() if r.stage == "fold"]
    sets = [r for r in study.records() if r.stage == "folds"]
    assert len(folds) == 2 * len(sets) == 6
    for record in folds:
        held_out = study.predictions(record.trial_id, "oof").ids
        assert set(held_out) < {*splits[0], *splits[1]}
        assert len(study.predictions(record.trial_id, "holdout").ids) == len(splits[2])
    [last, *_] = [r for r in study.records() if r.stage == "fold-in"]
    assert last.value is None
    assert not study.predictions_file(last.trial_id, "holdout").is_file()
    assert study.fold_in_file.read_text() != study.submission_file.read_text()
    assert len(study.fold_in_file.read_text().splitlines()) == 21
    assert "No score goes with it" in result.stdout.replace("\n", " ")
    before = study.records()
    again = on_own_ray(command)
    assert again.returncode == 0, again.stderr
    assert study.records() == before  # nothing is trained twice
    result = on_own_ray(place.command("ensemble.py", str(study.folder), "--tta", "2", *cache))
    assert result.returncode == 0, result.stderr
    members = json.loads(study.ensemble_file.read_text())["members"]
    assert {m["stage"] for m in members} == {"fold"}
    assert sum(m["weight"] for m in members) == pytest.approx(1)
    ensemble, holdout = load_ensemble(study), study.predictions("ensemble", "holdout")
    opened = open_dataset(place.data, cache_dir=place.folder / "cache", max_size=48)
    shown = [opened.images[row] for row in opened.holdout.rows]
    said = holdout.aligned(opened.holdout.ids).probs
    np.testing.assert_allclose(ensemble.probabilities(shown), said, atol=1e-4)


def test_ctrl_c_ends_in_order_and_resume_runs_again_what_was_cut_off(
    place: Place, on_own_ray: Command
) -> None:
    study = Study(place.folder / "results" / "cut")
    command = place.search("--trials", "5", "--study", "cut", "--until", "search", epochs=10)
    process = subprocess.Popen(
        command,
        cwd=place.folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    deadline = time.time() + 200
    while time.time() < deadline and not any(r.state is State.COMPLETE for r in study.records()):
        if process.poll() is not None:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 130, output + errors
    assert "--resume goes on" in output
    assert "Traceback" not in errors
    cut = {r.trial_id for r in study.records() if r.state is State.INTERRUPTED}
    kept = {r.trial_id: r for r in study.records() if r.state is not State.INTERRUPTED}
    assert 0 < len(kept) < 5
    before = max(r.at for r in study.records())
    assert study.table_file.is_file()
    result = on_own_ray([*command, "--resume", "--check-stops", "2"])
    assert result.returncode == 0, result.stderr
    assert f"{len(cut)} queued again" in result.stdout
    check = json.loads(study.stops_file.read_text())
    assert check["stopped"] == len(pruned_in_search(study.records()))
    assert check["finished"] == min(2, check["stopped"]) == len(study.stop_check.leaderboard())
    assert stops_sentence(check) in result.stdout
    records = {r.trial_id: r for r in study.records()}
    assert len(records) == 5
    assert {i: records[i] for i in kept} == kept
    assert {i for i, r in records.items() if r.at > before} == set(records) - set(kept)
    assert not [r for r in records.values() if r.state is State.INTERRUPTED]


def test_a_plain_tree_without_test_images_and_a_metric_to_minimise(place: Place, on_own_ray: Command) -> None:
    tree = place.folder / "tree"
    names = dict(line.split() for line in (place.data / "classes.txt").read_text().splitlines())
    for number, name in names.items():
        shutil.copytree(place.data / "train" / number, tree / name)
    options = (
        "--data",
        str(tree),
        "--weights",
        place.weights,
        "--cache",
        str(place.folder / "cache"),
        *SMALL,
        *("--set", f"epochs={EPOCHS}"),
    )
    limits = ("--trials", "3", "--hours", "1", "--metric", "log_loss", "--confirm", "1", "--study", "tree")
    result = on_own_ray(place.command("search.py", *options, *limits))
    assert result.returncode == 0, result.stderr
    assert "The time for searching buys about" in result.stdout
    study = Study(place.folder / "results" / "tree")
    board = study.leaderboard()
    assert [r.value for r in board] == sorted(r.value for r in board)
    assert study.metadata["class_names"] == sorted(names.values())
    outcome = json.loads(study.ensemble_file.read_text())
    assert outcome["val"]["ensemble"] <= outcome["val"]["single"]["value"]
    assert "submission" not in outcome
    assert not study.submission_file.exists()


@pytest.mark.parametrize(
    ("arguments", "command", "overwrites"),
    [
        ("", "", True),
        ("--plain", "", True),
        ("", " --plain", True),
        ("", " --overwrite", True),
        ("--trials 3", "", False),
        ("--data x", "", False),
        ("", " --trials 200 --hours 2", False),
        ("", " --data /images/demo", False),
    ],
)
def test_only_the_demo_without_any_option_overwrites_its_own_study(
    tmp_path: Path, arguments: str, command: str, overwrites: bool
) -> None:
    study = Study(tmp_path / "demo")
    typed = list(written(search.parser(), search.parser().parse_args(arguments.split())))
    assert not run_search.repeats_the_demo(study, typed)
    study.begin({"command": f"python tune/search.py{command}"}, [])
    assert run_search.repeats_the_demo(study, typed) == overwrites


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "0"], "--trials 0 must be at least 1"),
        (["--hours", "nan"], "--hours nan must be above 0 and below a year"),
        (["--hours", "-1"], "--hours -1.0 must be above 0"),
        (["--seed", "-3"], "--seed -3 must be from 0 to 2000000000"),
        (["--workers", "4000"], "--workers 4000 is more than "),
        (["--gpus-per-trial", "1.5"], "--gpus-per-trial 1.5 must be above 0 and at most 1"),
        (["--study", "../x"], "--study '../x' must be a plain name"),
        (["--confirm", "-1"], "--confirm -1 must be at least 0, which leaves it out"),
        (["--check-stops", "-2"], "--check-stops -2 must be at least 0"),
        (["--max-seconds-per-1000", "-1"], "--max-seconds-per-1000 -1 must be above 0"),
        (["--weights", "/no/such"], "--weights /no/such is no folder"),
        (["--set", "colour=red"], "--set colour=red: expected NAME=V"),
        (["--resume", "--study", "never"], "--resume: there is no study at"),
        (["--data", "/no/such", "--weights", "none"], "/no/such"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_option_is_one_line_that_names_the_value(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert search.main(arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "results").exists()


def test_an_option_that_is_no_number_is_one_line_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        search.main(["--check-stops", "many"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: argument --check-stops: invalid int value: 'many'; --help lists the options\n"
    )


def test_the_search_has_the_time_of_the_stages_nobody_asked_for() -> None:
    share = clock.search_share
    assert share(confirm=6, check_stops=0) == Clock(0.0).search
    assert share(confirm=6, check_stops=5) < share(confirm=6, check_stops=0) < share(confirm=0, check_stops=0)
    ends = (clock.SEARCH_SHARE, clock.CONFIRM_SHARE, clock.RETRAIN_SHARE)
    assert share(confirm=0, check_stops=0) < clock.CONFIRM_SHARE
    assert ends == tuple(sorted(ends))


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        ("--until search", "search"),
        ("--until search --check-stops 3", "stops"),
        ("--until confirm", "confirm"),
        ("--until confirm --confirm 0", "search"),
        ("--until retrain", "retrain"),
    ],
)
def test_the_last_stage_that_is_asked_for_has_nearly_all_of_the_time(options: str, stage: str) -> None:
    typed = search.parser().parse_args(["--hours", "1", *options.split()])
    planned, trials = run_search.budget(typed, SPACES["cpu"], bare=False, begun=0.0)
    ends = {
        "search": planned.at(planned.search),
        "stops": planned.at(planned.search + clock.STOPS_SHARE),
        "confirm": planned.at(clock.CONFIRM_SHARE),
        "retrain": planned.at(clock.RETRAIN_SHARE),
    }
    assert (ends[stage], planned.at(1.0), trials) == (pytest.approx(0.97 * 3600), 3600, None)
    hour = search.parser().parse_args(["--hours", "1"])
    whole, _ = run_search.budget(hour, SPACES["cpu"], bare=False, begun=0)
    assert (whole.at(clock.RETRAIN_SHARE), whole.last) == (0.88 * 3600, 1.0)


def test_the_search_goes_on_where_later_stages_leave_time() -> None:
    clock = Clock(0.0, 10_000)
    longer = clock.with_spare_time(confirm=300, retrain=700, ensemble=500)
    assert (longer.search, longer.confirm, longer.retrain) == pytest.approx((0.85, 0.88, 0.95))
    judged_stops = clock.with_spare_time(confirm=300, retrain=700, ensemble=500, stops=0.1)
    assert (judged_stops.search, judged_stops.confirm) == pytest.approx((0.75, 0.88))
    much = clock.with_spare_time(confirm=3000, retrain=500, ensemble=500)
    assert much is clock
    bounded = clock.with_spare_time(confirm=0, retrain=5000, ensemble=5000)  # they never get less than usual
    assert (bounded.search, bounded.confirm, bounded.retrain) == pytest.approx((0.74, 0.74, 0.88))
    for other in (Clock(0.0), replace(clock, last=0.88)):
        assert other.with_spare_time(confirm=0, retrain=0, ensemble=0) is other
    reruns = clock.seconds * (clock.confirm - clock.search)  # with so much time for them, and no retraining
    idle = clock.with_spare_time(confirm=reruns, retrain=0, ensemble=5000)
    assert (idle.search, idle.confirm, idle.retrain) == pytest.approx((0.76, 0.88, 0.88))
    assert clock.with_spare_time(confirm=math.inf, retrain=math.inf, ensemble=math.inf) is clock


def test_a_study_and_its_data_may_have_moved(tmp_path: Path) -> None:
    study, said = Study(tmp_path / "studies" / "cars"), []
    rows = SimpleNamespace(ids=("a.jpg",), labels=[0], rows=[0], name="val")
    none = SimpleNamespace(ids=(), labels=[], rows=[], name="none")
    splits = SimpleNamespace(
        train=none, val=rows, holdout=none, test=none, images=SimpleNamespace(groups=[0])
    )
    names = ("preset", "space", "seed", "metric", "fingerprint", "split_hash")
    (tmp_path / "weights").mkdir()
    (tmp_path / "others").mkdir()
    facts = {
        **dict.fromkeys(names, "1"),
        "seed": 1,
        "metric": "accuracy",
        "data": "../old",
        "weights": "../../weights",
        "warm_start": ["../a/b"],
    }
    study.begin(facts, [("val", "a.jpg", 0, 0)])
    screen = SimpleNamespace(say=lambda *words: said.append(words))
    now = {**facts, "data": "../new", "warm_start": ["../../b"]}
    for folder in ("predictions", "weights"):
        (study.folder / folder).rmdir()
    study_folder.check_resumed(study, now, splits, screen)  # type: ignore[arg-type]
    assert study.metadata == {"version": VERSION, **facts, "data": "../new"}
    assert {p.name for p in study.folder.iterdir()} >= {"predictions", "weights"}
    with pytest.raises(ValueError, match="weights was"):
        study_folder.check_resumed(study, {**now, "weights": "../../others"}, splits, screen)  # type: ignore[arg-type]
    (tmp_path / "weights").rmdir()
    with pytest.raises(ValueError, match="weights was"):
        study_folder.check_resumed(study, {**now, "weights": "none"}, splits, screen)  # type: ignore[arg-type]
    study_folder.check_resumed(study, {**now, "weights": "../../others"}, splits, screen)  # type: ignore[arg-type]
    assert study.metadata["weights"] == "../../others"
    with pytest.raises(ValueError, match="weights was"):
        study_folder.check_resumed(study, {**now, "weights": "none"}, splits, screen)  # type: ignore[arg-type]


def test_what_is_killed_while_it_begins_leaves_no_half_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, other = Study(tmp_path / "cars"), Study(tmp_path / "other")
    none = SimpleNamespace(ids=(), labels=[], rows=[], name="none")
    splits = SimpleNamespace(train=none, val=none, holdout=none, test=none, images=SimpleNamespace(groups=[]))
    for one in (study, other):
        one.begin({"metric": "accuracy"}, [])

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(study_folder.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        study_folder.begin(study, {}, splits, [])  # type: ignore[arg-type]
    study_folder.check_folder(study, resume=False, overwrite=False)
    monkeypatch.undo()
    monkeypatch.setattr(Study, "write_metadata", lambda self, facts: killed(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        study_folder.begin(study, {}, splits, [other])  # type: ignore[arg-type]
    assert not study.exists
    assert study.earlier_file.is_file()


def test_a_search_that_has_nothing_more_to_draw_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage, estimate in (
        (confirmation, "confirmation_seconds"),
        (retraining, "retraining_seconds"),
        (blending, "ensemble_seconds"),
    ):
        monkeypatch.setattr(stage, estimate, lambda *given, **more: 0.0)
    job = Job(Study(tmp_path), None, None, Workers(1, 1, 0.0), tmp_path)  # type: ignore[arg-type]
    options = search.parser().parse_args([])
    for begun, longer in ((time.time() - 150, False), (time.time() - 600, True)):  # of 620 s for the search
        clock = Clock(begun, 1000)
        assert (run_search.with_spare_time(job, options, clock) != clock) == longer
    monkeypatch.setattr(confirmation, "confirmation_seconds", lambda *given, **more: 1e6)
    spared = run_search.with_spare_time(job, options, clock)
    assert spared.search == pytest.approx(0.88)  # the later stages have 0.12 at most


@pytest.mark.parametrize(("trials", "spare", "searches"), [(None, True, 2), (None, False, 1), (9, True, 1)])
def test_what_follows_has_the_clock_of_the_longer_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: int | None, spare: bool, searches: int
) -> None:
    clock = Clock(time.time(), 1000)
    longer = replace(clock, search=0.8, confirm=0.85) if spare else clock
    asked: list[tuple[Clock, bool]] = []
    further: list[Clock] = []

    def searched(*given: Any, clock: Clock, resumed: bool = True, **more: Any) -> bool:
        asked.append((clock, resumed))
        return True

    def trained(job: Any, options: Any, clock: Clock, *given: Any) -> bool:
        further.append(clock)
        return False

    for place, name, value in (
        (run_search, "costs_of", lambda job, space, say: None),
        (run_search, "with_spare_time", lambda job, options, clock: longer),
        (run_search, "trained_further", trained),
        (search_stage, "search", searched),
        (session, "watched", lambda *given: None),
        (repeats, "chosen_trial", lambda *given: None),
    ):
        monkeypatch.setattr(place, name, value)
    splits = SimpleNamespace(fingerprint="f", split_hash="s")
    job = Job(Study(tmp_path), splits, None, Workers(1, 1, 0.0), tmp_path)  # type: ignore[arg-type]
    options = search.parser().parse_args([])
    screen = SimpleNamespace(say=print, rest=list, table=print)
    assert run_search.go(job, SPACES["demo"], options, clock, trials, screen) == 130  # type: ignore[arg-type]
    assert asked == [(clock, True), (longer, False)][:searches]
    assert further == [asked[-1][0]]


def test_sizes_are_checked_against_what_the_space_has_in_the_end(weights: Weights) -> None:
    typed = ["start_image_size=0,96", "image_size=128,160", "backbone=test_resnet"]
    space, _ = run_search.chosen_space("cpu", typed, weights)
    assert (space.image_sizes, space.backbones) == ((128, 160), ("test_resnet",))


def test_the_command_is_written_down_with_what_was_left_out() -> None:
    options = search.parser().parse_args(["--confirm", "0", "--check-stops", "3", "--check"])
    assert list(written(search.parser(), options)) == ["--confirm 0", "--check-stops 3", "--check"]


def test_the_command_written_down_is_the_one_that_was_typed() -> None:
    typed = ["--data", "my cars", "--set", "lr=1e-3", "--set", "epochs=4", "--warm-start", "a", "it's b"]
    options = search.parser().parse_args(typed)
    again = shlex.split(" ".join(written(search.parser(), options)))
    assert search.parser().parse_args(again) == options


def test_room_is_made_for_what_the_asked_stages_leave() -> None:
    def later(*typed: str) -> int:
        return run_search.models_later(search.parser().parse_args(typed))

    assert later("--until", "search") == 1
    assert later("--confirm", "0", "--until", "confirm") == 1
    assert later("--until", "retrain") == 1 + 6 + 3 + 3
    assert later("--until", "retrain", "--folds", "5", "--fold-in") == 1 + 6 + 15 + 3
    assert later() > later("--until", "retrain")


def test_backbones_without_weights_are_left_out_by_name(weights: Weights) -> None:
    space, left_out = run_search.chosen_space("cpu", ["backbone=test_resnet,resnet50"], weights)
    assert space.backbones == ("test_resnet",)
    assert left_out == ["resnet50"]
    with pytest.raises(ValueError, match="no weights for any of resnet50"):
        run_search.chosen_space("cpu", ["backbone=resnet50"], weights)


def failed(study: Study, seed: int, reason: str, stage: str = "search") -> None:
    """Records a trial that has failed."""
    run = Run(TrialConfig("test_resnet", image_size=32, epochs=1)).with_origin(seed=seed)
    cause = Cause.DIVERGED if "loss" in reason else Cause.ERROR
    record = TrialRecord(
        run.id, run.config, State.FAILED, 0, None, 1.0, reason, cause=cause, origin=run.origin, stage=stage
    )
    study.append(record)


@pytest.mark.parametrize(
    ("reasons", "says"),
    [
        ((), "{study} has no finished trial; search.py --resume goes on, with more --hours"),
        (
            ("ImportError: no torch", "RuntimeError: later"),
            "{study}: none of 2 trials has finished, the first failed by: ImportError: no torch; mend that, "
            "then search.py --resume goes on",
        ),
        (
            ("the loss was not finite",),
            "{study}: none of 1 trials has finished, the first failed by: the loss was not finite; "
            "mend that, then search.py --resume goes on",
        ),
    ],
)
@pytest.mark.parametrize("until", ["search", "report"])
def test_a_search_without_a_finished_trial_is_an_error(
    until: str, reasons: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path / "a")
    study.begin({"metric": "accuracy"}, [])

    def searched(*given: Any, **more: Any) -> bool:
        for seed, reason in enumerate(reasons):
            failed(study, seed, reason)
        return True

    for place, name, value in (
        (run_search, "costs_of", lambda *given: None),
        (search_stage, "search", searched),
        (session, "watched", lambda *given: None),
    ):
        monkeypatch.setattr(place, name, value)
    splits = SimpleNamespace(fingerprint="f", split_hash="s")
    job = Job(study, splits, None, Workers(1, 1, 0.0), tmp_path)  # type: ignore[arg-type]
    options = search.parser().parse_args(["--until", until])
    clock = Clock(time.time() - 36, 36)
    with pytest.raises(ValueError, match="^" + re.escape(says.format(study=study.folder)) + "$"):
        run_search.go(job, SPACES["demo"], options, clock, None, Screen())


def test_a_retraining_of_which_every_run_diverged_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path / "a")
    study.begin({"metric": "accuracy", "weights": "none"}, [])

    @contextmanager
    def opened(*given: Any) -> Iterator[Job]:
        yield Job(study, None, Weights.parse("none"), Workers(1, 1, 0.0), tmp_path)  # type: ignore[arg-type]

    def retrained(*given: Any, **more: Any) -> bool:
        for seed in range(2):
            failed(study, seed, f"the loss was not finite in epoch {seed}", "retrain")
        return True

    for place, name, value in (
        (session, "open_job", opened),
        (session, "watched", lambda *given: None),
        (retraining, "retrain_all", retrained),
    ):
        monkeypatch.setattr(place, name, value)
    options = retrain.parser().parse_args([str(study.folder)])
    says = "none of 2 runs has finished, the first failed by: the loss was not finite in epoch 0"
    with pytest.raises(ValueError, match=f"^{says}$"):
        run_retrain.run(options, Screen())

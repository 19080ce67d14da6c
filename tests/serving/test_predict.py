"""A study's ensemble answers images as in the study, says when it is not sure, and leaves it as ONNX."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import runpy
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from carmodels.data.dataset import Splits
from carmodels.ensembling.export import TOLERANCE, Onnx, export
from carmodels.ensembling.network import (
    Ensemble,
    EnsembleSpec,
    Member,
    load_ensemble,
    load_exported,
    load_image,
)
from carmodels.ensembling.occlusion import occlusion_map
from carmodels.evaluation.calibration import confidence_threshold, with_temperature
from carmodels.evaluation.predictions import Predictions, blend
from carmodels.files import read_json, write_json
from carmodels.holdout import add_look
from carmodels.models.backbones import known_backbones
from carmodels.models.classifier import Classifier, save_weights
from carmodels.models.weights import Weights
from carmodels.records import FOLD, State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.forward import predict as probabilities_of
from carmodels.training.run import Run
from carmodels.training.trainer import fit
from tune.cli.options import guarded
from tune.predict import parser, run
from tune.reporting.mistakes import found_mistakes
from tune.reporting.thumbnails import overlay, thumbnail, write_thumbnails
from tune.serving.drop_page import MOST_BYTES, Desk, _Visitor, render
from tune.serving.inference import Given, Threshold, found_images, threshold
from tune.serving.model_card import write_card

VIEWS = ["flip", "top_right", "darker"]
TEMPERATURES = (0.8, 1.6)
CONFIGS = (
    TrialConfig("test_resnet", image_size=48, epochs=2, lr=3e-3),
    TrialConfig("test_efficientnet", image_size=32, epochs=1, head_depth=1, unfreeze="frozen", lr=3e-3),
)


@pytest.fixture(scope="module")
def study(splits: Splits, weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study with an ensemble of two members and two views, and what it said of val and holdout."""
    study = Study(tmp_path_factory.mktemp("results") / "cars")
    parts = (splits.train, splits.val, splits.holdout)
    study.begin(
        {
            "command": "python tune/search.py --data 'my | cars'",
            "begun": "2026-01-01 12:00:00",
            "metric": "accuracy",
            "seed": 0,
            "fingerprint": splits.fingerprint,
            "split_hash": splits.split_hash,
            "classes": list(splits.classes),
            "class_names": list(splits.class_names),
            "max_size": 48,
            "backbones": known_backbones(weights, sorted({config.backbone for config in CONFIGS})),
            "images": {part.name: len(part) for part in parts},
            "excluded": [],
            "test_duplicates": [],
            "hardware": {"device": "a CPU"},
            "versions": {"torch": torch.__version__},
        },
        [(s.name, i, int(k)) for s in parts for i, k in zip(s.ids, s.labels, strict=True)],  # type: ignore[arg-type]
    )
    models = [fit(Run(config), splits, weights=weights).model for config in CONFIGS]
    for config, model in zip(CONFIGS, models, strict=True):
        save_weights(model, study.weights_file(Run(config).id))
        study.append(TrialRecord(Run(config).id, config, State.COMPLETE, config.epochs, 0.5, 1.0, ""))
    for split in parts[1:]:
        members = [
            blend([with_temperature(probabilities_of(m, splits, split, config=c, view=v), t) for v in VIEWS])
            for c, m, t in zip(CONFIGS, models, TEMPERATURES, strict=True)
        ]
        with_temperature(blend(members, [3, 1]), 0.7).save(study.predictions_file("ensemble", split.name))
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    described = [
        {
            "trial_id": Run(c).id,
            "title": c.title,
            "stage": "search",
            "weight": w,
            "gain": 0.0,
            "val": 0.5,
            "temperature": t,
        }
        for c, w, t in zip(CONFIGS, (0.75, 0.25), TEMPERATURES, strict=True)
    ]
    write_json(
        study.ensemble_file,
        {
            "metric": "accuracy",
            "members": described,
            "temperature": 0.7,
            "tta": {"views": VIEWS, "sentence": "flips help"},
            "val": {"ensemble": 0.5, "single": {"trial_id": Run(CONFIGS[0]).id, "value": 0.5}},
            "holdout": {"ensemble": interval, "single": interval, "images": len(splits.holdout), "looks": 1},
        },
    )
    return study


@pytest.fixture(scope="module")
def ensemble(study: Study) -> Ensemble:
    return load_ensemble(study)


@pytest.fixture(scope="module")
def holdout(study: Study) -> Predictions:
    return study.predictions("ensemble", "holdout")


def image(drawn: Path, image_id: str) -> Path:
    return next((drawn / "train").rglob(image_id))


def answered(arguments: list[str]) -> int:
    return guarded(run, parser().parse_args(arguments))


def test_images_are_answered_as_in_the_study(ensemble: Ensemble, holdout: Predictions, drawn: Path) -> None:
    images = [load_image(image(drawn, i), 48) for i in holdout.ids]
    assert np.abs(ensemble.probabilities(images) - holdout.probs).max() < 2e-3
    one = ensemble.probabilities(images[:1])
    assert np.abs(one - ensemble.probabilities(images)[:1]).max() < 1e-5


def test_where_memory_runs_out_images_are_answered_in_halves(
    ensemble: Ensemble, holdout: Predictions, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [load_image(image(drawn, name), 96) for name in holdout.ids[:5]]
    expected, forward = ensemble.probabilities(images), Ensemble.forward

    def small(self: Ensemble, *images: torch.Tensor) -> torch.Tensor:
        if len(images[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *images)

    monkeypatch.setattr(Ensemble, "forward", small)
    np.testing.assert_allclose(ensemble.probabilities(images), expected, atol=1e-5)


def test_answers_are_printed_and_written(
    study: Study, holdout: Predictions, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "mine", tmp_path / "answers.csv"
    for name, image_id in (("a, b.jpg", holdout.ids[0]), ("deep/c.jpg", holdout.ids[1])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image(drawn, image_id), folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    assert answered([str(study.folder), str(folder), "--not-sure", "0", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Left out: " in printed
    assert "2 images, 0 of them 'not sure', 1 left out." in printed
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [Path(row["image"]).name for row in rows] == ["a, b.jpg", "c.jpg"]
    for row, expected in zip(rows, holdout.probs, strict=False):
        probs = [float(row[f"p_{name}"]) for name in holdout.classes]
        assert probs == pytest.approx(expected.tolist(), abs=2e-3)
        assert row["class"] == holdout.classes[int(np.argmax(probs))]
        assert row["sure"] == "yes"


def test_an_image_is_not_overwritten_by_the_answers(
    study: Study, holdout: Predictions, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.jpg"
    shutil.copy(image(drawn, holdout.ids[0]), own)
    before = own.read_bytes()
    assert answered([str(study.folder), str(own), "--out", str(own)]) == 2
    assert capsys.readouterr().err == f"error: --out {own} is one of the images: give another name\n"
    assert own.read_bytes() == before


def test_answers_that_cannot_be_written_are_an_error_and_a_reader_that_left_is_none(
    study: Study, holdout: Predictions, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = parser().parse_args([str(study.folder), str(image(drawn, holdout.ids[0]))])
    monkeypatch.setattr(sys, "stdout", Unwritable(OSError(28, "No space left on device")))
    with pytest.raises(
        ValueError, match=r"answers cannot be written \(No space left on device\): give --out"
    ):
        run(options)
    monkeypatch.setattr(sys, "stdout", Unwritable(BrokenPipeError(32, "Broken pipe")))
    assert run(options) == 0


class Unwritable(io.StringIO):
    """A standard output that fails."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"members": []}, "the members' weights are "),
        ({"temperature": 0}, "the temperatures are "),
        ({"tta": {"views": ["sideways"]}}, "the views are .'sideways'., must be of "),
        ({"tta": {"views": []}}, "the views are "),
    ],
)
def test_an_edited_ensemble_is_named_and_so_is_the_way_out(
    change: dict[str, object], words: str, study: Study, tmp_path: Path
) -> None:
    edited = Study(tmp_path / "edited")
    shutil.copytree(study.folder, edited.folder)
    write_json(edited.ensemble_file, {**read_json(edited.ensemble_file), **change})
    with pytest.raises(ValueError, match=rf"ensemble\.json is damaged \({words}.*tune/ensemble.py"):
        load_ensemble(edited)


def test_an_export_onto_a_file_is_refused_before_anything_is_loaded(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert answered([str(study.folder), "--export", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == (
        f"error: --export {tmp_path}/file: no writing there (Not a directory); give a folder of your own\n"
    )


def test_a_name_that_is_not_utf8_leaves_the_other_answers_alone(
    study: Study, holdout: Predictions, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "mine", tmp_path / "answers.csv"
    folder.mkdir()
    for name in ("a.jpg", os.fsdecode(b"caf\xe9.jpg")):
        shutil.copy(image(drawn, holdout.ids[0]), folder / name)
    assert answered([str(study.folder), str(folder), "--not-sure", "0", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert r"caf\udce9.jpg' (its name is not UTF-8, as names must be here: rename it)." in printed
    assert "1 images, 0 of them 'not sure', 1 left out." in printed
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert [Path(row["image"]).name for row in rows] == ["a.jpg"]


def test_what_is_asked_for_in_vain_is_one_line(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(study.folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("mine")
    for arguments, words in (
        ([folder], "there is nothing to do: give images or folders, --export DIR or --serve"),
        ([folder, "/no/such.jpg"], "/no/such.jpg does not exist: give images or folders of images"),
        ([folder, str(empty)], f"{empty} holds no images (JPEG, PNG, WebP or BMP)"),
        ([folder, "--out", "x.csv", "--serve"], "--out x.csv is for answers; give images or folders, too"),
        ([folder, str(empty), "--port", "1"], "--port 1 is for --serve; add that or leave it out"),
        ([folder, "~no-one/x"], "'~no-one/x': there is no such home folder; write the path in full"),
        ([folder, "x", "--out", folder], f"--out {folder} must name a file in a folder that exists"),
        (
            [folder, "--export", str(other)],
            f"--export {other} holds a README.md that is no model's; give another folder",
        ),
        ([str(tmp_path), "x", "--not-sure", "0"], "x does not exist: give images or folders of images"),
    ):
        assert answered(arguments) == 2
        assert capsys.readouterr().err == f"error: {words}\n"


def test_a_member_that_trials_jsonl_lost_is_named(study: Study, tmp_path: Path) -> None:
    copy = Study(tmp_path / "copy")
    shutil.copytree(study.folder, copy.folder)
    lines, lost = copy.trials_file.read_text().splitlines(keepends=True), Run(CONFIGS[0]).id
    copy.trials_file.write_text("".join(line for line in lines if lost not in line))
    with pytest.raises(ValueError, match=rf"has lost {lost}, a member of ensemble\.json; bring a copy"):
        load_ensemble(copy)


def test_the_confidence_is_the_least_that_makes_answers_right_so_often() -> None:
    confidence = np.linspace(0.99, 0.5, 50)
    right = np.array([k < 30 or k % 2 == 0 for k in range(50)])  # surer than 0.69: all are right
    probs = np.column_stack([confidence, 1 - confidence])
    labels = np.where(right, 0, 1)
    limit = confidence_threshold(probs, labels, 0.97)
    chosen = probs.max(1) >= limit
    enough = [c for c in confidence if right[confidence >= c].mean() >= 0.97]
    assert limit == min(enough)
    assert 30 <= chosen.sum() < 50
    assert confidence_threshold(probs, labels, 0.5) == 0
    assert math.isinf(confidence_threshold(probs, 1 - labels, 0.97))


def test_below_the_confidence_nothing_is_answered(study: Study, tmp_path: Path) -> None:
    """On val the sure answers are right and the others wrong; on holdout half of the sure ones are right."""
    copy = Study(tmp_path / "copy")
    shutil.copytree(study.folder, copy.folder)
    sure = {"val": 22, "holdout": 10}
    for split, count in sure.items():
        labels = np.array(list(copy.labels(split).values()))
        named = np.where(np.arange(len(labels)) < count, labels, (labels + 1) % 10)
        if split == "holdout":
            named[: count // 2] = (labels[: count // 2] + 1) % 10
        confidence = np.where(np.arange(len(labels)) < count, 0.91, 0.55)[:, None]
        probs = np.where(np.eye(10, dtype=bool)[named], confidence, (1 - confidence) / 9)
        said = copy.predictions("ensemble", split).aligned(list(copy.labels(split)))
        replace(said, probs=probs).save(copy.predictions_file("ensemble", split))
    limit = threshold(copy, 1.0)
    assert limit.confidence == pytest.approx(0.91)
    assert (limit.val.images, limit.val.unanswered) == (len(copy.labels("val")), len(copy.labels("val")) - 22)
    assert limit.holdout.unanswered == len(copy.labels("holdout")) - 10
    assert limit.val.accuracy is not None
    assert limit.holdout.accuracy is not None
    assert (limit.val.accuracy.value, limit.holdout.accuracy.value) == (1.0, 0.5)
    holdout = copy.predictions("ensemble", "holdout")
    np.testing.assert_array_equal(limit.sure(holdout.probs), holdout.probs.max(1) > 0.7)
    always = threshold(copy, 0.0)
    assert always.confidence == 0
    assert always.sure(holdout.probs).all()
    assert always.holdout.unanswered == 0
    assert always.sentence.startswith(f"Every image is answered: on val {always.val.right}; on holdout ")
    with pytest.raises(ValueError, match=r"--not-sure 1\.5 must be from 0"):
        threshold(study, 1.5)


def test_answers_end_where_nobody_reads_them(
    study: Study, drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    looked_at: list[int] = []

    def probabilities(ensemble: Ensemble, images: list[np.ndarray]) -> np.ndarray:
        looked_at.append(len(images))
        return np.full((len(images), len(ensemble.spec.classes)), 0.1)

    monkeypatch.setattr(Ensemble, "probabilities", probabilities)
    monkeypatch.setattr(sys, "stdout", Closed())
    assert answered([str(study.folder), str(drawn / "train")]) == 0
    assert sum(looked_at) <= 64  # of 200
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (50, "not even 95% of the 20 most confident ones on val are right"),
        (12, "fewer than 95% of the 12 on val are right"),
    ],
)
def test_no_more_images_are_spoken_of_than_there_are(images: int, words: str) -> None:
    none = Given(images, images, None)
    assert Threshold(0.95, math.inf, none, none).sentence == (
        f"No answer is sure: {words}; a lower --not-sure gives answers."
    )


@pytest.mark.slow
def test_an_ensemble_leaves_the_study_and_works_without_it(
    study: Study,
    ensemble: Ensemble,
    drawn: Path,
    weights: Weights,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    assert answered([str(study.folder), "--export", str(folder)]) == 0
    said = re.search(r"onnxruntime is within (\S+) of torch", capsys.readouterr().out)
    assert said
    assert float(said[1]) <= TOLERANCE
    shown = [load_image(path, 48) for path in found_images([drawn / "test_upload"])[:5]]
    expected = ensemble.probabilities(shown)
    assert np.abs(load_exported(folder).probabilities(shown) - expected).max() < 1e-5
    card = (folder / "README.md").read_text()
    assert "my \\| cars" in card
    assert study.metadata["fingerprint"] in card
    licence = f"test_resnet.safetensors | sha256:{weights.identity('test_resnet')} | not stated |"
    assert licence in card
    code = re.search(r"```python\n(.*?)```", card, re.S)
    assert code
    script = folder / "as_the_card_says.py"
    script.write_text(code[1].replace('"model.json"', repr(str(folder / "model.json"))).replace(
        '"ensemble.onnx"', repr(str(folder / "ensemble.onnx"))))  # fmt: skip
    told = runpy.run_path(str(script))["probabilities"]
    for image, row in zip(shown, expected, strict=True):
        assert np.abs(told(image) - row).max() < 1e-2  # OpenCV's resizing in the place of the loader's
    session = onnxruntime.InferenceSession(str(folder / "ensemble.onnx"))
    assert [i.name for i in session.get_inputs()] == [
        i["name"] for i in json.loads((folder / "model.json").read_text())["inputs"]
    ]
    (folder / "ensemble.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="is damaged or of another ensemble"):
        load_exported(folder)


def test_the_model_card_quotes_the_first_look_at_holdout_and_names_a_later_one(
    study: Study, ensemble: Ensemble, tmp_path: Path
) -> None:
    copy, folder = Study(tmp_path / "copy"), tmp_path / "model"
    shutil.copytree(study.folder, copy.folder)
    folder.mkdir()
    images = read_json(copy.ensemble_file)["holdout"]["images"]
    write_card(copy, "ensemble", ensemble.spec, threshold(copy, 0.0), Onnx(0.0), folder)
    once = (folder / "README.md").read_text()
    assert f"| on holdout, {images} images that chose nothing | 50.0 % (40.0 to 60.0) |" in once
    assert "looked at" not in once
    results = read_json(copy.ensemble_file)
    results["holdout"]["ensemble"] = {"value": 0.7, "low": 0.6, "high": 0.8}
    later = add_look(copy, "ensemble", results)
    write_json(copy.ensemble_file, results)
    write_card(copy, "ensemble", ensemble.spec, threshold(copy, 0.0), Onnx(0.0), folder)
    twice = (folder / "README.md").read_text()
    assert f"| on holdout, {images} images that chose nothing, first look | 50.0 % (40.0 to 60.0) |" in twice
    assert f"| not to quote: this ensemble on holdout, look 2 ({later.at}) | 70.0 % (60.0 to 80.0) |" in twice
    assert "Holdout was looked at 2 times in this study. The scores are those of an earlier ensemble" in twice


class Undecided(nn.Module):
    """A network whose path depends on its images, which no graph can hold."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.float().mean(dim=(2, 3))
        return means if means.sum() > 100 else -means


@pytest.mark.slow
def test_where_torch_cannot_export_there_are_safetensors_and_a_reason(tmp_path: Path) -> None:
    (tmp_path / "ensemble.onnx").write_text("of an earlier export")
    spec = EnsembleSpec(tuple("abc"), tuple("abc"), (Member("x", 1.0, CONFIGS[0]),), ("plain",), 1.0, 48)
    onnx = export(Ensemble(spec, [cast(Classifier, Undecided())]), tmp_path)
    assert onnx.refusal.startswith("torch cannot export it (")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ensemble.safetensors", "model.json"]


def test_an_ensemble_of_before_there_were_temperatures_of_members_answers_as_it_did(
    study: Study, splits: Splits, drawn: Path, tmp_path: Path
) -> None:
    old = Study(tmp_path / "old")
    shutil.copytree(study.folder, old.folder)
    results = json.loads(old.ensemble_file.read_text())
    for member in results["members"]:
        del member["temperature"]
    old.ensemble_file.write_text(json.dumps(results))
    found = load_ensemble(old)
    assert [member.temperature for member in found.spec.members] == [1.0, 1.0]
    described = found.spec.to_dict()
    for member in described["members"]:
        del member["temperature"]
    assert EnsembleSpec.from_dict(described) == found.spec


def test_missing_weights_are_named_with_the_way_out(study: Study, tmp_path: Path) -> None:
    copy = Study(tmp_path / "copy")
    shutil.copytree(study.folder, copy.folder)
    copy.weights_file(Run(CONFIGS[1]).id).unlink()
    with pytest.raises(ValueError, match=r"safetensors is missing: weights are not committed"):
        load_ensemble(copy)
    for split, broken in (("val", False), ("holdout", True)):
        said = copy.predictions_file("ensemble", split)
        whole = said.read_bytes()
        said.write_bytes(whole[:50]) if broken else said.unlink()
        word = "damaged" if broken else "missing"
        with pytest.raises(ValueError, match=rf"ensemble\.{split}\.npz is {word}: copy the folder pred"):
            threshold(copy, 0.95)
        said.write_bytes(whole)
    copy.ensemble_file.unlink()
    with pytest.raises(ValueError, match=r"python tune/ensemble\.py"):
        load_ensemble(copy)


class Red:
    """In the place of an ensemble: the first class is as likely as the top right corner is red."""

    def probabilities(self, images: list[np.ndarray]) -> np.ndarray:
        red = np.array([p[:24, 24:, 0].mean() / 255 for p in images])
        return np.column_stack([red, 1 - red])


def test_what_speaks_for_a_class_is_where_hiding_takes_it_away() -> None:
    image = np.zeros((48, 48, 3), np.uint8)
    image[:24, 24:] = (255, 0, 0)
    model = cast(Ensemble, Red())
    found = occlusion_map(model, image, 0)
    assert (found[:3, 5:] > 0.05).all()
    assert (np.abs(found[5:]) < 1e-6).all()
    assert occlusion_map(model, image, 1) == pytest.approx(-found)


def test_the_worst_mistakes_get_a_small_image_and_a_map_each(
    study: Study, ensemble: Ensemble, splits: Splits
) -> None:
    write_thumbnails(study, ensemble, splits, seconds=math.inf)
    found, thumbnails = found_mistakes(study), read_json(study.thumbnails_file)
    assert found is not None
    assert found.worst
    assert list(thumbnails) == [mistake.image for mistake in found.worst]
    rows = dict(zip(splits.val.ids, splits.val.rows.tolist(), strict=True))
    for mistake in found.worst:
        image = splits.images[rows[mistake.image]]
        assert thumbnails[mistake.image] == {
            "image": thumbnail(image),
            "map": overlay(occlusion_map(ensemble, image, mistake.column)),
        }
    results = read_json(study.ensemble_file)
    write_json(
        study.ensemble_file, {**results, "members": [{**m, "stage": FOLD} for m in results["members"]]}
    )
    write_thumbnails(study, ensemble, splits, seconds=math.inf)
    assert {entry["map"] for entry in read_json(study.thumbnails_file).values()} == {None}
    write_json(study.ensemble_file, results)


@pytest.fixture
def address(study: Study, ensemble: Ensemble) -> Iterator[str]:
    """The page's address."""
    limit = threshold(study, 0.0)
    desk, page = Desk(ensemble, limit), render(study, limit)
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *call: _Visitor(desk, page, *call)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def posted(url: str, content: bytes, **headers: str) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(url, data=content, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.load(refused)


@pytest.mark.server
def test_the_page_answers_an_image_and_refuses_what_is_none(
    address: str, holdout: Predictions, drawn: Path
) -> None:
    content = image(drawn, holdout.ids[0]).read_bytes()
    status, found = posted(f"{address}/answer", content)
    assert status == 200
    first = found["classes"][0]  # type: ignore[index]
    assert first["probability"] == pytest.approx(float(holdout.probs[0].max()), abs=2e-3)
    status, found = posted(f"{address}/parts", content)
    assert (status, np.shape(found["falls"])) == (200, (8, 8))
    assert posted(f"{address}/answer", b"GIF89a")[0] == 422
    assert posted(f"{address}/elsewhere", content)[0] == 404
    with urllib.request.urlopen(address, timeout=60) as reply:
        assert "Drop an image here" in reply.read().decode()


@pytest.mark.server
@pytest.mark.parametrize("width", [1440, 390])
def test_an_image_dropped_on_the_page_is_named_with_what_spoke_for_it(
    address: str, holdout: Predictions, drawn: Path, browser: Any, width: int, tmp_path: Path
) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    def shown(name: str) -> Any:
        return browser.find_element("id", name)

    browser.set_window_size(width, 1000)
    browser.get(address)
    shown("file").send_keys(str(image(drawn, holdout.ids[0])))
    WebDriverWait(browser, 60).until(lambda b: shown("switch").is_displayed())
    assert len(shown("classes").find_elements("css selector", "li")) == 5
    assert shown("answer").text == shown("classes").find_elements("css selector", "span")[0].text
    assert "of probability" in shown("legend").text
    assert shown("map").is_displayed()
    shown("show").click()
    assert not shown("map").is_displayed()
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    shown("file").send_keys(str(bad))
    WebDriverWait(browser, 60).until(lambda b: "This file is of no use" in shown("answer").text)
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    shown("file").send_keys(str(large))
    WebDriverWait(browser, 60).until(lambda b: "40 MB at most" in shown("answer").text)
    errors = [row for row in browser.get_log("browser") if "422" not in row["message"]]
    assert not errors
    browser.save_screenshot(str(tmp_path / "page.png"))

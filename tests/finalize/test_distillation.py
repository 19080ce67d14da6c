"""A student learns what the ensemble says, of the same crops, and answers in its place."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from carmodels.catalog import AUGMENTS, BACKBONES
from carmodels.data.dataset import Splits
from carmodels.data.loader import Loader
from carmodels.ensembling.network import Ensemble, load_ensemble
from carmodels.ensembling.student import predict_train, soft_targets
from carmodels.evaluation.calibration import fit_temperature, with_temperature
from carmodels.evaluation.predictions import blend
from carmodels.files import read_json, write_json
from carmodels.holdout import looks, quoted_look
from carmodels.models.classifier import save_weights
from carmodels.models.weights import Weights
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.forward import predict
from carmodels.training.run import Origin, Run
from carmodels.training.trainer import fit
from tune import predict as answering
from tune.cli import session
from tune.cli.options import guarded
from tune.cli.resources import Machine
from tune.distil import parser, run
from tune.finalize import distillation
from tune.runtime.job import Job, Workers

CONFIGS = (
    TrialConfig("test_resnet", image_size=48, epochs=3, lr=3e-3),
    TrialConfig("test_efficientnet", image_size=32, epochs=2, lr=3e-3),
)


@pytest.fixture(scope="module")
def study(drawn: Path, splits: Splits, weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of two trials with an ensemble of both."""
    study = Study(tmp_path_factory.mktemp("results") / "cars")
    parts = (splits.train, splits.val, splits.holdout)
    facts = {
        "data": str(drawn),
        "weights": weights.source,
        "seed": 0,
        "metric": "accuracy",
        "fingerprint": splits.fingerprint,
        "split_hash": splits.split_hash,
        "classes": list(splits.classes),
        "class_names": list(splits.class_names),
        "max_size": 48,
    }
    study.begin(facts, [(s.name, i, int(k)) for s in parts for i, k in zip(s.ids, s.labels, strict=True)])
    models = [fit(Run(config), splits, weights=weights).model for config in CONFIGS]
    for value, config, model in zip((0.6, 0.5), CONFIGS, models, strict=True):
        save_weights(model, study.weights_file(Run(config).id))
        study.append(TrialRecord(Run(config).id, config, State.COMPLETE, config.epochs, value, 1.0, "ran"))
    for split in parts[1:]:
        shown = [predict(m, splits, split, config=c) for c, m in zip(CONFIGS, models, strict=True)]
        blend(shown).save(study.predictions_file("ensemble", split.name))
    members = [{"trial_id": Run(c).id, "weight": 0.5, "temperature": 1.0} for c in CONFIGS]
    answer = {"members": members, "temperature": 1.0, "tta": {"views": ["plain"]}}
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    write_json(study.ensemble_file, {**answer, "holdout": {"ensemble": score, "images": 30, "looks": 1}})
    return study


def test_the_teacher_is_shown_the_crops_that_the_student_sees(study: Study, splits: Splits) -> None:
    run = Run(TrialConfig("test_resnet", image_size=32, epochs=4, augment="color"), Origin(seed=5))
    teacher = load_ensemble(study)
    answers = predict_train(teacher, splits, run, views=2)
    assert answers.shape == (2, len(splits.train), 10)
    np.testing.assert_allclose(answers.sum(axis=2), 1, rtol=1e-5)
    assert np.abs(answers[0] - answers[1]).mean() > 1e-3
    for view, position in ((0, 3), (1, 17)):
        images = []
        for shape in teacher.spec.inputs:
            settings = {"augment": AUGMENTS["color"], "seed": 5, "batch_size": len(splits.train)}
            loader = Loader(splits.images, splits.train, image_size=shape.size, **settings)
            images.append(next(loader.epoch(view)).images[[position]])
        np.testing.assert_allclose(answers[view, position], teacher(*images).numpy()[0], rtol=1e-3, atol=1e-5)


def test_targets_are_as_sure_as_the_ensemble_is_elsewhere_and_partly_labels() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=50)
    logits = 6 * np.eye(4)[labels] + rng.normal(size=(3, 50, 4))
    answers = (np.exp(logits) / np.exp(logits).sum(2, keepdims=True)).astype(np.float32)
    assert answers.max(2).mean() > 0.95
    targets, temperature = soft_targets(answers, labels, 0.7, weight=1)
    assert temperature > 1
    assert targets.max(2).mean() == pytest.approx(0.7, abs=0.005)
    assert (targets.argsort(2) == answers.argsort(2)).mean() > 0.99
    mixed, _ = soft_targets(answers, labels, 0.7, weight=0.5)
    np.testing.assert_allclose(mixed, 0.5 * targets + 0.5 * np.eye(4)[labels], atol=1e-6)
    assert soft_targets(answers, labels, 0.999)[1] == 1
    only, _ = soft_targets(answers, labels, 0.7, weight=0)
    np.testing.assert_array_equal(only, np.broadcast_to(np.eye(4)[labels], only.shape))
    with pytest.raises(ValueError, match="confidence=0"):
        soft_targets(answers, labels, 0)


def test_the_student_is_the_fastest_backbone_unless_another_is_named(
    study: Study, splits: Splits, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(study, splits, weights, Workers(1, 1, 0.0), tmp_path)
    said: list[str] = []
    seconds = {"test_resnet": 2e-3, "test_efficientnet": 1e-3}
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "prediction_seconds", lambda job, config, size: seconds[config.backbone])
        fastest = distillation._student_run(job, None, None, said.append)
        named = distillation._student_run(job, "test_resnet", 7, said.append)
    for student, expected in ((fastest, ("test_efficientnet", 32, 8)), (named, ("test_resnet", 48, 7))):
        config = student.config
        assert (config.backbone, config.image_size, config.epochs) == expected
    assert said[0] == "Milliseconds an image: test_efficientnet 1.0, test_resnet 2.0."
    assert distillation._available_backbones(job) == [name for name in BACKBONES if name.startswith("test_")]
    with pytest.raises(ValueError, match=r"--backbone resnet50: there are weights for test_"):
        distillation._student_run(job, "resnet50", None, said.append)
    config = replace(CONFIGS[1], unfreeze="frozen", augment="none", mixup=0.2, image_size=48)
    frozen = Run(config, Origin(seed=1))
    onward = frozen.with_config(unfreeze="full", mixup=0.0).with_origin(continues=frozen.id)
    for like, value, stage in ((frozen, 0.9, "search"), (onward, 0.95, "retrain")):  # the best is not copied
        study.append(
            TrialRecord(
                like.id, like.config, State.COMPLETE, 2, value, 1.0, "ran", stage=stage, origin=like.origin
            )
        )
    student = distillation._student_config(study, "test_efficientnet", 3)
    config = student.config
    assert (config.unfreeze, config.augment, config.mixup, config.image_size) == ("full", "crop", 0.0, 48)
    assert (student.origin.continues, config.lr_ratio) == ("", 0.004)


def test_a_student_is_trained_longer_than_the_space_says_and_not_than_a_shortened_baseline(
    study: Study, tmp_path: Path
) -> None:
    other = Study(tmp_path / "other")
    fixed = {"backbone": "test_resnet", "image_size": 32, "epochs": 6}
    for facts, epochs in (({}, 12), ({"space": {"dimensions": {}, "fixed": fixed}}, 24)):
        other.begin({**study.metadata, **facts, "images": {}}, [])
        config = CONFIGS[0]  # 3 epochs
        other.append(TrialRecord(Run(config).id, config, State.COMPLETE, 3, 0.6, 1.0, "ran"))
        assert distillation._student_config(other, "test_resnet", None).config.epochs == epochs
        assert distillation._student_config(other, "test_resnet", 7).config.epochs == 7


def test_a_study_is_distilled_and_the_student_answers(
    study: Study,
    splits: Splits,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # two threads wait for each other where something else runs as well: 50 s instead of 2
    monkeypatch.setattr(session, "this_machine", lambda: Machine(cores=1, gpus=0))
    cache = ("--cache", str(tmp_path / "cache"))
    options = ["--backbone", "test_resnet", "--epochs", "8", *cache]
    assert guarded(run, parser().parse_args([str(study.folder), *options])) == 0
    printed = capsys.readouterr().out
    assert "  epoch 8: accuracy on val " in printed
    assert " points (" in printed
    assert "times as fast." in printed
    results = read_json(study.results_file("student"))
    (member,) = results["members"]
    record = next(r for r in study.records() if r.trial_id == member["trial_id"])
    assert (record.stage, record.epochs_run, record.trial_id == record.run.id) == ("student", 8, False)
    assert results["holdout"]["student"]["value"] > 0.25  # ten classes
    assert results["speed"]["ratio"] == results["speed"]["student"] / results["speed"]["ensemble"]
    assert [(look.number, look.answer) for look in looks(study)] == [(1, "ensemble"), (2, "student")]
    assert "images kept aside, 95 % intervals), look 2 (" in printed
    assert quoted_look(study, "student").scores["student"] == results["holdout"]["student"]
    shown = study.predictions(record.trial_id, "val")
    labels = np.array([dict(zip(splits.val.ids, splits.val.labels, strict=True))[i] for i in shown.ids])
    assert results["temperature"] == pytest.approx(fit_temperature(shown.probs, labels))
    expected = with_temperature(shown, results["temperature"]).probs
    np.testing.assert_allclose(study.predictions("student", "val").aligned(shown.ids).probs, expected)
    network: Ensemble = load_ensemble(study, "student")
    images = [splits.images[row] for row in splits.val.rows]
    assert np.abs(network.probabilities(images) - expected).max() < 2e-3
    out = tmp_path / "answers.csv"
    asked = [str(study.folder), str(drawn / "test_upload"), "--student", "--out", str(out)]
    assert guarded(answering.run, answering.parser().parse_args(asked)) == 0
    assert len(out.read_text().splitlines()) == 21


def test_what_cannot_be_distilled_is_one_line(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert guarded(run, parser().parse_args(list(arguments))) == 2
        return capsys.readouterr().err

    assert said(str(study.folder), "--epochs", "0") == "error: --epochs 0 must be from 1 to 10000\n"
    assert "is no study: it holds no study.json" in said(str(tmp_path))
    gone, empty = Study(tmp_path / "gone"), tmp_path / "weights"
    facts = json.loads((study.folder / "study.json").read_text())
    shutil.copytree(study.folder, gone.folder)
    write_json(gone.folder / "study.json", {**facts, "weights": str(empty)})
    cached = ("--cache", str(tmp_path / "cache"))
    assert said(str(gone.folder), *cached) == (
        f"error: --weights {empty} is no folder; give a folder of <timm name>.safetensors, hub or none\n"
    )
    empty.mkdir()
    (empty / "nobody.safetensors").touch()
    assert f"error: {empty} holds the weights of no backbone that is known here; bring" in said(
        str(gone.folder), *cached
    )
    bare = Study(tmp_path / "bare")
    bare.begin(json.loads((study.folder / "study.json").read_text()), [])
    cache = ("--cache", str(tmp_path / "cache"))
    assert "has no ensemble.json; python tune/ensemble.py" in said(str(bare.folder), *cache)
    asked = [str(bare.folder), str(study.folder / "study.json"), "--student"]
    assert guarded(answering.run, answering.parser().parse_args(asked)) == 2

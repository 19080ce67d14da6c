"""Folds keep apart what they must, and their models are one member that answers what each had not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from carmodels.data.dataset import Splits
from carmodels.data.resplit import hold_out_fold
from carmodels.data.splits import assign_folds
from carmodels.evaluation.calibration import apply_temperature
from carmodels.evaluation.metrics import accuracy
from carmodels.evaluation.predictions import Predictions, blend
from carmodels.files import write_atomic
from carmodels.models.classifier import load_weights
from carmodels.models.weights import Weights
from carmodels.records import FOLD, FOLD_IN, FOLDS, State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.forward import predict
from carmodels.training.held_out import splits_for
from carmodels.training.run import Origin, Run
from tune.finalize import folds
from tune.finalize.blending import ModelLibrary, _save_blended, _within_cost
from tune.finalize.views import EnsembleMembers, PredictionTimes
from tune.runtime import recorder, worker
from tune.runtime.job import Job, Workers

pytestmark = pytest.mark.usefixtures("light_collections")


@pytest.mark.parametrize("count", [2, 3, 5])
def test_folds_are_alike_in_size_and_classes_and_keep_near_duplicates_together(count: int) -> None:
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 7, 400)
    groups = np.arange(400) - np.arange(400) % 2 * (rng.random(400) < 0.3)  # pairs
    labels = labels[groups]
    sides = assign_folds(labels, groups, count, seed=0)
    for group in np.unique(groups):
        assert len(set(sides[groups == group])) == 1
    sizes = np.bincount(sides, minlength=count)
    assert sizes.max() - sizes.min() <= 7
    for label in range(7):
        of_class = np.bincount(sides[labels == label], minlength=count)
        assert of_class.max() - of_class.min() <= 2
    assert (sides == assign_folds(labels, groups, count, seed=0)).all()
    assert (sides != assign_folds(labels, groups, count, seed=1)).any()


def test_more_folds_than_there_are_images_to_keep_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="folds=3: no image is left for 1 of them, 4 images"):
        assign_folds(np.zeros(4, int), np.array([0, 0, 0, 3]), 3, seed=0)


def test_every_image_of_train_and_val_is_held_out_once_and_holdout_is_never_touched(splits: Splits) -> None:
    parts = [hold_out_fold(splits, folds=4, fold=fold, seed=3) for fold in range(4)]
    both = {*splits.train.ids, *splits.val.ids}
    assert sorted(i for part in parts for i in part.val.ids) == sorted(both)
    for part in parts:
        assert part.val.name == "oof"
        assert {*part.train.ids, *part.val.ids} == both
        assert not {*part.train.ids} & {*part.val.ids}
        assert not {*splits.images.groups[part.train.rows]} & {*splits.images.groups[part.val.rows]}
        assert part.holdout is splits.holdout
    assert len({splits.split_hash, *(part.split_hash for part in parts)}) == 5


@pytest.fixture
def job(splits: Splits, weights: Weights, tmp_path: Path) -> Job:
    study = Study(tmp_path / "study")
    rows = [
        (s.name, name, -1 if s.labels is None else int(s.labels[i]))
        for s in (splits.train, splits.val, splits.holdout, splits.test)
        for i, name in enumerate(s.ids)
    ]
    study.begin({"metric": "accuracy"}, rows)
    return Job(study, splits, weights, Workers(1, 1, 0.0), tmp_path / "cache")


def trained(run: Run, job: Job, stage: str, monkeypatch: pytest.MonkeyPatch) -> TrialRecord:
    """A trial's record, its reports collected in place of Ray."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(worker, "report", seen.append)
    worker.train_trial(run.to_dict(), job)
    value = recorder._finite(seen[-1]["best_value"])
    record = TrialRecord(
        run.id,
        run.config,
        State(seen[-1]["state"]),
        2,
        value,
        1.0,
        "ran",
        stage=stage,
        repeats="abc",
        origin=run.origin,
    )
    job.study.append(record)
    return record


def test_the_models_of_all_folds_answer_what_they_have_not_seen(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, splits = job.study, job.splits
    runs = folds.fold_runs(Run(replace(config, patience=3, image_size=48)), 2)
    first = trained(runs[0], job, FOLD, monkeypatch)
    assert folds.record_complete_folds(study) == []
    second = trained(runs[1], job, FOLD, monkeypatch)
    [record] = folds.record_complete_folds(study)
    assert folds.record_complete_folds(study) == []
    assert (record.trial_id, record.stage) == (folds.fold_set(runs[0]).id, FOLDS)
    # a fold's own value is no value on val
    assert folds.usable_fold_sets(study) == study.leaderboard() == [record]
    labels = study.labels("train") | study.labels("val")
    oof = study.predictions(record.trial_id, "oof").aligned(list(labels))
    for one in (first, second):
        model = load_weights(one.config, study.weights_file(one.trial_id), classes=10)
        held_out = splits_for(one.origin, splits).val
        said = predict(model, splits, held_out, config=one.config).probs
        rows = [list(labels).index(name) for name in held_out.ids]
        np.testing.assert_allclose(oof.probs[rows], said, atol=1e-6)
    score = accuracy(oof.probs, np.array(list(labels.values())))
    assert (record.repeats, record.origin.folds, record.origin.fold) == ("abc", 2, None)
    assert record.note == f"2 folds of abc; out of fold on train and val {score:.4f}"
    val = study.predictions(record.trial_id, "val").aligned(splits.val.ids)
    assert record.value == pytest.approx(accuracy(val.probs, splits.val.labels))
    holdout = blend([study.predictions(r.trial_id, "holdout") for r in (first, second)])
    np.testing.assert_allclose(study.predictions(record.trial_id, "holdout").probs, holdout.probs)
    for split in ("val", "holdout"):
        [again] = folds.predict_with_folds(job, record, split, ("plain",))
        before = study.predictions(record.trial_id, split).aligned(again.ids)
        np.testing.assert_allclose(again.probs, before.probs, atol=1e-6)
    [flipped] = folds.predict_with_folds(job, record, "val", ("flip",))
    assert flipped.ids == splits.val.ids
    assert (flipped.probs != val.probs).any()
    assert [r.trial_id for r in folds.member_models(study, record)] == [first.trial_id, second.trial_id]
    study.weights_file(first.trial_id).unlink()
    assert folds.usable_fold_sets(study) == []


def test_a_model_that_learnt_from_everything_answers_the_test_images_alone(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = trained(Run(config, Origin(fold_in=True)), job, FOLD_IN, monkeypatch)
    assert record.value is None
    assert job.study.leaderboard() == []
    left = [p.name for p in (job.study.folder / "predictions").iterdir()]
    assert left == [f"{record.trial_id}.test.npz"]
    assert '"value": null' in job.study.trials_file.read_text()
    assert job.study.records() == [record]


def complete(run: Run, value: float, *, stage: str = "search", repeats: str = "") -> TrialRecord:
    return TrialRecord(
        run.id,
        run.config,
        State.COMPLETE,
        2,
        value,
        1.0,
        "ran",
        stage=stage,
        repeats=repeats,
        origin=run.origin,
    )


def answers(study: Study, config: TrialConfig, value: float) -> TrialRecord:
    """A configuration whose folds are there, with probabilities of its own."""
    run = Run(config)
    study.append(complete(run, value))
    for one in folds.fold_runs(run, 2):
        study.append(complete(one, value, stage=FOLD, repeats=run.id))
        write_atomic(study.weights_file(one.id), save({"x": torch.zeros(1)}))
    ids = tuple(study.labels("train") | study.labels("val"))
    oof = Predictions(ids, ("0", "1"), np.full((len(ids), 2), 0.5, np.float32))
    together = folds.fold_set(one)
    oof.save(study.predictions_file(together.id, "oof"))
    record = complete(together, value, stage=FOLDS, repeats=run.id)
    study.append(record)
    return record


def test_an_ensemble_is_chosen_out_of_fold_where_all_candidates_have_folds(
    config: TrialConfig, job: Job
) -> None:
    study = job.study
    plain = complete(Run(config), 0.5)

    def judged() -> tuple[list[TrialRecord], str, dict[str, int]]:
        return folds.ensemble_candidates(study, [plain], folds.usable_fold_sets(study))

    assert judged() == ([plain], "val", study.labels("val"))
    one = answers(study, config, 0.4)
    assert judged() == ([plain, one], "val", study.labels("val"))
    better = answers(study, replace(config, lr=1e-2), 0.6)
    candidates, on, labels = judged()
    assert (candidates, on) == ([better, one], "oof")
    study.weights_file(folds.fold_records(study, better.run)[0].trial_id).write_bytes(b"cut")
    assert judged()[0] == [plain, one]
    assert set(labels) == {*job.splits.train.ids, *job.splits.val.ids}


def test_folds_of_what_is_no_longer_the_best_do_not_shut_it_out(config: TrialConfig, job: Job) -> None:
    study = job.study
    both = [answers(study, replace(config, lr=1e-2), 0.6), answers(study, config, 0.4)]
    better = complete(Run(replace(config, lr=2e-2)), 0.9)
    study.append(better)
    candidates, on, _ = folds.ensemble_candidates(study, [better], folds.usable_fold_sets(study))
    assert (candidates, on) == ([better, *both], "val")


def test_folds_of_one_configuration_in_two_lengths_are_not_several(config: TrialConfig, job: Job) -> None:
    study = job.study
    longer = answers(study, replace(config, epochs=4), 0.5)
    one = answers(study, config, 0.6)
    study.append(replace(longer, repeats=one.repeats))
    assert folds.ensemble_candidates(study, [], folds.usable_fold_sets(study))[1] == "val"


def test_probabilities_of_folds_that_were_lost_are_gathered_anew(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = job.study
    for one in folds.fold_runs(Run(config), 2):
        trained(one, job, FOLD, monkeypatch)
    [record] = folds.record_complete_folds(study)
    file = study.predictions_file(record.trial_id, "oof")
    before = file.read_bytes()
    file.write_bytes(before[:100])
    assert folds.usable_fold_sets(study) == []
    assert folds.record_complete_folds(study) == folds.usable_fold_sets(study) == [record]
    assert study.has_predictions(record.trial_id, "oof")


def test_folds_that_are_too_dear_leave_the_choice_to_single_models(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = job.study
    plain = complete(Run(config), 0.5)
    study.append(plain)
    Predictions(tuple(study.labels("val")), ("0", "1"), np.full((len(job.splits.val), 2), 0.5)).save(
        study.predictions_file(plain.trial_id, "val")
    )
    both = [answers(study, replace(config, lr=1e-2), 0.6), answers(study, config, 0.4)]
    times = PredictionTimes(job, {("test_resnet", 32): 0.004})  # 4 s for 1,000 images, folds 8 s
    monkeypatch.setattr(PredictionTimes, "measure", lambda self, runs, views=(): None)
    for most, expected in ((9.0, (both, "oof")), (5.0, ([plain], "val"))):
        folded = _within_cost(folds.usable_fold_sets(study), times, most)
        candidates, on, labels = folds.ensemble_candidates(study, [plain], folded)
        assert (candidates, on) == expected
        assert set(ModelLibrary.from_study(study, candidates, on, labels, times, most).probs) == {
            r.trial_id for r in candidates
        }


def test_folds_that_were_trained_again_are_gathered_anew(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = job.study
    first, second = (trained(one, job, FOLD, monkeypatch) for one in folds.fold_runs(Run(config), 2))
    [old] = folds.record_complete_folds(study)
    assert folds.record_complete_folds(study) == []
    flipped = study.predictions_file(old.trial_id, "val", "flip")
    write_atomic(flipped, b"of the models before")
    study.append(replace(first, state=State.RUNNING))
    # one of two models is no member
    assert folds.record_complete_folds(study) == folds.usable_fold_sets(study) == []
    unsure = study.predictions(first.trial_id, "oof")
    replace(unsure, probs=np.full_like(unsure.probs, 0.1)).save(study.predictions_file(first.trial_id, "oof"))
    study.append(first)
    [new] = folds.record_complete_folds(study)
    assert (new.trial_id, new.at) == (old.trial_id, old.at)
    assert new.note != old.note
    assert not flipped.exists()
    kept = study.predictions(second.trial_id, "oof")
    oof = study.predictions(new.trial_id, "oof").aligned([*unsure.ids, *kept.ids])
    np.testing.assert_allclose(oof.probs[: len(unsure.ids)], 0.1)
    np.testing.assert_array_equal(oof.probs[len(unsure.ids) :], kept.probs)
    assert folds.record_complete_folds(study) == []
    assert folds.usable_fold_sets(study) == [new]


def test_what_folds_have_said_and_lost_is_made_anew_from_their_weights(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = job.study
    first, _ = (trained(one, job, FOLD, monkeypatch) for one in folds.fold_runs(Run(config), 2))
    [record] = folds.record_complete_folds(study)
    files = [study.predictions_file(first.trial_id, name) for name in ("oof", "holdout")]
    files.append(study.predictions_file(record.trial_id, "oof"))
    before = [Predictions.load(file).probs for file in files]
    files[0].write_bytes(files[0].read_bytes()[:50])
    for file in files[1:]:
        file.unlink()
    assert folds.record_complete_folds(study) == []  # left out, and not the end of all
    monkeypatch.setattr(folds, "as_task", lambda function, workers: SimpleNamespace(remote=function))
    monkeypatch.setattr("ray.get", list)
    folds.recompute_fold_predictions(job)
    assert folds.record_complete_folds(study) == folds.usable_fold_sets(study) == [record]
    for file, probs in zip(files, before, strict=True):
        np.testing.assert_allclose(Predictions.load(file).probs, probs, atol=1e-6)


def test_more_folds_than_the_images_fill_are_refused_beforehand(splits: Splits) -> None:
    folds.check_fold_count(splits, 2, 0)
    with pytest.raises(ValueError, match="folds=500: no image is left for"):
        folds.check_fold_count(splits, 500, 0)


def test_each_model_of_folds_has_the_temperature_of_its_own_answers_before_the_mean(
    config: TrialConfig, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an ensemble of folds alone; one model answers a val image, two the others."""
    study, rng = job.study, np.random.default_rng(0)
    weights: dict[TrialRecord, float] = {}

    def said(trial_id: str, split: str) -> None:
        ids = getattr(job.splits, split).ids
        odds = np.exp(3 * rng.normal(size=(len(ids), 2)))
        probs = odds / odds.sum(axis=1, keepdims=True)
        Predictions(ids, ("0", "1"), probs).save(study.predictions_file(trial_id, split))

    for lr, weight in ((1e-2, 0.75), (1e-3, 0.25)):
        record = answers(study, replace(config, lr=lr), 0.5)
        weights[record] = weight
        for one in (record, *folds.fold_records(study, record.run)):
            for split in ("val", "holdout", "test"):
                said(one.trial_id, split)
    given = {r.trial_id: t for r, t in zip(weights, (2.0, 0.5), strict=True)}
    monkeypatch.setattr(EnsembleMembers, "predict_missing", lambda self, split, views: [])
    labels = dict.fromkeys(job.splits.val.ids, 0) | dict.fromkeys(job.splits.val.ids[::2], 1)
    blended, temperature = _save_blended(EnsembleMembers(job, weights, given), ("plain",), labels)
    assert temperature == 1.0
    expected = sum(
        weight
        / 2
        * apply_temperature(study.predictions(run.trial_id, "holdout").probs, given[record.trial_id])
        for record, weight in weights.items()
        for run in folds.fold_records(study, record.run)
    )
    np.testing.assert_allclose(blended["holdout"].probs, expected, atol=1e-6)
    plain = complete(Run(config), 0.5)
    for split in ("val", "holdout", "test"):
        said(plain.trial_id, split)
    mixed = EnsembleMembers(job, {**weights, plain: 1.0}, {**given, plain.trial_id: 1.0})
    assert _save_blended(mixed, ("plain",), labels)[1] != 1.0


def test_predictions_of_different_images_are_joined() -> None:
    parts = [
        Predictions((name,), ("a", "b"), np.array([row])) for name, row in (("x", [1, 0]), ("y", [0, 1]))
    ]
    both = folds.concatenated(parts)
    assert both.ids == ("x", "y")
    np.testing.assert_array_equal(both.probs, np.eye(2))

"""A file that was cut short, anywhere, is noticed and named; what can be made anew is made anew."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from carmodels.data.cache import ImageCache, open_images
from carmodels.data.dataset import Splits
from carmodels.data.digests import file_digests
from carmodels.evaluation.predictions import Predictions
from carmodels.files import read_json, write_json
from carmodels.models.classifier import create_classifier, load_weights, save_weights, weights_damage
from carmodels.models.weights import Weights
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run
from carmodels.training.trainer import fit
from tune.finalize import blending, soups, views
from tune.finalize.views import EnsembleMembers
from tune.runtime.job import Job, Workers
from tune.runtime.worker import _leave

from synthetic import save_many

KEPT = (0.0, 0.02, 0.3, 0.7, 0.99)  # shares of a file


def cut(path: Path, share: float) -> None:
    size = path.stat().st_size
    os.truncate(path, min(size - 2, round(share * size)))  # of JSON, more than the last line's end


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """With three complete trials in its files."""
    made = Study(tmp_path / "study")
    rows = [("val", f"{number}.jpg", number % 2) for number in range(6)]
    made.begin({"metric": "accuracy", "images": {"val": 6, "test": 1}}, [*rows, ("test", "t.jpg", -1)])
    config = TrialConfig(backbone="test_resnet", image_size=32, epochs=2)
    for seed in range(3):
        made.append(ended(Run(config, Origin(seed=seed))))
    made.write_table()
    return made


def ended(run: Run) -> TrialRecord:
    curve = (EpochMetrics(1, 1.0, 1.0, 0.5, 0.5, 1.0),)
    said = "ran its 1 epochs"
    return TrialRecord(run.id, run.config, State.COMPLETE, 1, 0.5, 1.0, said, origin=run.origin, curve=curve)


@pytest.mark.parametrize("share", KEPT)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("study.json", lambda study: study.metadata),
        ("ensemble.json", lambda study: read_json(study.ensemble_file)),
        ("earlier.json", lambda study: study.earlier()),
        ("splits.csv", lambda study: study.labels("val")),
        ("predictions/a.val.npz", lambda study: study.predictions("a", "val")),
    ],
)
def test_a_file_of_a_study_cut_short_is_named(
    name: str, read: Callable[[Study], object], share: float, study: Study
) -> None:
    write_json(study.ensemble_file, {"members": ["a", "b"]})
    write_json(study.earlier_file, {"b": [ended(Run(TrialConfig("test_resnet", 32, 2))).to_json()]})
    Predictions(("x", "y"), ("0", "1"), np.full((2, 2), 0.5)).save(study.predictions_file("a", "val"))
    read(study)
    cut(study.folder / name, share)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read(study)


@pytest.mark.parametrize("share", [*KEPT, 1 / 3, 2 / 3])
def test_trials_that_a_cut_took_are_counted_or_their_line_named(share: float, study: Study) -> None:
    before = study.trials_file.read_bytes()
    cut(study.trials_file, share)
    lost = before.count(b"\n") - len(study.records())
    assert lost > 0
    assert len(study.missing_trials()) == lost
    half = study.trials_file.read_bytes().rsplit(b"\n", 1)[-1]
    assert bool(study.damaged_lines()) == bool(half and half + b"\n" not in before)


@pytest.mark.parametrize("share", KEPT)
def test_damaged_predictions_are_not_taken_for_there(share: float, study: Study) -> None:
    path = study.predictions_file("a", "val")
    assert not study.has_predictions("a", "val")
    Predictions(("x", "y"), ("0", "1"), np.full((2, 2), 0.5)).save(path)
    assert study.has_predictions("a", "val")
    cut(path, share)
    assert not study.has_predictions("a", "val")


@pytest.mark.parametrize("share", KEPT)
def test_weights_cut_short_are_noticed_and_named(share: float, tmp_path: Path) -> None:
    config = TrialConfig(backbone="test_resnet", image_size=32, epochs=2)
    path = tmp_path / "w.safetensors"
    save_weights(create_classifier(config, classes=3, weights=Weights("none")), path)
    assert weights_damage(path) == ""
    cut(path, share)
    assert weights_damage(path)
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged"):
        load_weights(config, path, classes=3)


@pytest.mark.parametrize("share", KEPT)
@pytest.mark.parametrize("name", ["index.json", "pixels.bin"])
def test_an_image_cache_cut_short_is_named_and_rebuilt(name: str, share: float, tmp_path: Path) -> None:
    paths = save_many(tmp_path / "images", 5)
    before = [image.copy() for image in open_images(paths, tmp_path / "cache", 16, None)]
    cut(tmp_path / "cache" / name, share)
    said: list[str] = []
    found = open_images(paths, tmp_path / "cache", 16, None, on_damage=said.append)
    assert [name in words for words in said] == [True]
    assert isinstance(found, ImageCache)
    for old, new in zip(before, found, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("share", KEPT)
def test_remembered_digests_cut_short_are_computed_again(share: float, tmp_path: Path) -> None:
    paths = save_many(tmp_path / "images", 3)
    manifest = tmp_path / "digests" / "d.json"
    before = file_digests(paths, manifest)
    whole = manifest.read_bytes()
    cut(manifest, share)
    assert file_digests(paths, manifest) == before
    assert manifest.read_bytes() == whole


@pytest.fixture
def left(study: Study, config: TrialConfig, splits: Splits, weights: Weights, tmp_path: Path) -> Job:
    """A trial has left its probabilities and weights; Ray's tasks run in this process."""
    job = Job(study, splits, weights, Workers(1, 1, 0.0), tmp_path / "cache")
    _leave(fit(Run(replace(config, epochs=1)), splits, weights=weights), job)
    return job


@pytest.mark.parametrize("share", KEPT)
def test_damaged_probabilities_are_made_anew_from_the_weights(
    share: float, left: Job, config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "as_task", lambda function, workers: SimpleNamespace(remote=function))
    monkeypatch.setattr("ray.get", lambda made: made)
    record = ended(Run(replace(config, epochs=1)))
    path = left.study.predictions_file(record.trial_id, "val")
    before = left.study.predictions(record.trial_id, "val")
    members = EnsembleMembers(left, {record: 1.0}, {})
    assert members.predict_missing("val", ("plain",)) == []
    cut(path, share)
    assert members.predict_missing("val", ("plain",)) == [path]
    assert (left.study.predictions(record.trial_id, "val").probs == before.probs).all()


def test_damaged_weights_stay_out_of_the_ensemble_by_name(left: Job, config: TrialConfig) -> None:
    record, said = ended(Run(replace(config, epochs=1))), list[str]()
    left.study.append(record)
    assert blending._with_intact_weights(left.study, said.append) == [record]
    path = left.study.weights_file(record.trial_id)
    cut(path, 0.5)
    assert blending._with_intact_weights(left.study, said.append) == []
    (words,) = said
    assert words.startswith(f"Left out: {path} is damaged (")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soups are made in this process."""
    monkeypatch.setattr(soups, "as_task", lambda function, workers: SimpleNamespace(remote=function))
    monkeypatch.setattr("ray.get", lambda made: made)


def ingredients(left: Job, config: TrialConfig) -> tuple[TrialRecord, TrialRecord, str]:
    """Two runs, and the name of their soup, whose weights are there."""
    record = ended(Run(replace(config, epochs=1)))
    other = replace(record, trial_id="other")
    name = soups.soup_id([record, other])
    save_weights(create_classifier(config, classes=3, weights=Weights("none")), left.study.weights_file(name))
    return record, other, name


@pytest.mark.usefixtures("here")
def test_a_soup_that_the_clock_cut_short_is_tried_again_where_there_is_time(
    left: Job, config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, other, name = ingredients(left, config)
    old = replace(record, trial_id=name, stage=soups.SOUP, reason="of 2 of 9", cut_short=True)
    left.study.append(old)
    new = replace(old, reason="of 3 of 9", cut_short=False, value=0.7)
    monkeypatch.setattr(soups, "_make_soup", lambda job, name, *more: new)
    assert soups.make_soups(left, [record, other], until=0.0) == [old]
    assert soups.make_soups(left, [record, other], until=time.time() + 99) == [new]
    monkeypatch.setattr(soups, "_make_soup", lambda job, name, *more: pytest.fail("it is whole"))
    assert soups.make_soups(left, [record, other], until=time.time() + 99) == [new]


@pytest.mark.usefixtures("here")
def test_a_soup_that_was_damaged_is_tried_again_and_not_read(
    left: Job, config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, other, name = ingredients(left, config)
    left.study.append(replace(record, trial_id=name, stage=soups.SOUP))
    tried: list[str] = []
    monkeypatch.setattr(soups, "_make_soup", lambda job, name, *more: tried.append(name))
    assert [r.trial_id for r in soups.make_soups(left, [record, other], until=0.0)] == [name]
    assert tried == []
    cut(left.study.weights_file(name), 0.5)
    assert soups.make_soups(left, [record, other], until=0.0) == []
    assert tried == [name]

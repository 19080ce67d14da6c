"""A soup is the mean of weights that fit together, with statistics of its own, and stays where it helps."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from carmodels.data.dataset import Splits
from carmodels.ensembling.network import load_ensemble
from carmodels.ensembling.soup import Ingredient, greedy_soup, mean_state, soup_key, update_batch_norm
from carmodels.evaluation.metrics import accuracy, log_loss
from carmodels.evaluation.predictions import Predictions
from carmodels.files import write_json
from carmodels.models.classifier import create_classifier, load_weights, save_weights
from carmodels.models.weights import Weights
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.forward import predict
from carmodels.training.run import Origin, Run
from carmodels.training.trainer import fit
from tune.finalize import soups
from tune.runtime.job import Job, Workers

CONFIG = TrialConfig("test_resnet", image_size=48, epochs=4, lr=3e-3)


@pytest.fixture(scope="module")
def ingredients(
    splits: Splits, weights: Weights, tmp_path_factory: pytest.TempPathFactory
) -> list[Ingredient]:
    """Three seeds of a configuration from the same head, the best on val first."""
    folder = tmp_path_factory.mktemp("weights")
    found = []
    for seed in range(3):
        run = Run(CONFIG, Origin(seed=seed, head_seed=0))
        model = fit(run, splits, weights=weights).model
        save_weights(model, folder / f"{seed}.safetensors")
        val = predict(model, splits, splits.val, config=CONFIG)
        found.append(Ingredient(str(seed), run, folder / f"{seed}.safetensors", val))
    return sorted(found, key=lambda i: -accuracy(i.val.probs, splits.val.labels))


def retrained(run: Run) -> TrialRecord:
    return TrialRecord(
        run.id, run.config, State.COMPLETE, 4, 0.5, 1.0, "ran", stage="retrain", origin=run.origin
    )


def test_what_can_be_averaged_has_backbone_head_size_and_start_in_common() -> None:
    run = Run(CONFIG)
    same = soup_key(run)
    assert same is not None
    for alike in (
        run.with_config(lr=1e-3),
        run.with_config(augment="color"),
        run.with_origin(seed=4, head_seed=0),
        run.with_config(unfreeze="head_first"),
    ):
        assert soup_key(alike) == same
    for other in (
        run.with_origin(seed=1),
        run.with_config(image_size=32),
        run.with_config(head_depth=1),
        run.with_config(backbone="test_efficientnet"),
    ):
        assert soup_key(other) not in (None, same)
    assert soup_key(run.with_config(unfreeze="frozen")) is None
    assert soup_key(run.with_origin(folds=3, fold=0)) is None


def test_the_mean_of_the_weights_is_taken_number_by_number(ingredients: list[Ingredient]) -> None:
    states = [load_file(i.weights) for i in ingredients]
    mean = mean_state([i.weights for i in ingredients])
    assert mean.keys() == states[0].keys()
    for name, value in mean.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([s[name] for s in states]).mean(0))
        else:
            assert value.dtype == states[0][name].dtype


def test_statistics_are_those_of_train_under_the_weights_in_hand(
    splits: Splits, ingredients: list[Ingredient]
) -> None:
    """A model whose weights are one model's finds that model's answers again, whatever statistics it had."""
    one = ingredients[0]
    model = load_weights(one.run.config, one.weights, classes=10)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        norm.running_mean.fill_(3.0)
        norm.running_var.fill_(9.0)
    spoilt = predict(model, splits, splits.val, config=one.run.config)
    update_batch_norm(model, one.run, splits, device="cpu")
    again = predict(model, splits, splits.val, config=one.run.config)
    labels = splits.val.labels
    assert log_loss(spoilt.probs, labels) > log_loss(one.val.probs, labels) + 0.5
    assert np.abs(again.probs - one.val.probs).mean() < 0.1
    assert not model.training


def test_a_soup_is_no_worse_on_val_than_its_best_ingredient(
    splits: Splits, ingredients: list[Ingredient]
) -> None:
    """Each candidate is kept if the mean with it is no worse than the one without: counted here by hand."""
    labels = splits.val.labels

    def score(val: Predictions) -> tuple[float, float]:
        return accuracy(val.probs, labels), -log_loss(val.probs, labels)

    def averaged(*kept: Ingredient) -> Predictions:
        model = load_weights(CONFIG, kept[0].weights, classes=10)
        model.load_state_dict(mean_state([ingredient.weights for ingredient in kept]))
        update_batch_norm(model, kept[0].run, splits, device="cpu")
        return predict(model, splits, splits.val, config=CONFIG)

    first, second, third = ingredients
    unsure = replace(first.val, probs=np.full_like(first.val.probs, 0.1))
    first = replace(first, val=unsure)  # said to be poor, so that there is a soup, whatever was learnt
    soup = greedy_soup([first, second, third], splits)
    assert soup is not None
    two, three = averaged(first, second), averaged(first, second, third)
    kept = (first, second, third) if score(three) >= score(two) else (first, second)
    assert soup.ingredients == kept
    np.testing.assert_allclose(soup.val.probs, (three if len(kept) == 3 else two).probs, atol=1e-6)
    assert score(soup.val) >= score(two) > score(unsure)
    shown = predict(soup.model, splits, splits.val, config=CONFIG)
    np.testing.assert_array_equal(shown.probs, soup.val.probs)


def test_there_is_no_soup_of_one_nor_without_time(splits: Splits, ingredients: list[Ingredient]) -> None:
    unsure = replace(ingredients[0].val, probs=np.full_like(ingredients[0].val.probs, 0.1))
    group = [replace(ingredients[0], val=unsure), *ingredients[1:]]
    assert greedy_soup(group, splits) is not None
    assert greedy_soup(group, splits, until=0) is None
    assert greedy_soup(group[:1], splits) is None


def test_copies_of_a_poor_model_make_a_soup_and_strangers_do_not(
    splits: Splits, ingredients: list[Ingredient], tmp_path: Path
) -> None:
    """The same weights twice are the same model; those from another start spoil it."""
    one = ingredients[0]
    copy = replace(one, trial_id="copy")
    model = create_classifier(one.run.config, classes=10, weights=Weights("none"))
    save_weights(model, tmp_path / "stranger.safetensors")
    stranger = replace(one, trial_id="stranger", weights=tmp_path / "stranger.safetensors")
    unsure = replace(one.val, probs=np.full_like(one.val.probs, 0.1))
    poor = replace(one, val=unsure)  # said to be poor, so that the mean of copies is better
    soup = greedy_soup([poor, copy], splits)
    assert soup is not None
    assert [i.trial_id for i in soup.ingredients] == [one.trial_id, "copy"]
    assert soup.tried == 2
    tried = greedy_soup([poor, copy, stranger], splits)
    assert tried is not None
    assert (len(tried.ingredients), tried.tried) == (2, 3)
    assert greedy_soup([one, stranger], splits) is None


def test_a_soup_says_of_how_many_models_the_time_held_a_try(
    splits: Splits,
    weights: Weights,
    ingredients: list[Ingredient],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = Study(tmp_path / "cars")
    study.begin({"metric": "accuracy"}, [])
    group = []
    for seed in range(3):  # one and the same model, said to be poor
        run = Run(CONFIG, Origin(seed=seed, head_seed=0))
        group.append(retrained(run))
        shutil.copy(ingredients[0].weights, study.weights_file(run.id))
        unsure = replace(ingredients[0].val, probs=np.full_like(ingredients[0].val.probs, 0.1))
        unsure.save(study.predictions_file(run.id, "val"))
    job = Job(study, splits, weights, Workers(1, 1, 0.0), tmp_path / "cache")
    whole = soups._make_soup(job, "whole", group, math.inf)
    assert whole is not None
    assert whole.reason.endswith(" models of 3")
    assert not whole.cut_short
    moments = iter([0.0, 2.0])  # the time is up before the third is tried
    monkeypatch.setattr("carmodels.ensembling.soup.steady_time", lambda: next(moments))
    cut = soups._make_soup(job, "cut", group, 1.0)
    assert cut is not None
    assert cut.reason == "the mean of the weights of 2 models of 3, the time was up after 2 of them"
    assert cut.cut_short


def test_a_soup_is_a_record_with_weights_and_answers_of_its_own(
    splits: Splits, weights: Weights, ingredients: list[Ingredient], tmp_path: Path
) -> None:
    study = Study(tmp_path / "cars")
    facts = {"metric": "accuracy", "classes": splits.classes, "class_names": splits.class_names}
    study.begin({**facts, "max_size": 48}, [])
    group = []
    for ingredient in ingredients:
        record = retrained(ingredient.run)
        group.append(record)
        shutil.copy(ingredient.weights, study.weights_file(record.trial_id))
        unsure = replace(ingredient.val, probs=np.full_like(ingredient.val.probs, 0.1))
        unsure.save(study.predictions_file(record.trial_id, "val"))
    assert soups._by_kind([*group, replace(group[0], origin=Origin(seed=9))]) == [group]
    assert soups._by_kind(group[:1]) == []
    name = soups.soup_id(group)
    assert name != soups.soup_id(group[::-1])
    job = Job(study, splits, weights, Workers(1, 1, 0.0), tmp_path / "cache")
    record = soups._make_soup(job, name, group, math.inf)
    assert record is not None
    assert (record.trial_id, record.stage, record.state) == (name, "soup", State.COMPLETE)
    assert len(record.ingredients) > 1
    assert set(record.ingredients) <= {r.trial_id for r in group}
    study.append(record)
    assert [r.trial_id for r in study.leaderboard()] == [name]
    write_json(
        study.ensemble_file,
        {"members": [{"trial_id": name, "weight": 1}], "temperature": 1, "tta": {"views": ["plain"]}},
    )
    images = [splits.images[row] for row in splits.holdout.rows]
    said = study.predictions(name, "holdout").aligned(splits.holdout.ids).probs
    assert np.abs(load_ensemble(study).probabilities(images) - said).max() < 1e-3

"""An ensemble earns its members: within its cost, and on images that did not choose it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from carmodels.catalog import VIEWS
from carmodels.ensembling.selection import Selection, select_ensemble
from carmodels.evaluation.metrics import accuracy, log_loss
from carmodels.evaluation.nested import NestedCheck
from carmodels.evaluation.predictions import Predictions
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.run import Run
from tune.budget.costs import Costs
from tune.budget.stages import MOST_VIEWS
from tune.finalize.blending import ModelLibrary, _holdout_results, _sentence, ensemble_seconds
from tune.runtime.job import Job, Workers

ROWS = 160
TRUTH = np.arange(ROWS) % 4
EVERY = np.arange(ROWS)


def answers(skill: float, seed: int, sharpness: float = 1.0) -> Predictions:
    """Logits with noise of 1 whose right one is `skill` above the others, all times `sharpness`."""
    logits = np.random.default_rng(seed).normal(size=(ROWS, 4))
    logits[EVERY, TRUTH] += skill
    odds = np.exp(sharpness * logits)
    ids = tuple(f"{n}.jpg" for n in EVERY)
    return Predictions(ids, tuple("abcd"), odds / odds.sum(axis=1, keepdims=True))


def library(
    probs: dict[str, Predictions], metric: str = "accuracy", most: float = math.inf, **costs: float
) -> ModelLibrary:
    return ModelLibrary(metric, probs, TRUTH, EVERY, {name: costs.get(name, 1.0) for name in probs}, most)


def test_an_ensemble_takes_at_most_what_all_members_take_to_be_shown_everything(tmp_path: Path) -> None:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [])
    splits = SimpleNamespace(val=range(100), holdout=range(100), test=range(400))
    costs = Costs({"test_resnet": {32: 0.01, 64: 0.04}}, train=500, val=100)
    workers = Workers(2, 1, 0.0)
    job = Job(study, splits, None, workers, tmp_path, costs)  # type: ignore[arg-type]
    assert math.isinf(ensemble_seconds(job))
    for size, value in ((32, 0.9), (64, 0.8)):
        config = TrialConfig("test_resnet", image_size=size, epochs=2)
        study.append(TrialRecord(Run(config).id, config, State.COMPLETE, 2, value, 1.0, "ran"))
    images = 100 * len(VIEWS) + 500 * MOST_VIEWS
    assert ensemble_seconds(job) >= 8 * 0.35 * 0.04 * images / 2
    assert ensemble_seconds(job) == pytest.approx(8 * (0.35 * 0.04 * images + 50) / 2)
    images += 4 * 500 * MOST_VIEWS
    assert ensemble_seconds(job, folds=5) == pytest.approx(8 * (0.35 * 0.04 * images + 50) / 2)
    assert math.isinf(ensemble_seconds(replace(job, costs=None)))


def test_models_that_err_apart_are_kept_and_copies_of_one_are_not() -> None:
    apart = library({f"m{n}": answers(1.5, n) for n in range(8)})
    found, check = apart.select(EVERY), apart.check(until=math.inf)
    assert len(found.weights) > 1
    assert check.helps
    assert check.gain > 0.03
    assert len(check.gains) == 5
    alone = library({"good": answers(3.0, 0), "poor": answers(0.0, 1), "worse": answers(-1.0, 2)})
    assert alone.choose(until=math.inf).weights == {"good": 1.0}
    assert not alone.check(until=math.inf).helps


def test_an_ensemble_that_is_lucky_on_val_is_not_kept() -> None:
    """One good model and many that guess: what they add on val they do not add elsewhere, on average.

    Where the check sees that, the good one stands alone.
    """
    gains, lucky, left_out = [], [], 0
    for seed in range(6, 10):
        probs = {"good": answers(2.0, 1000 + seed)}
        probs |= {f"guess{n}": answers(0.0, 100 * seed + n, sharpness=3.0) for n in range(12)}
        some = library(probs)
        selection, chosen = some.select(EVERY), some.choose(until=math.inf)
        lucky.append(selection.score - selection.single_score)
        gains.append(chosen.check.gain)
        if lucky[-1] > 0.01 and chosen.check.gain < -0.001:
            assert chosen.weights == {"good": 1.0}
            left_out += 1
    assert left_out > 0
    assert np.mean(lucky) > 0.01
    assert np.mean(gains) < np.mean(lucky) / 2


def test_where_the_check_fails_the_best_model_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    some = library({f"m{n}": answers(1.5, n) for n in range(8)})
    kept = some.choose(until=0)
    assert kept.weights == some.select(EVERY).weights
    assert kept.sentence.startswith("The ensemble is kept: ")
    single = some.select(EVERY).single
    monkeypatch.setattr(ModelLibrary, "check", lambda self, until: NestedCheck(0.8, 0.85, (-0.05,), False))
    left = some.choose(until=0)
    assert (left.weights, left.gains) == ({single: 1.0}, {single: 0.0})
    assert left.sentence.startswith("The ensemble is left out for the best model: ")


def test_each_model_has_the_temperature_that_fits_it_before_the_mean() -> None:
    probs = {"soft": answers(2.0, 1, sharpness=0.2), "sharp": answers(2.0, 2, sharpness=5.0)}
    some = library(probs, "log_loss")
    temperatures = some.temperatures(EVERY)
    assert temperatures["soft"] < 0.6 < 1.7 < temperatures["sharp"]
    for name, member in some.tempered(EVERY).items():
        assert log_loss(member.probs, TRUTH) < log_loss(probs[name].probs, TRUTH)
        np.testing.assert_array_equal(member.probs.argmax(1), probs[name].probs.argmax(1))
    plain = select_ensemble(probs, TRUTH, metric="log_loss")
    assert some.select(EVERY).score < plain.score - 0.1
    half = some.temperatures(EVERY[:60])
    assert half != temperatures


def test_the_check_looks_at_nothing_but_its_half_and_keeps_to_the_cost() -> None:
    probs = {f"m{n}": answers(1.5, n) for n in range(6)}
    dear = {f"m{n}": 5.0 for n in range(3)}
    some = library(probs, most=3.0, **dear)
    found = some.select(EVERY)
    assert set(found.weights) == {"m3", "m4", "m5"}
    assert some.best_single(list(probs)) in found.weights
    best = max(("m3", "m4", "m5"), key=lambda name: accuracy(probs[name].probs, TRUTH))
    assert some.best_single(list(probs)) == best
    free = library(probs)
    assert free.check(until=0).before >= some.check(until=0).before - 0.1


def test_what_is_chosen_on_one_half_does_not_know_the_labels_of_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = EVERY[: ROWS // 2]
    probs = {f"m{n}": answers(1.5, n) for n in range(4)}
    spoilt = np.where(EVERY < ROWS // 2, TRUTH, (TRUTH + 1) % 4)
    said: list[np.ndarray] = []

    def caught(choose: Callable[..., tuple[np.ndarray, np.ndarray]], *given: object, **more: object) -> None:
        said.extend(choose(half))

    monkeypatch.setattr("tune.finalize.blending.nested_check", caught)
    for truth in (TRUTH, spoilt):
        replace(library(probs), truth=truth).check(until=0)
    assert len(said) == 4
    for one, other in zip(said[:2], said[2:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_under_log_loss_one_model_is_as_good_as_itself_as_an_ensemble(tmp_path: Path) -> None:
    """Whoever has a temperature is compared with others that have theirs: else it wins by that alone."""
    study = Study(tmp_path / "study")
    rows = [(split, f"{n}.jpg", int(k)) for split in ("val", "holdout") for n, k in enumerate(TRUTH)]
    study.begin({"metric": "log_loss"}, rows)
    config = TrialConfig("test_resnet", image_size=32, epochs=2)
    record = TrialRecord(Run(config).id, config, State.COMPLETE, 2, 2.0, 1.0, "ran", baseline=True)
    study.append(record)
    sure = answers(1.0, 1, sharpness=5.0)
    for split in ("val", "holdout"):
        sure.save(study.predictions_file(record.trial_id, split))
    tempered = library({"sure": sure}, "log_loss").tempered(EVERY)["sure"]
    found = _holdout_results(study, tempered, record.trial_id)
    for name in ("single", "baseline"):
        assert found[name]["value"] == pytest.approx(found["ensemble"]["value"], rel=1e-3)
        assert found[f"gain_over_{name}"]["value"] == pytest.approx(0, abs=1e-3)
    assert log_loss(sure.probs, TRUTH) > found["single"]["value"] + 0.5


def test_the_best_candidate_is_that_of_calibrated_probabilities_as_in_the_selection() -> None:
    some = library({"sure": answers(2.0, 1, sharpness=9.0), "modest": answers(1.0, 2)}, "log_loss")
    plain = {name: log_loss(p.probs, TRUTH) for name, p in some.probs.items()}
    assert plain["modest"] < plain["sure"]
    assert some.best_single(["sure", "modest"]) == some.select(EVERY).single == "sure"
    assert some.score("sure") < some.score("modest") < plain["sure"]


@pytest.mark.parametrize("helps", [True, False])
def test_the_verdict_is_said(helps: bool) -> None:
    two = Selection({"a": 0.5, "b": 0.5}, 0.9, "a", 0.85, {"a": 0.0, "b": 0.05})
    check = NestedCheck(0.88, 0.86, (0.02, 0.02), helps)
    start = "The ensemble is kept" if helps else "The ensemble is left out for the best model"
    assert _sentence(two, check) == (
        f"{start}: chosen on one half of val, the ensemble has 0.8800 on the other, "
        "the best model 0.8600 (+0.0200, mean of 2 cuts)"
    )
    one = Selection({"a": 1.0}, 0.85, "a", 0.85, {"a": 0.0})
    assert _sentence(one, check).startswith("One model is the ensemble, no other helps on val; chosen on")

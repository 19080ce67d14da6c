"""Views are kept where they help on images that did not choose them; rows and ids stay together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from carmodels.catalog import AUGMENTS, BACKBONES, VIEWS, Backbone
from carmodels.data.dataset import Splits
from carmodels.data.loader import Loader
from carmodels.data.splits import Split
from carmodels.evaluation.metrics import accuracy
from carmodels.evaluation.predictions import Predictions, blend
from carmodels.models.classifier import save_weights
from carmodels.models.weights import Weights
from carmodels.records import State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import TrialConfig
from carmodels.training.forward import predict, view_size
from carmodels.training.run import Origin, Run
from carmodels.training.trainer import TrainResult, fit
from tune.finalize import views
from tune.finalize.views import EnsembleMembers, PredictionTimes, ViewsVerdict, select_tta_views
from tune.runtime.job import Job, Workers

RANDOM_VIEWS = 10


@pytest.fixture(scope="module")
def fitted(splits: Splits, weights: Weights) -> TrainResult:
    """Trained as the competitor trains: on random flips and small shifts."""
    config = TrialConfig("test_resnet", image_size=48, epochs=6, lr=3e-3, augment="shift")
    return fit(Run(config), splits, weights=weights)


@pytest.fixture(scope="module")
def unseen(splits: Splits) -> Split:
    """Val and holdout, 60 images."""
    parts = (splits.val, splits.holdout)
    ids, labels, rows = zip(*((part.ids, part.labels, part.rows) for part in parts), strict=True)
    return Split("unseen", ids[0] + ids[1], np.concatenate(labels), np.concatenate(rows))


def random_views(
    fitted: TrainResult, splits: Splits, unseen: Split, *, shuffle: bool = False
) -> list[tuple[np.ndarray, ...]]:
    """(rows, probs) for each of ten views of the competitor's: random flips and small shifts."""
    loader = Loader(
        splits.images,
        unseen,
        image_size=fitted.run.config.image_size,
        batch_size=64,
        augment=AUGMENTS["shift"],
        shuffle=shuffle,
    )
    fitted.model.eval()
    found = []
    with torch.inference_mode():
        for number in range(RANDOM_VIEWS):
            batches = [(b.positions, fitted.model(b.images).softmax(1).numpy()) for b in loader.epoch(number)]
            found.append(tuple(np.concatenate(column) for column in zip(*batches, strict=True)))
    return found


def test_the_competitors_ten_random_views_do_not_collapse_here(
    fitted: TrainResult, splits: Splits, unseen: Split
) -> None:
    plain = predict(fitted.model, splits, unseen, config=fitted.run.config)
    views = [
        Predictions(tuple(unseen.ids[row] for row in rows), splits.classes, probs)
        for rows, probs in random_views(fitted, splits, unseen, shuffle=True)
    ]
    before, after = (accuracy(p.aligned(unseen.ids).probs, unseen.labels) for p in (plain, blend(views)))
    assert before > 0.4
    assert after > before - 0.1


def test_rows_that_come_apart_from_their_ids_are_what_makes_it_collapse(
    fitted: TrainResult, splits: Splits, unseen: Split
) -> None:
    """The same ten views of the same model, each in the shuffled order in which its loader gave it."""
    by_position = np.mean([probs for _, probs in random_views(fitted, splits, unseen, shuffle=True)], axis=0)
    in_order = np.mean([probs for _, probs in random_views(fitted, splits, unseen)], axis=0)
    assert accuracy(by_position, unseen.labels) < accuracy(in_order, unseen.labels) - 0.2


# Judging, by members that are made up

IDS = tuple(f"{n}.jpg" for n in range(120))
LABELS = np.arange(120) % 4
CLASSES = tuple("abcd")


def answers(right: float, seed: int) -> np.ndarray:
    """(120, 4): so many of the answers are right, anew for every seed."""
    rng = np.random.default_rng(seed)
    guess = np.where(rng.random(120) < right, LABELS, (LABELS + rng.integers(1, 4, 120)) % 4)
    sure = rng.uniform(0.3, 0.9, (120, 1))
    probs: np.ndarray = sure * np.eye(4)[guess] + (1 - sure) / 4
    return probs.astype(np.float32)


@dataclass
class MadeUp:
    """In the place of an ensemble's members."""

    shown: dict[str, np.ndarray]
    cost: dict[str, float] = field(default_factory=lambda: dict.fromkeys(VIEWS, 1.0))
    folds: int = 1  # models that share val
    same: bool = True
    asked: list[str] = field(default_factory=list)

    @property
    def job(self) -> Any:
        splits = SimpleNamespace(val=range(120), holdout=range(120), test=range(300))
        workers = SimpleNamespace(count=2)
        study = SimpleNamespace(metric="accuracy", groups=lambda ids: np.arange(len(ids)))
        return SimpleNamespace(splits=splits, workers=workers, study=study)

    def reproduce_predictions(self) -> bool:
        return self.same

    def costs(
        self, times: PredictionTimes, views: Sequence[str], *, on_val: bool = False
    ) -> dict[str, float]:
        return {view: self.cost[view] / (self.folds if on_val else 1) for view in views}

    def predict_missing(self, split: str, views: Sequence[str]) -> list[Path]:
        return []

    def blended(self, split: str, views: Sequence[str]) -> Predictions:
        self.asked += views
        return Predictions(IDS, CLASSES, self.shown[views[0]])


def judged(
    members: MadeUp, limit: int = 4, seconds: float = math.inf, most: float = math.inf
) -> ViewsVerdict:
    labels = dict(zip(IDS, LABELS.tolist(), strict=True))
    return select_tta_views(
        cast(EnsembleMembers, members),
        labels,
        limit=limit,
        seconds=seconds,
        times=cast(PredictionTimes, None),
        max_cost=most,
    )


def views_of(right: dict[str, float]) -> dict[str, np.ndarray]:
    return {view: answers(right.get(view, 0.3), seed) for seed, view in enumerate(VIEWS)}


def test_views_that_help_are_kept_with_what_they_set_right_and_wrong() -> None:
    members = MadeUp(views_of({"plain": 0.7, "flip": 0.7, "larger": 0.75, "smaller": 0.7}))
    verdict = judged(members)
    assert verdict.views[0] == "plain"
    assert 2 < len(verdict.views) <= 4
    assert verdict.views[1] in ("flip", "larger", "smaller")
    assert verdict.nested is not None
    assert verdict.nested["gain"] > 0
    assert verdict.sentence.startswith(f"kept {', '.join(verdict.views)}: val ")
    plain = members.shown["plain"].argmax(1) == LABELS
    for row in verdict.tried:
        mean = np.mean([members.shown[view] for view in row["views"]], axis=0).argmax(1) == LABELS
        assert (row["set_right"], row["set_wrong"]) == ((mean & ~plain).sum(), (plain & ~mean).sum())
    assert [row["views"] for row in verdict.tried[:14]] == [("plain", v) for v in VIEWS if v != "plain"]
    assert len(verdict.lines) == len(verdict.tried)


def test_views_that_are_lucky_on_val_are_left_out() -> None:
    """Every view answers as the plain one, but for a few images that it guesses anew."""
    plain, rng = answers(0.7, 0), np.random.default_rng(3)
    shown = {"plain": plain}
    for view in VIEWS:
        if view != "plain":
            shown[view] = plain.copy()
            few = rng.permutation(120)[:12]
            right = np.where(rng.random(12) < 0.7, LABELS[few], (LABELS[few] + 1) % 4)
            shown[view][few] = np.eye(4)[right]
    verdict = judged(MadeUp(shown))
    assert verdict.views == ("plain",)
    assert verdict.sentence.startswith("left out plain, ")
    assert "but chosen on one half of val it gains" in verdict.sentence


def test_where_no_view_helps_none_is_kept() -> None:
    assert judged(MadeUp(views_of({"plain": 0.95}))).sentence.startswith("left out, no gain on val")
    assert judged(MadeUp(views_of({})), limit=1) == ViewsVerdict(("plain",), "not asked for")
    lost = judged(MadeUp(views_of({}), same=False))
    assert lost.sentence == "left out, the plain view does not give again what the trial left"


def test_costs_and_the_clock_are_kept_to() -> None:
    right = {"plain": 0.6, "flip": 0.9, "larger": 0.95, "smaller": 0.9}
    cost = {**dict.fromkeys(VIEWS, 1.0), "larger": 2.0}
    free = judged(MadeUp(views_of(right), cost))
    assert len(free.views) > 2
    members = MadeUp(views_of(right), cost)
    dear = judged(members, most=2.5)
    assert dear.views in (("plain", "flip"), ("plain", "smaller"))
    assert "larger" not in members.asked
    reason = "plain, larger: left out, with it 1,000 images would take 3.0 s, more than 2.5 s"
    assert reason in dear.lines
    assert judged(MadeUp(views_of(right)), most=1.5).sentence == "left out, every view would cost too much"
    hurried = MadeUp(views_of(right), dict.fromkeys(VIEWS, 100_000.0))
    assert judged(hurried, seconds=10).sentence == "left out, no time for it"
    assert hurried.asked == []
    some = MadeUp(views_of(right), dict.fromkeys(VIEWS, 1000.0))  # 60 s for val, 210 s for the rest, a view
    verdict = judged(some, seconds=500)
    assert [view for view in some.asked if view != "plain"] == ["flip", "larger", "larger_flip", "smaller"]
    assert len(verdict.views) == 2
    assert ["left_out" in row for row in verdict.tried] == 4 * [False] + (len(VIEWS) - 5) * [True]
    assert replace(verdict, tried=()).lines == []


def test_val_is_shown_to_one_model_of_folds_alone_which_leaves_time_for_more_views() -> None:
    right = {"plain": 0.6, "flip": 0.9, "larger": 0.95, "smaller": 0.9}
    members = MadeUp(views_of(right), dict.fromkeys(VIEWS, 1000.0), folds=3)  # 20 s for val, a view
    judged(members, seconds=500)
    assert len([view for view in members.asked if view != "plain"]) == 12


def test_folds_cost_what_all_their_models_do_but_on_val(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PredictionTimes, "measure", lambda self, runs, views=(): None)
    single = TrialConfig("test_resnet", image_size=32, epochs=2)
    runs = (Run(single), Run(single, Origin(folds=3)))
    records = [TrialRecord(r.id, single, State.COMPLETE, 2, 0.5, 1.0, "", origin=r.origin) for r in runs]
    job = cast(Job, None)
    members = EnsembleMembers(job, dict.fromkeys(records, 0.5), {})
    times = PredictionTimes(job, {("test_resnet", 32): 0.002})
    assert members.costs(times, ["flip"]) == {"flip": pytest.approx(8.0)}
    assert members.costs(times, ["flip"], on_val=True) == {"flip": pytest.approx(4.0)}


def test_a_view_that_is_shown_like_another_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PredictionTimes, "measure", lambda self, runs, views=(): None)
    monkeypatch.setitem(BACKBONES, "test_resnet", Backbone(0.4, fixed_size=True))
    sizes = {"test_resnet": 32, "test_efficientnet": 64}
    runs = {name: Run(TrialConfig(name, image_size=size, epochs=2)) for name, size in sizes.items()}
    fixed, free = (
        TrialRecord(r.id, r.config, State.COMPLETE, 2, 0.5, 1.0, "", origin=r.origin) for r in runs.values()
    )
    times = PredictionTimes(cast(Job, None), {("test_resnet", 32): 0.001, ("test_efficientnet", 80): 0.002})
    both = EnsembleMembers(cast(Job, None), {fixed: 0.5, free: 0.5}, {})
    assert both.costs(times, ["larger", "larger_flip"]) == {"larger": 2.0, "larger_flip": 3.0}
    assert both.costs(times, ["larger", "larger_flip"], on_val=True) == {"larger": 2.0, "larger_flip": 2.0}
    alone = EnsembleMembers(cast(Job, None), {fixed: 1.0}, {})
    assert alone.costs(times, ["flip", "larger"], on_val=True) == {"flip": 1.0, "larger": 0.0}


def test_a_view_that_all_models_are_shown_like_another_is_no_candidate() -> None:
    members = MadeUp(views_of({}), cost={**dict.fromkeys(VIEWS, 1.0), "larger": 0.0})
    verdict = judged(members)
    assert "larger" not in members.asked
    assert "plain, larger: left out, every model is shown another view alike" in verdict.lines


def test_what_is_shown_alike_is_predicted_once(
    fitted: TrainResult, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKBONES, "test_resnet", Backbone(0.4, multiple=16, fixed_size=False))
    monkeypatch.setattr(views, "as_task", lambda function, workers: SimpleNamespace(remote=function))
    monkeypatch.setattr(views, "results_of", lambda tasks, doing: list(tasks))
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [])
    run = Run(replace(fitted.run.config, image_size=16))
    record = TrialRecord(run.id, run.config, State.COMPLETE, 2, 0.5, 1.0, "")
    save_weights(fitted.model, study.weights_file(run.id))
    job = Job(study, splits, Weights("none"), Workers(1, 1, 0.0), tmp_path)
    members = EnsembleMembers(job, {record: 1.0}, {run.id: 1.0})
    averaged = members.blended("val", ("plain", "larger", "larger_flip"))
    folder = study.predictions_file(run.id, "val").parent
    assert {file.name for file in folder.iterdir()} == {f"{run.id}.val.npz", f"{run.id}.val.flip.npz"}
    once = [study.predictions(run.id, "val", view) for view in ("plain", "plain", "flip")]
    np.testing.assert_allclose(averaged.probs, blend(once).probs, atol=1e-6)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("size", [16, 1639, 2048])
def test_a_view_is_of_a_size_that_a_configuration_may_have(view: str, size: int) -> None:
    config = TrialConfig("test_resnet", image_size=size, epochs=1)
    shown = view_size(config, view)
    assert replace(config, image_size=shown).image_size == shown  # as is done to time it
    assert shown == size or VIEWS[view].scale != 1


@pytest.mark.parametrize("multiple", [1, 14, 32])
def test_a_view_keeps_to_the_multiples_of_its_backbone(
    multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKBONES, "test_resnet", Backbone(0.5, multiple=multiple))
    for size in (multiple * -(-16 // multiple), 2048 // multiple * multiple):
        for view in VIEWS:
            config = TrialConfig("test_resnet", image_size=size, epochs=1)
            assert view_size(config, view) % multiple == 0
            replace(config, image_size=view_size(config, view))

"""Rows are matched by id, metrics are scikit-learn's, an ensemble is never worse than its best member."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from carmodels.ensembling.selection import choose_views, select_ensemble
from carmodels.evaluation.calibration import fit_temperature, with_temperature
from carmodels.evaluation.intervals import (
    accuracy_interval,
    bootstrap_interval,
    independent_images,
    paired_gain,
    proportion_interval,
    proportion_prediction_interval,
    score_interval,
    score_prediction_interval,
)
from carmodels.evaluation.metrics import METRICS, accuracy, count_fixed_and_broken, log_loss
from carmodels.evaluation.nested import nested_check
from carmodels.evaluation.predictions import Predictions, blend

CLASSES = ("0", "1", "2", "9")
SEEDS = st.integers(0, 2**32 - 1)


def drawn_labels(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(len(CLASSES), size=rows)


def drawn(labels: np.ndarray, seed: int, skill: float = 1.0) -> Predictions:
    """A model whose logit at the label is `skill` above that of the others, with noise of 1 on each."""
    logits = np.random.default_rng(seed).normal(size=(len(labels), len(CLASSES)))
    logits[np.arange(len(labels)), labels] += skill
    odds = np.exp(logits)
    ids = tuple(f"{row}.jpg" for row in range(len(labels)))
    return Predictions(ids, CLASSES, odds / odds.sum(axis=1, keepdims=True))


def shuffled(predictions: Predictions, seed: int) -> Predictions:
    return predictions.aligned(np.random.default_rng(seed).permutation(predictions.ids).tolist())


@pytest.fixture
def labels() -> np.ndarray:
    return drawn_labels(60)


@pytest.fixture
def one(labels: np.ndarray) -> Predictions:
    return drawn(labels, seed=1)


# Predictions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ("a", "a")}, r"more than once in ids: 'a'"),
        ({"ids": ("a",)}, r"shape \(2, 2\).* 1 ids and 2 classes"),
        ({"ids": (1, 2)}, r"ids must be text: '1', '2'"),
        ({"classes": ("x", "x")}, r"more than once in classes: 'x'"),
        ({"classes": ("x", "y", "z")}, r"2 ids and 3 classes"),
        ({"probs": np.array([0.5, 0.5])}, r"shape \(2,\)"),
        ({"probs": np.array([[0.5, 0.5], [np.nan, 1.0]])}, r"not finite: 'b'"),
        ({"probs": np.array([[1.5, -0.5], [0.5, 0.5]])}, r"negative or not finite: 'a'"),
        ({"probs": np.array([[0.5, 0.5], [0.5, 0.498]])}, r"sum to 1, not 0\.998: 'b'"),
    ],
)
def test_what_is_no_table_of_probabilities_is_refused(changes: dict[str, object], message: str) -> None:
    sound: dict[str, object] = {
        "ids": ("a", "b"),
        "classes": ("x", "y"),
        "probs": np.array([[0.5, 0.5], [0, 1]]),
    }
    with pytest.raises(ValueError, match=message):
        Predictions(**(sound | changes))  # type: ignore[arg-type]


def test_predictions_do_not_change_with_the_array_they_were_made_from() -> None:
    probs = np.array([[0.5, 0.5]], dtype=np.float32)
    made = Predictions(("a",), ("x", "y"), probs)
    probs[0] = (0, 1)
    assert made.probs.tolist() == [[0.5, 0.5]]
    with pytest.raises(ValueError, match="read-only"):
        made.probs[0] = 0


def test_what_is_saved_is_what_is_loaded(tmp_path: Path, one: Predictions) -> None:
    one = replace(one, ids=("ünï/код 车.jpg", "", *one.ids[2:]))
    one.save(tmp_path / "one.npz")
    loaded = Predictions.load(tmp_path / "one.npz")
    assert (loaded.ids, loaded.classes) == (one.ids, one.classes)
    np.testing.assert_array_equal(loaded.probs, one.probs, strict=True)


def test_predictions_for_no_image_are_saved_and_loaded(tmp_path: Path) -> None:
    Predictions((), CLASSES, np.empty((0, len(CLASSES)))).save(tmp_path / "none.npz")
    assert Predictions.load(tmp_path / "none.npz").ids == ()


def test_a_file_damaged_anywhere_is_refused_by_name_or_reads_as_it_was_written(tmp_path: Path) -> None:
    path, one = tmp_path / "one.npz", Predictions(("a", "b"), ("x", "y"), np.array([[0.5, 0.5], [0, 1]]))
    one.save(path)
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            loaded = Predictions.load(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 - most places are refused, not all (a date, say)
            refused += 1
        else:
            assert (loaded.ids, loaded.classes, loaded.probs.tolist()) == (
                one.ids,
                one.classes,
                one.probs.tolist(),
            )
    assert refused > len(whole) / 2


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_file_cut_off_is_refused_by_name(tmp_path: Path, one: Predictions, kept: int) -> None:
    path = tmp_path / "one.npz"
    one.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"one\.npz is damaged"):
        Predictions.load(path)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.eye(2))
    np.savez(tmp_path / "others.npz", probs=np.eye(2))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
            Predictions.load(path)


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    ids = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.savez(tmp_path / "odd.npz", ids=ids, classes=np.array(["x"]), probs=np.ones((1, 1)))
    with pytest.raises(ValueError, match=r"odd\.npz.*pickle"):
        Predictions.load(tmp_path / "odd.npz")
    assert not (tmp_path / "sprung").exists()


def test_a_file_that_is_not_there_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Predictions.load(tmp_path / "nowhere.npz")


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS)
def test_aligned_rows_keep_their_ids(seed: int) -> None:
    one = drawn(drawn_labels(7), seed=1)
    there = shuffled(one, seed)
    of_id = dict(zip(one.ids, one.probs.tolist(), strict=True))
    assert dict(zip(there.ids, there.probs.tolist(), strict=True)) == of_id
    np.testing.assert_array_equal(there.aligned(one.ids).probs, one.probs)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a"], r"^missing from the ids asked for: 'b'$"),
        (["a", "b", "c"], r"^missing from the predictions: 'c'$"),
        (["a", "c"], r"^missing from the predictions: 'c'; missing from the ids asked for: 'b'$"),
        (["a", "b", "a"], r"^more than once in the ids asked for: 'a'$"),
        ([f"{n}" for n in range(9)], r"'0', '1', '2', '3', '4' \.\.\. \(9 in all\)"),
    ],
)
def test_ids_that_do_not_match_are_refused_by_name(ids: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictions(("a", "b"), ("x",), np.ones((2, 1))).aligned(ids)


# Metrics


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, rows=st.integers(1, 12))
def test_metrics_agree_with_scikit_learn(seed: int, rows: int) -> None:
    labels = drawn_labels(rows, seed)
    probs = drawn(labels, seed).probs
    guesses = probs.argmax(axis=1)
    assert accuracy(probs, labels) == pytest.approx(sklearn.metrics.accuracy_score(labels, guesses))
    assert METRICS["macro_f1"].score(probs, labels) == pytest.approx(
        sklearn.metrics.f1_score(labels, guesses, average="macro")
    )
    expected = sklearn.metrics.log_loss(labels, probs, labels=range(len(CLASSES)))
    assert log_loss(probs, labels) == pytest.approx(expected, rel=1e-5)


def test_a_sure_and_wrong_row_costs_as_much_as_in_scikit_learn() -> None:
    probs = np.array([[1, 0], [0, 1]], dtype=np.float32)
    expected = sklearn.metrics.log_loss([1, 1], probs, labels=[0, 1])
    assert log_loss(probs, np.array([1, 1])) == pytest.approx(expected)


@pytest.mark.parametrize("name", METRICS)
def test_a_stack_is_scored_like_its_members_one_by_one(name: str, labels: np.ndarray) -> None:
    stack = np.stack([drawn(labels, seed).probs for seed in range(5)])
    row = METRICS[name]
    np.testing.assert_array_equal(row.scores(stack, labels), [row.score(probs, labels) for probs in stack])


@pytest.mark.parametrize("name", METRICS)
def test_a_better_model_has_a_gain_over_a_worse_one(name: str, labels: np.ndarray) -> None:
    row = METRICS[name]
    good, poor = (row.score(drawn(labels, 1, skill).probs, labels) for skill in (4.0, 0.0))
    assert row.gain(good, poor) > 0 > row.gain(poor, good)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((2, 1), dtype=int), "shape"),
        (np.zeros(1, dtype=int), "shape"),
        (np.array([0, -1]), "'-1', '0'"),
        (np.array([0, 2]), "'0', '2'"),
        (np.array([0.0, 1.0]), "integers from 0 to 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(name: str, wrong: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METRICS[name].score(np.eye(2), wrong)


@pytest.mark.parametrize("name", METRICS)
def test_no_image_has_no_score(name: str) -> None:
    with pytest.raises(ValueError, match="no image"):
        METRICS[name].score(np.empty((0, 2)), np.empty(0, dtype=int))


# Blending


def test_blend_of_copies_is_the_copy(one: Predictions) -> None:
    np.testing.assert_allclose(blend([one, one, one]).probs, one.probs, rtol=1e-6)


def test_weights_need_not_sum_to_one(one: Predictions, labels: np.ndarray) -> None:
    other = drawn(labels, seed=2)
    np.testing.assert_allclose(
        blend([one, other], [3, 1]).probs, 0.75 * one.probs + 0.25 * other.probs, rtol=1e-6
    )


@settings(max_examples=50, deadline=None)
@given(seeds=st.lists(SEEDS, min_size=3, max_size=3), order=st.permutations(range(3)))
def test_a_blend_does_not_depend_on_the_order_of_rows_or_members(seeds: list[int], order: list[int]) -> None:
    labels = drawn_labels(9)
    members, weights = [drawn(labels, seed=n) for n in range(3)], [0.5, 0.2, 0.3]
    expected = blend(members, weights)
    mixed = blend([shuffled(members[n], seeds[n]) for n in order], [weights[n] for n in order])
    np.testing.assert_allclose(mixed.aligned(expected.ids).probs, expected.probs, rtol=1e-5)


def test_a_shuffled_copy_blends_into_the_copy_where_positions_would_have_lost_the_labels() -> None:
    labels = drawn_labels(500)
    one = drawn(labels, seed=1, skill=4.0)
    mixed = shuffled(one, seed=2)
    assert accuracy(blend([one, mixed]).probs, labels) == accuracy(one.probs, labels) > 0.9
    assert accuracy((one.probs + mixed.probs) / 2, labels) < 0.7


def test_members_with_other_ids_or_classes_are_refused_by_name(one: Predictions) -> None:
    with pytest.raises(
        ValueError, match=r"missing from members\[1\]: '0\.jpg'; missing from members\[0\]: 'x'"
    ):
        blend([one, replace(one, ids=("x", *one.ids[1:]))])
    with pytest.raises(
        ValueError, match=r"'0', '1', '2', '9' in members\[0\], '0', '1', '9', '2' in members\[2\]"
    ):
        blend([one, one, replace(one, classes=("0", "1", "9", "2"))])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, np.nan], [1.0, np.inf]])
def test_weights_that_are_no_shares_are_refused(one: Predictions, weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weights=\["):
        blend([one, one], weights)


def test_nothing_to_blend_is_an_error() -> None:
    with pytest.raises(ValueError, match="no predictions"):
        blend([])


# Ensemble selection


def a_library(labels: np.ndarray, members: int, seed: int = 0) -> dict[str, Predictions]:
    skills = np.random.default_rng(seed).uniform(0, 1.5, size=members)
    return {f"m{n}": drawn(labels, seed * 1000 + n, skill) for n, skill in enumerate(skills)}


def greedy_by_hand(
    library: dict[str, Predictions], labels: np.ndarray, metric: str, rounds: int
) -> list[str]:
    """Caruana's selection without bags, each candidate blended and scored on its own."""

    def cost(names: list[str]) -> tuple[float, float]:
        probs = blend([library[name] for name in names]).probs
        return METRICS[metric].gain(0.0, METRICS[metric].score(probs, labels)), log_loss(probs, labels)

    ranked = sorted(library, key=lambda name: cost([name]))
    path = [min((ranked[:n] for n in range(1, len(ranked) + 1)), key=cost)]
    for _ in range(rounds):
        path.append(min(([*path[-1], name] for name in ranked), key=cost))
    return min(path, key=cost)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(4))
def test_selection_is_the_greedy_one_tried_by_hand(metric: str, seed: int) -> None:
    labels = drawn_labels(60, seed)
    library = a_library(labels, 5, seed)
    chosen = greedy_by_hand(library, labels, metric, rounds=6)
    found = select_ensemble(library, labels, metric=metric, rounds=6)
    expected = {name: chosen.count(name) / len(chosen) for name in set(chosen)}
    assert found.weights == pytest.approx(expected)
    assert METRICS[metric].gain(found.score, found.single_score) > 0


@settings(max_examples=50, deadline=None)
@given(
    seed=SEEDS,
    members=st.integers(1, 12),
    cap=st.integers(1, 4),
    bags=st.integers(1, 4),
    metric=st.sampled_from(list(METRICS)),
)
def test_an_ensemble_is_never_worse_than_its_best_member(
    seed: int, members: int, cap: int, bags: int, metric: str
) -> None:
    labels, row = drawn_labels(30, seed), METRICS[metric]
    library = a_library(labels, members, seed % 1000)
    found = select_ensemble(library, labels, metric=metric, rounds=5, bags=bags, max_members=cap, seed=seed)

    singles = {name: row.score(member.probs, labels) for name, member in library.items()}
    assert found.single_score == singles[found.single]
    assert all(row.gain(found.single_score, score) >= 0 for score in singles.values())
    assert row.gain(found.score, found.single_score) >= 0
    mixed = blend([library[name] for name in found.weights], list(found.weights.values()))
    assert found.score == row.score(mixed.probs, labels)

    shares = list(found.weights.values())
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0
    assert shares == sorted(shares, reverse=True)
    assert len(shares) <= cap
    assert list(found.gains) == list(found.weights)
    assert sum(found.gains.values()) == pytest.approx(row.gain(found.score, found.single_score))


def test_models_with_errors_of_their_own_make_a_better_ensemble() -> None:
    labels = drawn_labels(300)
    found = select_ensemble(a_library(labels, 20), labels, metric="accuracy")
    assert found.score > found.single_score + 0.05


def test_where_no_other_model_helps_the_ensemble_is_the_best_one(labels: np.ndarray) -> None:
    library = {"poor": drawn(labels, 1, skill=-5.0), "good": drawn(labels, 2, skill=8.0)}
    found = select_ensemble(library, labels, metric="accuracy")
    assert (found.weights, found.single, found.gains) == ({"good": 1.0}, "good", {"good": 0.0})


def test_between_models_of_one_accuracy_the_lower_log_loss_wins() -> None:
    labels = np.zeros(4, dtype=int)
    probs = {"unsure": [0.6, 0.4], "sure": [0.9, 0.1], "doubtful": [0.7, 0.3]}
    library = {
        name: Predictions(tuple("abcd"), ("x", "y"), np.array([row] * 4)) for name, row in probs.items()
    }
    found = select_ensemble(library, labels, metric="accuracy")
    assert (found.weights, found.single) == ({"sure": 1.0}, "sure")


def test_two_models_that_know_half_each_are_found_among_many_that_are_better_alone() -> None:
    labels = drawn_labels(200)
    many = {f"m{n}": drawn(labels, n, skill=2.0) for n in range(18)}
    unsure, sure = np.full((200, len(CLASSES)), 0.25), np.eye(len(CLASSES))[labels]
    first_half = (np.arange(200) < 100)[:, None]
    halves = {
        "first": replace(many["m0"], probs=np.where(first_half, sure, unsure)),
        "second": replace(many["m0"], probs=np.where(first_half, unsure, sure)),
    }
    found = select_ensemble(many | halves, labels, metric="log_loss", max_members=4)
    assert found.single in many
    assert set(halves) <= set(found.weights)


def test_members_are_matched_by_id_in_selection_too() -> None:
    labels = drawn_labels(200)
    library = a_library(labels, 6)
    mixed = {name: shuffled(m, seed=n) if n else m for n, (name, m) in enumerate(library.items())}
    assert select_ensemble(mixed, labels, metric="accuracy") == select_ensemble(
        library, labels, metric="accuracy"
    )
    mixed["m3"] = replace(mixed["m3"], ids=("x", *mixed["m3"].ids[1:]))
    with pytest.raises(ValueError, match=r"missing from m3: .*missing from m0: 'x'"):
        select_ensemble(mixed, labels, metric="accuracy")


def test_bags_follow_the_seed() -> None:
    labels = drawn_labels(100)
    library = a_library(labels, 20)
    first, again, other = (
        select_ensemble(library, labels, metric="log_loss", max_members=3, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.weights != other.weights


@pytest.mark.parametrize("wrong", [{"metric": "f1"}, {"rounds": -1}, {"bags": 0}, {"max_members": 0}])
def test_options_that_make_no_sense_are_refused(
    one: Predictions, labels: np.ndarray, wrong: dict[str, object]
) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        select_ensemble({"one": one}, labels, **({"metric": "accuracy"} | wrong))  # type: ignore[arg-type]


# What members may cost


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, members=st.integers(1, 10), bags=st.integers(1, 3), share=st.floats(0.05, 1.2))
@example(seed=0, members=6, bags=2, share=1.1)
def test_members_together_cost_no_more_than_they_may(
    seed: int, members: int, bags: int, share: float
) -> None:
    labels = drawn_labels(40, seed)
    library = a_library(labels, members, seed % 1000)
    prices = np.random.default_rng(seed).uniform(1, 5, members)
    costs = dict(zip(library, prices.tolist(), strict=True))
    most = max(float(share * prices.sum()), float(prices.min()))
    found = select_ensemble(
        library, labels, metric="accuracy", rounds=6, bags=bags, max_members=4, costs=costs, max_cost=most
    )
    assert sum(costs[name] for name in found.weights) <= most
    assert costs[found.single] <= most
    affordable = {name: member for name, member in library.items() if costs[name] <= most}
    best = max(METRICS["accuracy"].score(member.probs, labels) for member in affordable.values())
    assert found.single_score == best
    free = select_ensemble(library, labels, metric="accuracy", rounds=6, bags=bags, max_members=4)
    if most >= prices.sum():
        assert found == free


def test_a_cheap_pair_is_taken_where_the_dear_one_leaves_no_room() -> None:
    labels = drawn_labels(200)
    library = {f"m{n}": drawn(labels, n, skill=1.5) for n in range(5)}
    costs = {"m0": 9.0, "m1": 9.0, "m2": 1.0, "m3": 1.0, "m4": 1.0}
    found = select_ensemble(library, labels, metric="log_loss", costs=costs, max_cost=3)
    assert set(found.weights) == {"m2", "m3", "m4"}
    with pytest.raises(ValueError, match=r"max_cost=0\.5 is less than the cheapest member costs, 1"):
        select_ensemble(library, labels, metric="log_loss", costs=costs, max_cost=0.5)


# Views


def test_views_are_added_one_by_one_where_each_helps_most() -> None:
    labels = drawn_labels(80)
    shown = {f"v{n}": drawn(labels, n, skill=1.0).probs for n in range(6)}
    found = choose_views(shown, labels, metric="log_loss", max_views=6)
    assert found[0] == "v0"

    def loss(views: tuple[str, ...]) -> float:
        return log_loss(np.mean([shown[v] for v in views], axis=0), labels)

    for count in range(1, len(found)):
        others = [(*found[:count], v) for v in shown if v not in found[:count]]
        assert loss(found[: count + 1]) == min(map(loss, others)) < loss(found[:count])
    assert all(loss((*found, v)) >= loss(found) for v in shown if v not in found)
    assert choose_views(shown, labels, metric="log_loss", max_views=2) == found[:2]


def test_views_that_do_not_help_are_not_added_and_dear_ones_not_tried() -> None:
    labels = drawn_labels(80)
    good, poor = drawn(labels, 1, skill=4.0).probs, drawn(labels, 2, skill=-4.0).probs
    assert choose_views({"plain": good, "poor": poor}, labels, metric="accuracy", max_views=2) == ("plain",)
    better = {"plain": poor, "good": good}
    assert choose_views(better, labels, metric="accuracy", max_views=2) == ("plain", "good")
    costs = {"plain": 1.0, "good": 2.0}
    limits = {"metric": "accuracy", "max_views": 2, "costs": costs}
    assert choose_views(better, labels, **limits, max_cost=2.9) == ("plain",)
    assert choose_views(better, labels, **limits, max_cost=3) == ("plain", "good")


# A nested check


def test_halves_hold_half_of_each_class_and_what_is_chosen_on_one_is_scored_on_the_other() -> None:
    labels = np.repeat([0, 1, 2], [10, 21, 8])
    seen: list[np.ndarray] = []
    right, wrong = np.eye(3)[labels], np.eye(3)[(labels + 1) % 3]

    def choose(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Right on what it was chosen on, and nowhere else; what it would replace is right everywhere."""
        seen.append(rows)
        inside = np.isin(np.arange(len(labels)), rows)[:, None]
        return np.where(inside, right, wrong), right

    found = nested_check(choose, labels, metric="accuracy", repeats=3)
    assert (found.chosen, found.before, found.gains, found.helps) == (0, 1, (-1, -1, -1), False)
    assert len(seen) == 6
    for one, other in zip(seen[::2], seen[1::2], strict=True):
        assert sorted([*one, *other]) == list(range(len(labels)))
        for counts in (np.bincount(labels[one], minlength=3), np.bincount(labels[other], minlength=3)):
            assert np.abs(counts - np.array([5, 10.5, 4])).max() <= 1
    assert any(set(seen[0]) != set(rows) for rows in seen[2:])


def test_the_luckiest_of_many_views_gains_where_it_was_chosen_and_hardly_in_the_nested_check() -> None:
    found = []
    for seed in range(12):
        labels, rng = drawn_labels(150, seed), np.random.default_rng(seed)
        plain = drawn(labels, seed, skill=2.0).probs
        right = accuracy(plain, labels)
        shown = {"plain": plain}
        for n in range(15):  # the same answers, but for some guessed anew, as often right as the others
            few = rng.permutation(len(labels))[:20]
            guess = np.where(rng.random(20) < right, labels[few], (labels[few] + rng.integers(1, 4, 20)) % 4)
            probs = plain.copy()
            probs[few] = np.eye(len(CLASSES))[guess]
            shown[f"v{n}"] = probs
        found.append(gains_of_views(shown, labels))
    lucky, honest = np.mean(found, axis=0)
    assert lucky > 0.02
    assert abs(honest) < lucky / 3


def gains_of_views(shown: dict[str, np.ndarray], labels: np.ndarray) -> tuple[float, float]:
    """Of the views chosen on all images, there; and of choosing them on halves, on the others."""

    def choose(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        some = {view: probs[rows] for view, probs in shown.items()}
        views = choose_views(some, labels[rows], metric="accuracy", max_views=2)
        return np.mean([shown[view] for view in views], axis=0), shown["plain"]

    chosen, before = choose(np.arange(len(labels)))
    honest = nested_check(choose, labels, metric="accuracy").gain
    return accuracy(chosen, labels) - accuracy(before, labels), honest


def test_near_duplicates_are_in_one_half_so_knowing_them_by_heart_gains_nothing() -> None:
    """A model that knows the labels of the images it was chosen on and of their copies, and no others."""
    labels = np.repeat(drawn_labels(100), 2)
    groups = np.repeat(np.arange(100), 2)
    guess = np.eye(4)[(labels + 1) % 4]

    def choose(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(np.isin(groups, groups[rows])[:, None], np.eye(4)[labels], guess), guess

    assert nested_check(choose, labels, metric="accuracy").chosen > 0.4
    apart = nested_check(choose, labels, metric="accuracy", groups=groups)
    assert apart.chosen == 0
    assert not apart.helps


@pytest.mark.parametrize("metric", METRICS)
def test_what_helps_everywhere_helps_in_the_nested_check(metric: str) -> None:
    labels = drawn_labels(120)
    better, worse = drawn(labels, 1, skill=3.0).probs, drawn(labels, 2, skill=0.5).probs
    assert nested_check(lambda rows: (better, worse), labels, metric=metric).gain > 0
    assert nested_check(lambda rows: (better, worse), labels, metric=metric).helps
    assert not nested_check(lambda rows: (worse, better), labels, metric=metric).helps
    assert not nested_check(lambda rows: (better, better), labels, metric=metric).helps
    alone = nested_check(lambda rows: (better[:1], worse[:1]), labels[:1], metric=metric, repeats=2)
    assert not alone.helps
    assert len(nested_check(lambda rows: (better, worse), labels, metric=metric, until=0).gains) == 1


# Temperature


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_the_temperature_that_spoilt_the_probabilities_is_found_again(temperature: float) -> None:
    rng = np.random.default_rng(0)
    honest = drawn(np.zeros(20_000, dtype=int), seed=0, skill=0.0)
    labels = (rng.random((20_000, 1)) > honest.probs.cumsum(axis=1)).sum(axis=1).clip(max=len(CLASSES) - 1)
    spoilt = with_temperature(honest, 1 / temperature)
    assert fit_temperature(spoilt.probs, labels) == pytest.approx(temperature, rel=0.05)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, temperature=st.floats(0.05, 20))
def test_no_temperature_is_better_than_the_one_found_or_changes_a_guess(
    seed: int, temperature: float
) -> None:
    labels = drawn_labels(30, seed)
    one = drawn(labels, seed)
    other = with_temperature(one, temperature)
    found = with_temperature(one, fit_temperature(one.probs, labels))
    held_against = math.log(temperature) ** 2 / (2 * 0.5**2 * len(labels))
    assert log_loss(found.probs, labels) <= log_loss(other.probs, labels) + held_against + 1e-4
    np.testing.assert_array_equal(found.probs.argmax(axis=1), one.probs.argmax(axis=1))


def test_a_temperature_of_two_takes_the_root_of_the_odds() -> None:
    one = Predictions(("a",), ("x", "y"), np.array([[0.2, 0.8]]))  # odds 1 : 4
    np.testing.assert_allclose(with_temperature(one, 2.0).probs, [[1 / 3, 2 / 3]], rtol=1e-6)


def test_a_temperature_of_one_changes_nothing(one: Predictions) -> None:
    np.testing.assert_allclose(with_temperature(one, 1.0).probs, one.probs, rtol=1e-5)


def test_a_few_right_answers_are_no_proof_of_certainty() -> None:
    probs = np.array([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9]])
    assert 0.3 < fit_temperature(probs, np.array([0, 0, 1, 1])) < 1
    many = np.tile(probs, (500, 1))
    assert fit_temperature(many, np.tile([0, 0, 1, 1], 500)) < 0.2


@pytest.mark.parametrize("labels", [[0, 1], [1, 0]])
def test_rows_that_are_all_sure_have_a_finite_temperature(labels: list[int]) -> None:
    assert 0 < fit_temperature(np.eye(2, dtype=np.float32), np.array(labels)) <= 20


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_a_temperature_that_is_none_is_refused(one: Predictions, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature="):
        with_temperature(one, temperature)


# Intervals


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_accuracy_interval_is_the_published_one(right: int, images: int, low: float, high: float) -> None:
    labels = (np.arange(images) >= right).astype(int)
    found = accuracy_interval(np.tile([0.9, 0.1], (images, 1)), labels)
    assert (found.value, found.low, found.high) == pytest.approx((right / images, low, high), abs=5e-5)


def test_more_confidence_needs_a_wider_interval(one: Predictions, labels: np.ndarray) -> None:
    narrow, wide = (accuracy_interval(one.probs, labels, confidence) for confidence in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(("images", "resamples"), [(60, 200), (600, 2000)])  # the second is done in parts
def test_the_bootstrap_is_the_one_drawn_row_by_row(name: str, images: int, resamples: int) -> None:
    labels = drawn_labels(images)
    probs = drawn(labels, seed=1).probs
    rows = np.random.default_rng(3).integers(images, size=(resamples, images), dtype=np.int32)
    by_hand = [METRICS[name].score(probs[picks], labels[picks]) for picks in rows]
    found = bootstrap_interval(name, probs, labels, seed=3, resamples=resamples)
    assert found.value == METRICS[name].score(probs, labels)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])))


def test_the_bootstrap_of_accuracy_is_close_to_the_wilson_interval() -> None:
    labels = drawn_labels(400)
    probs = drawn(labels, seed=1).probs
    wilson, bootstrap = (
        score_interval("accuracy", probs, labels),
        bootstrap_interval("accuracy", probs, labels),
    )
    assert wilson == accuracy_interval(probs, labels)
    assert (bootstrap.low, bootstrap.high) == pytest.approx((wilson.low, wilson.high), abs=0.01)


@pytest.mark.parametrize("name", METRICS)
def test_a_gain_over_a_worse_model_is_positive_whatever_the_metric(name: str, labels: np.ndarray) -> None:
    good, poor = drawn(labels, 1, skill=4.0).probs, drawn(labels, 2, skill=0.0).probs
    forth, back = paired_gain(name, good, poor, labels), paired_gain(name, poor, good, labels)
    assert 0 < forth.low < forth.value < forth.high
    assert (back.value, back.low, back.high) == pytest.approx((-forth.value, -forth.high, -forth.low))


def test_a_model_has_no_gain_over_itself(one: Predictions, labels: np.ndarray) -> None:
    same = paired_gain("accuracy", one.probs, one.probs, labels)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_images_both_models_get_right_do_not_blur_their_difference() -> None:
    labels = np.zeros(1000, dtype=int)
    worse = np.tile([0.9, 0.1], (1000, 1))
    worse[:500] = (0.1, 0.9)
    better = worse.copy()
    better[:20] = (0.9, 0.1)
    alone, paired = score_interval("accuracy", better, labels), paired_gain("accuracy", better, worse, labels)
    assert paired.low > 0
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_changed_minds_are_counted_each_way() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    before, after = np.eye(2)[[0, 1, 1, 0, 1]], np.eye(2)[[1, 0, 0, 0, 1]]
    assert count_fixed_and_broken(before, after, labels) == (2, 1)
    assert count_fixed_and_broken(after, before, labels) == (1, 2)


def test_a_prediction_interval_of_ever_more_images_is_the_bootstrap_interval() -> None:
    for hits, total in ((0, 20), (13, 20), (270, 300), (300, 300)):
        wilson = proportion_interval(hits, total)
        predicted = proportion_prediction_interval(hits, total, 10**9)
        np.testing.assert_allclose(
            (predicted.low, predicted.high), (wilson.low, wilson.high), rtol=0, atol=1e-6
        )
        widths = [proportion_prediction_interval(hits, total, m) for m in (10, 100, 1000)]
        assert all(a.high - a.low > b.high - b.low for a, b in pairwise([*widths, wilson]))


@pytest.mark.parametrize(("total", "hidden"), [(150, 300), (297, 660), (60, 2000), (2000, 60)])
def test_of_hidden_shares_95_in_100_lie_in_their_prediction_interval(total: int, hidden: int) -> None:
    """No simulation: summed over everything that can be seen and everything that can be hidden."""
    found = [proportion_prediction_interval(hits, total, hidden) for hits in range(total + 1)]
    ends = np.array([(i.low, i.high) for i in found])[:, :, None]
    shares = np.arange(hidden + 1) / hidden
    inside = (shares >= ends[:, 0] - 1e-12) & (shares <= ends[:, 1] + 1e-12)
    for p in np.linspace(0.3, 0.98, 30):
        seen, later = (binom.pmf(np.arange(count + 1), count, p) for count in (total, hidden))
        assert 0.945 <= seen @ inside @ later <= 0.97


def test_an_interval_that_forgets_the_hidden_sample_covers_too_seldom() -> None:
    """What the prediction interval is for: Wilson's says where the true share lies, not the hidden one."""
    wilson = np.array([(i.low, i.high) for i in (proportion_interval(h, 297) for h in range(298))])
    shares = np.arange(661)[None] / 660
    inside = (shares >= wilson[:, :1]) & (shares <= wilson[:, 1:])
    assert binom.pmf(np.arange(298), 297, 0.85) @ inside @ binom.pmf(np.arange(661), 660, 0.85) < 0.92


@pytest.mark.parametrize("name", ["log_loss", "macro_f1"])
def test_of_other_metrics_about_95_in_100_lie_in_their_interval(name: str) -> None:
    truth = drawn_labels(30_000)
    probs = drawn(truth, 1, 2.0).probs
    pick, covered = np.random.default_rng(2), 0
    for trial in range(100):
        rows = pick.choice(len(truth), 600, replace=False)
        seen, later = rows[:200], rows[200:]
        found = score_prediction_interval(
            name, probs[seen], truth[seen], len(later), seed=trial, resamples=300
        )
        covered += found.low <= METRICS[name].score(probs[later], truth[later]) <= found.high
    assert 88 <= covered <= 100


@pytest.mark.parametrize("name", METRICS)
def test_copies_of_the_images_are_no_evidence(name: str) -> None:
    labels = drawn_labels(80)
    good, poor = drawn(labels, 1, 2.0).probs, drawn(labels, 2).probs
    groups = np.repeat(np.arange(80), 3)
    copied = [np.repeat(one, 3, axis=0) for one in (good, poor, labels)]
    for once, thrice in (
        (score_interval(name, good, labels), score_interval(name, copied[0], copied[2], groups=groups)),
        (paired_gain(name, good, poor, labels), paired_gain(name, *copied, groups=groups)),
        (
            score_prediction_interval(name, good, labels, 100),
            score_prediction_interval(name, copied[0], copied[2], 300, groups=groups),
        ),
    ):
        assert astuple(thrice) == pytest.approx(astuple(once))
    deceived = score_interval(name, copied[0], copied[2])
    assert deceived.high - deceived.low < 0.7 * (thrice.high - thrice.low)


def test_effective_images_are_all_unless_some_share_a_group() -> None:
    assert independent_images(np.array([5, 3, 4])) == 3
    assert independent_images(np.array([7, 7, 7, 7])) == 1
    assert independent_images(np.array([0, 0, 1, 2])) == pytest.approx(16 / 6)
    assert independent_images(np.array([], int)) == 0


def test_a_bootstrap_of_many_images_is_made_in_bounded_memory() -> None:
    labels = drawn_labels(50_000)
    probs = drawn(labels, 1).probs
    tracemalloc.start()
    bootstrap_interval("macro_f1", probs, labels, resamples=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6


@pytest.mark.parametrize("counts", [[50] * 4, [400, 10, 10, 10], [200, 100, 50, 12]])
def test_the_noise_of_macro_f1_goes_by_its_rare_classes(counts: list[int]) -> None:
    metric, images = METRICS["macro_f1"], np.array(counts)
    labels, rng = np.repeat(np.arange(4), images), np.random.default_rng(0)
    scores = []
    for _ in range(300):
        guess = rng.choice(4, len(labels), p=images / images.sum())
        answers = np.where(rng.random(len(labels)) < 0.8, labels, guess)
        scores.append(metric.score(np.eye(4)[answers], labels))
    expected = metric.spread(float(np.mean(scores))) / math.sqrt(metric.effective_images(images))
    assert expected == pytest.approx(np.std(scores), rel=0.3)
    assert METRICS["accuracy"].effective_images(images) == len(labels)


def test_hidden_images_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden=0 and total=5 must be at least 1"):
        proportion_prediction_interval(2, 5, 0)
    with pytest.raises(ValueError, match="hidden=0 must be at least 1"):
        score_prediction_interval("log_loss", drawn(drawn_labels(5), 0).probs, drawn_labels(5), 0)

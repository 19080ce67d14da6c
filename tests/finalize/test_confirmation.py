"""One run is partly luck: what the runs of a configuration say of it, and which run would tell more."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from ray.tune.search import Searcher
from scipy.stats import multivariate_normal

from carmodels.evaluation.metrics import METRICS
from carmodels.records import Cause, Role, State, TrialRecord
from carmodels.study import Study
from carmodels.training.config import EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run
from tune.budget.costs import RERUN_MARGIN
from tune.finalize.confirmation import RerunSearcher, confirmation_seconds, knowledge_gradient, next_rerun
from tune.optim.standings import (
    CONTENDERS,
    Standing,
    noise_sd,
    posterior,
    runs_by_config,
    standings,
    standings_json,
    standings_of,
    standings_sentence,
    top_standings,
)

IMAGES = 250


def of(run: Run, value: float | None, stage: str, **more: Any) -> TrialRecord:
    """The record of a run, complete unless told otherwise."""
    record = TrialRecord(run.id, run.config, State.COMPLETE, 4, value, 8.0, "ran", stage=stage)
    return replace(record, origin=run.origin, **more)


def run(lr: float, value: float | None, seed: int = 0, stage: str = "search", **more: Any) -> TrialRecord:
    """A run of the configuration with this learning rate."""
    config = TrialConfig("test_resnet", image_size=32, epochs=4, lr=lr)
    return of(Run(config, Origin(seed=seed)), value, stage, **more)


def field(*values: float) -> list[TrialRecord]:
    """A run of a configuration for each value; their learning rates count up."""
    return [run(n / 1000, value) for n, value in enumerate(values, start=1)]


# ---- the model


def reference(
    means: Sequence[float], runs: Sequence[int], sd: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Posterior means, standard deviations and those of the gaps to the best, by joint normal algebra."""
    own = np.diag(sd**2 / np.array(runs))
    ones = np.ones((len(means), len(means)))
    y, weights, firsts, seconds = np.array(means), [], [], []
    for tau in sd * np.geomspace(1e-4, 1e3, 2000):
        prior = tau**2 * np.eye(len(y)) + 1e7 * ones  # a mean of the field that could be anything
        gain = prior @ np.linalg.inv(prior + own)
        evidence = multivariate_normal(np.zeros(len(y)), prior + own).pdf(y)
        weights.append(evidence * tau / (1 + (tau / sd / 2) ** 2))
        firsts.append(gain @ y)
        seconds.append(prior - gain @ prior + np.outer(gain @ y, gain @ y))
    mean = np.average(firsts, axis=0, weights=weights)
    cov = np.average(seconds, axis=0, weights=weights) - np.outer(mean, mean)
    best = mean.argmax()
    gap = cov.diagonal() + cov[best, best] - 2 * cov[best]
    return mean, np.sqrt(cov.diagonal()), np.sqrt(np.maximum(gap, 0))


@pytest.mark.parametrize(
    ("means", "runs"),
    [([0.0, 1.0, 3.0], [1, 1, 1]), ([2.0, 2.5, -1.0, 0.3], [3, 1, 2, 1]), ([5.0, 4.9], [1, 4])],
)
def test_the_posterior_is_that_of_the_joint_normal_model_averaged_over_spreads(
    means: list[float], runs: list[int]
) -> None:
    ours = posterior(np.array(means), np.array(runs), 1.0)
    mean, sd, gap_sd = reference(means, runs, 1.0)
    np.testing.assert_allclose(ours.mean, mean, atol=5e-3)
    np.testing.assert_allclose(ours.sd, sd, atol=5e-3)
    np.testing.assert_allclose(ours.gap_sd, gap_sd, atol=2e-2)
    np.testing.assert_allclose(ours.gap, ours.mean - ours.mean.max(), atol=1e-12)


def test_a_lucky_single_run_is_pulled_to_the_field_and_the_mean_of_many_runs_hardly() -> None:
    means = np.array([0.95, 0.90, 0.89, 0.91, 0.88])
    once = posterior(means, np.array([1, 1, 1, 1, 1]), 0.02)
    often = posterior(means, np.array([20, 1, 1, 1, 1]), 0.02)
    assert 0.90 < once.mean[0] < 0.935
    assert 0.943 < often.mean[0] < 0.95
    assert often.sd[0] < once.sd[0]


def test_of_equally_many_runs_the_order_stays() -> None:
    means = np.random.default_rng(0).normal(size=30)
    for spread in (0.01, 1.0, 100.0):
        found = posterior(spread * means, np.full(30, 2), 1.0)
        assert list(found.mean.argsort()) == list(means.argsort())


def simulated(
    seed: int, spread: float, count: int = 10, most: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What configurations are worth, means of their runs with noise 1, and how many runs each had."""
    rng = np.random.default_rng(seed)
    worth, runs = rng.normal(0, spread, count), rng.integers(1, most + 1, count)
    return worth, rng.normal(worth, 1 / np.sqrt(runs)), runs


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_the_interval_holds_what_a_configuration_is_worth_19_times_of_20(spread: float) -> None:
    all_of_them, winners, raw_winners = [], [], []
    for seed in range(600):
        worth, means, runs = simulated(seed, spread, most=1 + seed % 4)
        found = posterior(means, runs, 1.0)
        holds = np.abs(worth - found.mean) < 1.96 * found.sd
        all_of_them.append(holds.mean())
        winners.append(holds[found.best])
        raw_winners.append(abs(worth - means)[means.argmax()] < 1.96 / np.sqrt(runs[means.argmax()]))
    assert 0.93 < np.mean(all_of_them) < 0.985
    assert 0.92 < np.mean(winners) < 0.99
    if spread < 1:
        assert np.mean(raw_winners) < 0.9  # the winner's curse


def test_told_apart_is_wrong_once_in_40_times_at_most() -> None:
    told = wrong = 0
    for seed in range(600):
        worth, means, runs = simulated(seed, 2.0)
        found = posterior(means, runs, 1.0)
        apart = found.chances < 0.025
        told += int(apart.sum())
        wrong += int((worth[apart] > worth[found.best]).sum())
    assert told > 1000
    assert wrong / told < 0.025


def test_the_winners_estimate_is_right_on_average_where_its_own_value_is_too_good() -> None:
    raw, ours = [], []
    for seed in range(600):
        worth, means, runs = simulated(seed, 1.0, most=1)
        best = means.argmax()
        raw.append(means[best] - worth[best])
        ours.append(posterior(means, runs, 1.0).mean[best] - worth[best])
    assert np.mean(raw) > 0.6
    assert abs(np.mean(ours)) < 0.15
    assert np.mean(np.square(ours)) < 0.6 * np.mean(np.square(raw))


def test_the_noise_is_the_binomial_one_until_repeats_show_more() -> None:
    singles = [np.array([0.9])] * 6
    binomial = np.sqrt(0.9 * 0.1 / IMAGES)
    assert noise_sd(singles, "accuracy", IMAGES) == pytest.approx(binomial)
    close = [np.array([0.9, 0.901, 0.899])] * 6
    assert noise_sd(close, "accuracy", IMAGES) == pytest.approx(binomial)
    rng = np.random.default_rng(0)
    wide = [rng.normal(0.9, 0.05, 20) for _ in range(10)]
    assert noise_sd(wide, "accuracy", IMAGES) == pytest.approx(0.05, rel=0.1)
    assert noise_sd([np.array([1.0])], "accuracy", IMAGES) == pytest.approx(1 / IMAGES)


# ---- a study's records


def test_runs_are_those_of_the_same_schedule_to_its_end_in_search_and_reruns() -> None:
    first, again = run(0.001, 0.9), run(0.001, 0.8, seed=1, stage="confirm")
    shorter = first.run.with_config(epochs=2).with_origin(seed=4)
    others = [
        run(0.001, 0.5, seed=2, stage="confirm", cut_short=True),
        run(0.001, 0.6, seed=3, stage="retrain"),
        of(shorter, 0.7, "confirm"),
        run(0.002, 0.9, state=State.PRUNED),
        run(0.003, 0.9, state=State.INTERRUPTED, stage="confirm"),
    ]
    assert list(runs_by_config([again, *others, first]).values()) == [[first, again]]


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_is_first_whichever_way_the_metric_points(metric: str) -> None:
    records = field(0.5, 0.4, 0.3, 0.45)
    records += [run(0.002, value, seed, "confirm") for seed, value in ((1, 0.40), (2, 0.41))]
    found = standings(records, metric=metric, images=IMAGES)
    means = [s.mean for s in found]
    assert means == sorted(means, reverse=METRICS[metric].mode == "max")
    assert sorted(s.runs for s in found) == [1, 1, 1, 3]
    assert next(s for s in found if s.runs == 3).mean == pytest.approx(np.mean([0.4, 0.40, 0.41]))
    for standing in found:
        assert 0 <= standing.estimate.low < standing.estimate.value < standing.estimate.high <= 1
    assert found[0].chance_to_be_better == 0.5
    assert all(s.chance_to_be_better < 0.5 for s in found[1:])
    assert found[-1].clearly_worse


def test_of_configurations_with_one_value_that_with_the_lowest_log_loss_is_first() -> None:
    def scored(record: TrialRecord, loss: float) -> TrialRecord:
        return replace(record, curve=(EpochMetrics(4, 1.0, loss, record.value, record.value, 8.0),))

    losses = [0.7, 0.5, 0.3, 0.9, 0.4, 0.6, 0.1]
    tied = [scored(r, loss) for r, loss in zip(field(*[0.9] * 6, 0.8), losses, strict=True)]
    found = standings(tied, metric="accuracy", images=IMAGES)
    assert [s.record.log_loss for s in found] == [0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 0.1]
    assert next_rerun(tied, metric="accuracy", images=IMAGES).config == tied[2].config


def test_repeats_that_disappoint_cost_the_first_place() -> None:
    records = field(0.95, 0.93, 0.90, 0.91, 0.89)
    assert standings(records, metric="accuracy", images=IMAGES)[0].record == records[0]
    records += [run(0.001, value, seed, "confirm") for seed, value in ((1, 0.90), (2, 0.89), (3, 0.91))]
    found = standings(records, metric="accuracy", images=IMAGES)
    assert found[0].record == records[1]
    assert found[0].estimate.value < 0.93


def test_what_never_took_off_does_not_move_the_others() -> None:
    without = standings(field(0.9, 0.89, 0.87, 0.86), metric="accuracy", images=IMAGES)
    records = [*field(0.9, 0.89, 0.87, 0.86, 0.1), run(0.005, 0.6, 1, "confirm")]  # seeds far apart, too
    found = standings(records, metric="accuracy", images=IMAGES)
    assert [s.estimate for s in found[:-1]] == [s.estimate for s in without]
    assert found[-1].clearly_worse
    assert found[-1].estimate.value == found[-1].mean == 0.35


def _gap_sd(one: Standing, other: Standing) -> float:
    """Of two that are judged apart from each other, from their intervals."""
    widths = [s.estimate.high - s.estimate.low for s in (one, other)]
    return math.hypot(*widths) / (2 * NormalDist().inv_cdf(0.975))


def test_a_configuration_that_diverges_with_new_seeds_is_not_the_best() -> None:
    worst = (EpochMetrics(2, math.nan, math.nan, 0.0, 0.0, 2.0, "diverged"),)
    records = field(0.95, 0.93, 0.92)
    diverged: dict[str, Any] = {"state": State.FAILED, "cause": Cause.DIVERGED, "curve": worst}
    failed = [run(0.001, 0.0, s, "confirm", **diverged) for s in (1, 2)]
    lucky = [*records, *(replace(record, value=None) for record in failed)]
    found = standings(lucky, metric="accuracy", images=IMAGES)
    assert found[0].record == records[1]
    assert (found[-1].record, found[-1].runs) == (records[0], 3)
    assert found[-1].mean == pytest.approx(0.95 / 3)
    two = standings(records[1:], metric="accuracy", images=IMAGES)
    assert [s.estimate for s in found[:2]] == [s.estimate for s in two]  # its noise is its own
    alone = standings([*field(0.95), *lucky[3:]], metric="accuracy", images=IMAGES)
    assert alone[0].runs == 3
    leading_still = [*field(0.95, 0.40, 0.38, 0.35), lucky[3]]
    ahead, *others = standings(leading_still, metric="accuracy", images=IMAGES)
    assert ahead.record == leading_still[0]
    gaps = [(s.estimate.value - ahead.estimate.value) / _gap_sd(ahead, s) for s in others]
    assert [s.chance_to_be_better for s in others] == pytest.approx([NormalDist().cdf(gap) for gap in gaps])
    poor = field(0.90, 0.85, 0.10)  # the only steady one is of another kind
    poor += [run(n / 1000, 0.0, 1, "confirm", **diverged) for n in (1, 2)]
    assert len(standings(poor, metric="accuracy", images=IMAGES)) == 3


def test_whatever_ran_again_has_a_row() -> None:
    records = field(0.90, 0.89, 0.88, 0.89, 0.89, 0.70)
    assert len(top_standings(standings(records, metric="accuracy", images=IMAGES))) == CONTENDERS
    records.append(run(0.006, 0.70, 1, "confirm"))
    rows = top_standings(standings(records, metric="accuracy", images=IMAGES))
    assert [s.record for s in rows][CONTENDERS:] == [records[5]]


def test_an_interval_ends_where_the_metric_does() -> None:
    sure = standings(field(1.0, 0.995, 0.99), metric="accuracy", images=IMAGES)
    assert sure[0].estimate.high == 1.0
    assert standings(field(0.004, 0.006), metric="log_loss", images=5)[0].estimate.low == 0.0


def test_near_duplicates_in_val_make_no_configuration_more_certain(tmp_path: Path) -> None:
    """Ten copies of each image say no more than one."""
    studies = []
    for name, copies in (("one", 1), ("ten", 10)):
        study = Study(tmp_path / name)
        rows = [("val", f"{n}-{k}.jpg", n % 3, n) for n in range(60) for k in range(copies)]
        study.begin({"metric": "accuracy"}, rows)
        for record in field(0.9, 0.89, 0.7):
            study.append(record)
        studies.append(standings_of(study))
    alone, copied = studies
    assert [s.estimate for s in copied] == [pytest.approx(s.estimate) for s in alone]


def test_rare_classes_make_macro_f1_less_certain_than_accuracy(tmp_path: Path) -> None:
    widths = {}
    for metric in ("accuracy", "macro_f1"):
        study = Study(tmp_path / metric)
        study.begin({"metric": metric}, [("val", f"{n}.jpg", int(n >= 390), n) for n in range(400)])
        for record in field(0.9, 0.89, 0.7):
            study.append(record)
        best = standings_of(study)[0].estimate
        widths[metric] = best.high - best.low
    assert widths["macro_f1"] > 1.5 * widths["accuracy"]


def test_without_a_complete_trial_or_images_there_is_no_standing() -> None:
    assert standings([], metric="accuracy", images=IMAGES) == []
    assert standings(field(0.9), metric="accuracy", images=0) == []
    assert next_rerun([], metric="accuracy", images=IMAGES) is None


def test_reruns_take_at_most_as_many_runs_of_the_dearest_of_the_best(tmp_path: Path) -> None:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [("val", f"{n}.jpg", 0) for n in range(IMAGES)])
    assert math.isinf(confirmation_seconds(study, 2, max_reruns=6))
    assert confirmation_seconds(study, 2, max_reruns=0) == 0
    for record in field(0.9, 0.89, 0.88, 0.87, 0.5):
        study.append(replace(record, seconds=1000.0 if record.value == 0.5 else 100 * (record.value or 0)))
    assert confirmation_seconds(study, 2, max_reruns=6) == pytest.approx(3.5 * RERUN_MARGIN * 90)
    assert confirmation_seconds(study, 4, max_reruns=6) == pytest.approx(2.5 * RERUN_MARGIN * 90)


def test_the_sentence_names_the_best_and_those_that_cannot_be_told_apart() -> None:
    records = field(0.90, 0.89, 0.60, 0.895, 0.894, 0.893, 0.892)
    records += [run(0.001, 0.9, seed, "confirm") for seed in (1, 2)]
    found = standings(records, metric="accuracy", images=IMAGES)
    text = standings_sentence(found)
    assert text.startswith(f"The best is test_resnet 32px head0 full ({records[0].trial_id}), by 3 runs. ")
    assert "Not clearly worse: " in text
    assert text.endswith(", 2 more that ran once.")
    assert records[2].trial_id not in text
    assert len(top_standings(found)) == CONTENDERS
    assert [row["trial_id"] for row in standings_json(found)] == [
        s.record.trial_id for s in top_standings(found)
    ]
    apart = standings(field(0.95, 0.6, 0.5, 0.61), metric="accuracy", images=IMAGES)
    assert standings_sentence(apart).endswith("by 1 run. All others are worse, with 95 % confidence.")
    alone = standings(field(0.95), metric="accuracy", images=IMAGES)
    assert standings_sentence(alone).endswith("by 1 run. No other one has finished.")


# ---- which run is next


def again(records: list[TrialRecord], **more: Any) -> Run | None:
    return next_rerun(records, metric="accuracy", images=IMAGES, **more)


def test_the_close_pair_is_run_again_and_not_what_is_far_behind() -> None:
    records = field(0.92, 0.80, 0.915, 0.79)
    for seed in range(1, 7):
        rerun = again(records)
        assert rerun is not None
        lr = rerun.config.lr
        assert lr in (0.001, 0.003)
        value = 0.92 if lr == 0.001 else 0.915
        records.append(run(lr, value, rerun.origin.seed, "confirm"))
        assert seed > 1 or lr == 0.001  # of equals the best first: its runs are its retrained models
    counts = [len(runs) for runs in runs_by_config(records).values()]
    assert counts == [4, 1, 4, 1]


def test_nothing_runs_again_once_the_best_is_told_apart() -> None:
    assert again(field(0.95, 0.6, 0.55, 0.62)) is None
    assert again(field(0.95)) is None


def test_where_less_is_better_the_two_lowest_are_the_close_pair() -> None:
    rerun = next_rerun(field(1.5, 0.30, 1.4, 0.31), metric="log_loss", images=IMAGES)
    assert rerun is not None
    assert rerun.config.lr == 0.002


def test_the_next_run_follows_from_the_records_alone() -> None:
    records = field(0.92, 0.91, 0.90, 0.915)
    assert again(records) == again(list(records))
    cut_off = run(0.001, 0.5, 1, "confirm", state=State.INTERRUPTED)
    assert again([*records, cut_off]) == again(records)


def test_a_seed_that_was_used_is_not_used_again() -> None:
    records = field(0.92, 0.91)
    rerun = again(records)
    assert rerun is not None
    assert rerun == records[0].run.with_origin(seed=1)
    records.append(run(0.001, 0.9, 1, "retrain"))
    records.append(run(0.001, 0.9, 2, "confirm", state=State.FAILED, cause=Cause.ERROR))
    later = again(records)
    assert later == records[0].run.with_origin(seed=3)
    both = [r.run.with_origin(seed=3) for r in records[:2]]
    next_one = again(records, pending=both)
    assert next_one is not None
    assert next_one.origin.seed == (4 if next_one.config.lr == 0.001 else 1)
    twice = again(field(0.92, 0.91), pending=[r.run.with_origin(seed=1) for r in records[:2]])
    assert twice is not None
    assert twice.origin.seed == 2


def test_what_is_running_counts_as_what_is_expected_of_it() -> None:
    records = field(0.92, 0.918, 0.80)
    first = again(records)
    assert first is not None
    second = again(records, pending=[first])
    assert second is not None
    assert (first.config.lr, second.config.lr) == (0.001, 0.002)


def test_the_gain_of_a_run_is_that_of_brute_force() -> None:
    means, sds = np.array([1.0, 0.8, 0.2]), np.array([0.5, 0.7, 0.4])
    rng = np.random.default_rng(0)
    expected = []
    for j in range(3):
        worth = rng.normal(means[j], sds[j], 400_000)
        seen = rng.normal(worth, 0.9)
        share = sds[j] ** 2 / (sds[j] ** 2 + 0.9**2)
        new = means[j] + share * (seen - means[j])
        expected.append(np.maximum(new, np.delete(means, j).max()).mean() - means.max())
    np.testing.assert_allclose(knowledge_gradient(means, sds, 0.9), expected, atol=3e-3)


def test_six_runs_halve_what_the_choice_falls_short_of_the_best() -> None:
    short = np.zeros((2, 300))
    images, level = 2500, 0.8  # the model's own noise: the binomial one
    sd = np.sqrt(level * (1 - level) / images)
    for number in range(short.shape[1]):
        rng = np.random.default_rng(number)
        worth = rng.normal(level, sd, 8)
        records = field(*np.clip(rng.normal(worth, sd), 0, 1))
        chosen = [max(records, key=lambda r: r.value or 0)]
        for _ in range(6):
            rerun = next_rerun(records, metric="accuracy", images=images)
            if rerun is None:
                break
            value = float(rng.normal(worth[round(1000 * rerun.config.lr) - 1], sd))
            records.append(run(rerun.config.lr, value, rerun.origin.seed, "confirm"))
        chosen.append(standings(records, metric="accuracy", images=images)[0].record)
        short[:, number] = [worth.max() - worth[round(1000 * r.config.lr) - 1] for r in chosen]
    before, after = short.mean(axis=1)
    assert after < 0.65 * before


# ---- as Ray asks for it


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study(tmp_path / "study")
    study.begin({"metric": "accuracy"}, [("val", f"{n}.jpg", 0) for n in range(IMAGES)])
    for record in field(0.92, 0.91, 0.80):
        study.append(record)
    return study


def made(
    study: Study, max_reruns: int = 3, end: float = float("inf")
) -> tuple[RerunSearcher, dict[str, Role]]:
    roles: dict[str, Role] = {}
    return RerunSearcher(study, max_reruns=max_reruns, end=end, roles=roles), roles


def ended(study: Study, values: object, value: float | None = 0.9, **more: Any) -> None:
    assert isinstance(values, dict)
    study.append(of(Run.from_dict(values), value, "confirm", **more))


def test_reruns_come_one_by_one_up_to_the_cap_each_with_its_role(study: Study) -> None:
    reruns, roles = made(study)
    handed = []
    for _ in range(3):
        handed.append(reruns.suggest("x"))
        ended(study, handed[-1])
    assert reruns.suggest("x") == Searcher.FINISHED
    first = study.records()[0]
    role = Role(repeats=first.trial_id, note=f"seed 1 of {first.trial_id}")
    assert next(iter(roles.items())) == (first.run.with_origin(seed=1).id, role)
    assert len(roles) == 3
    resumed, _ = made(study)
    assert resumed.suggest("x") == Searcher.FINISHED
    assert isinstance(made(study, max_reruns=4)[0].suggest("x"), dict)


def test_an_interrupted_rerun_goes_first_and_one_that_failed_is_not_tried_again(study: Study) -> None:
    cut_off = run(0.002, 0.5, 1, "confirm", state=State.INTERRUPTED)
    study.append(cut_off)
    reruns, _ = made(study)
    assert reruns.suggest("x") == cut_off.run.to_dict()
    first = reruns.suggest("x")
    assert first == study.records()[0].run.with_origin(seed=1).to_dict()
    failed: dict[str, Any] = {"state": State.FAILED, "cause": Cause.ERROR}
    ended(study, first, None, **failed)
    ended(study, cut_off.run.to_dict(), None, **failed)
    other = made(study)[0].suggest("x")
    assert other == study.records()[0].run.with_origin(seed=2).to_dict()


def test_a_rerun_that_was_lost_with_its_machine_is_tried_again(study: Study) -> None:
    lost = run(0.002, None, 1, "confirm", state=State.FAILED, cause=Cause.MACHINE)
    study.append(lost)
    assert made(study)[0].suggest("x") == lost.run.to_dict()


def test_with_the_cap_running_the_searcher_waits_and_does_not_end(study: Study) -> None:
    reruns, _ = made(study, max_reruns=2)
    running = [reruns.suggest("x"), reruns.suggest("x")]
    assert reruns.suggest("x") is None
    for values in running:
        ended(study, values, 0.91)
    assert reruns.suggest("x") == Searcher.FINISHED


def test_a_rerun_that_would_not_end_in_time_is_not_begun(study: Study) -> None:
    assert made(study, end=time.time() + 5)[0].suggest("x") == Searcher.FINISHED  # its first run took 8 s
    assert isinstance(made(study, end=time.time() + 60)[0].suggest("x"), dict)


def test_no_reruns_are_made_where_none_are_wanted(study: Study) -> None:
    assert made(study, max_reruns=0)[0].next() is None

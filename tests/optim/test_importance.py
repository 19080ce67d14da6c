"""What mattered in a search is found and told from chance; an edge is named with an option that moves it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna
import pytest

from carmodels.catalog import BACKBONES
from carmodels.models.weights import Weights
from carmodels.presets import SPACES, baseline
from carmodels.records import Cause, State, TrialRecord
from carmodels.space import Choice, Range, Space
from carmodels.training.config import BOUNDS, EpochMetrics, TrialConfig
from carmodels.training.run import Origin, Run
from tune.commands.run_search import chosen_space
from tune.optim.importance import MIN_TRIALS, Edge, edges, importances
from tune.optim.optuna_records import suggest
from tune.search import parser

SPACE = SPACES["demo"]
MIDDLE = TrialConfig("test_resnet", image_size=48, epochs=8, lr=2e-3, head_depth=1, lr_ratio=0.3)


def ended(
    config: TrialConfig, value: float | None, state: State = State.COMPLETE, *, seed: int = 0, **more: Any
) -> TrialRecord:
    epochs, run = 8 if state is State.COMPLETE else 2, Run(config, Origin(seed=seed))
    curve = tuple(EpochMetrics(e, 1.0, 1.0, 0.0, value or 0.0, 1.0) for e in range(1, epochs + 1))
    return TrialRecord(
        run.id, config, state, epochs, value, 8.0, "ended", origin=run.origin, curve=curve, **more
    )


def drawn(count: int, seed: int = 0, space: Space = SPACE) -> list[TrialConfig]:
    """Random configurations."""
    drawing = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [TrialConfig.from_dict(suggest(drawing.ask(), space)) for _ in range(count)]


def searched(count: int, value: Callable[[TrialConfig], float], seed: int = 0) -> list[TrialRecord]:
    return [ended(config, value(config)) for config in drawn(count, seed)]


def off(config: TrialConfig) -> float:
    """How far the learning rate is from a good one, in decades."""
    return abs(math.log10(config.lr / 2e-3))


def noise(config: TrialConfig) -> float:
    """A number that has nothing to do with the configuration but its identity."""
    return zlib.crc32(repr(config).encode()) / 2**32


# ---- importance


@pytest.mark.parametrize("seed", range(3))
def test_the_dimension_that_decides_is_found(seed: int) -> None:
    found = importances(searched(50, lambda c: 1 - off(c) + 0.2 * noise(c), seed), SPACE, "accuracy")
    first, *others = found.dimensions
    assert (first.name, first.matters, first.note) == ("lr", True, "")
    assert first.share > 2 * max(other.share for other in others)
    assert sum(i.share for i in found.dimensions) == pytest.approx(1)
    assert {i.name for i in found.dimensions} == set(SPACE.dimensions)
    assert found.sentence.startswith(f"What mattered, by 50 trials: lr {100 * first.share:.0f} %")
    assert "augment" in found.sentence.split("No more than chance: ")[1]


@pytest.mark.slow
def test_where_nothing_matters_chance_is_rarely_passed() -> None:
    found = [
        i for seed in range(8) for i in importances(searched(30, noise, seed), SPACE, "accuracy").dimensions
    ]
    assert sum(i.matters for i in found) <= 0.12 * len(found)


def test_a_dimension_that_is_not_always_drawn_is_judged_by_the_trials_that_drew_it() -> None:
    records = searched(80, lambda c: c.dropout if c.head_depth else 0.25 + 0.01 * noise(c))
    [dropout] = [i for i in importances(records, SPACE, "accuracy").dimensions if i.name == "dropout"]
    count = sum(r.config.head_depth > 0 for r in records)
    assert dropout.matters
    assert dropout.note == f"where head_depth is 1 or 2, {count} trials"
    # a condition that always holds is none
    always = SPACE.with_override("head_depth=1")
    records = [ended(replace(r.config, head_depth=1), r.value) for r in records if r.config.head_depth]
    [dropout] = [i for i in importances(records, always, "accuracy").dimensions if i.name == "dropout"]
    assert dropout.matters
    assert not dropout.note


def test_a_metric_that_is_to_be_small_gives_the_same_answer() -> None:
    up = importances(searched(30, lambda c: 1 - off(c)), SPACE, "accuracy")
    assert importances(searched(30, off), SPACE, "log_loss") == up


@pytest.mark.parametrize(
    ("state", "cause"),
    [(State.PRUNED, None), (State.OUT_OF_TIME, None), (State.FAILED, Cause.DIVERGED)],
)
def test_what_is_not_complete_counts_as_worse_whatever_its_value(state: State, cause: Cause | None) -> None:
    configs = drawn(40)
    value = None if cause is Cause.DIVERGED else 0.99
    cut = [ended(c, noise(c)) if c.lr < 4e-3 else ended(c, value, state, cause=cause) for c in configs]
    worst = [ended(c, noise(c) if c.lr < 4e-3 else -1.0) for c in configs]
    assert importances(cut, SPACE, "accuracy") == importances(worst, SPACE, "accuracy")


def test_of_stopped_trials_the_one_that_got_further_counts_as_better() -> None:
    """Whether the scheduler or the clock stopped it."""
    configs, states = drawn(40), (State.PRUNED, State.OUT_OF_TIME)
    stopped = [
        replace(ended(c, 0.0, states[n % 2]), epochs_run=round(100 - 10 * off(c)))
        for n, c in enumerate(configs)
    ]
    complete = [ended(c, round(100 - 10 * off(c))) for c in configs]
    assert importances(stopped, SPACE, "accuracy") == importances(complete, SPACE, "accuracy")


def test_failures_reruns_and_the_competitors_baseline_say_nothing_of_the_space() -> None:
    records = searched(30, lambda c: 1 - off(c))
    best = ended(replace(MIDDLE, lr=2e-2), 1.0, seed=99)
    others = [
        replace(best, state=State.FAILED, cause=Cause.ERROR, value=None, curve=()),
        replace(best, state=State.FAILED, cause=Cause.OUT_OF_MEMORY, value=None, curve=()),
        replace(best, state=State.FAILED, cause=Cause.MACHINE, value=None, curve=()),
        replace(best, state=State.INTERRUPTED, value=None),
        *(replace(best, stage=stage) for stage in ("confirm", "retrain")),
        ended(baseline(SPACE), 1.0, baseline=True),
        ended(replace(MIDDLE, batch_size=64), 1.0),  # of another space
    ]
    assert importances([*records, *others], SPACE, "accuracy") == importances(records, SPACE, "accuracy")
    assert edges([*records, *others[:-1]], SPACE, "accuracy") == edges(records, SPACE, "accuracy")


def test_of_too_few_trials_nothing_is_said() -> None:
    records = searched(MIN_TRIALS, lambda c: 1 - off(c))
    few = importances(records[1:], SPACE, "accuracy")
    assert few.dimensions == ()
    assert (
        few.sentence == f"What mattered: {MIN_TRIALS - 1} trials are too few to say; it takes {MIN_TRIALS}."
    )
    assert importances(records, SPACE, "accuracy").dimensions
    assert importances([], SPACE, "accuracy").dimensions == ()


def test_a_choice_of_one_is_none() -> None:
    space = SPACE.with_backbones(("test_resnet",))
    records = [ended(replace(c, backbone="test_resnet"), noise(c)) for c in drawn(MIN_TRIALS)]
    assert "backbone" not in {i.name for i in importances(records, space, "accuracy").dimensions}


# ---- edges


def best_five(*changes: dict[str, Any], space: Space = SPACE, metric: str = "accuracy") -> tuple[Edge, ...]:
    """The edges where the best trials, best first, are the middle of the space but for these changes."""
    configs = [replace(MIDDLE, **change) for change in [*changes, *5 * [{}]][:5]]
    return edges([ended(c, 0.9 - 0.01 * n, seed=n) for n, c in enumerate(configs)], space, metric)


def told(*changes: dict[str, Any], space: Space = SPACE) -> list[str]:
    return [f"{edge}; {edge.option}" for edge in best_five(*changes, space=space)]


def test_in_the_middle_there_is_no_edge() -> None:
    assert not told()


def test_the_best_trial_at_an_end_of_a_range_is_an_edge_and_another_one_is_not() -> None:
    assert told({"lr": 1.9e-2}) == [
        "lr: the best trial lies at the top of 0.0002 to 0.02 (0.019); --set lr=0.0002:0.063"
    ]
    assert told({"lr": 2e-4}) == [
        "lr: the best trial lies at the bottom of 0.0002 to 0.02 (0.0002); --set lr=6.3e-05:0.02"
    ]
    assert not told({}, {"lr": 1.9e-2})
    assert told({}, {"lr": 1.9e-2}, {}, {"lr": 2e-2}) == [
        "lr: 2 of the best 5 trials lie at the top of 0.0002 to 0.02 (0.019, 0.02); --set lr=0.0002:0.063"
    ]


def test_near_an_end_is_measured_on_the_ranges_own_scale() -> None:
    linear = Space({**SPACE.dimensions, "lr": Range(2e-4, 2e-2)}, SPACE.fixed)
    for lr, log_edge, linear_edge in ((1.5e-2, 0, 0), (1.65e-2, 1, 0), (1.95e-2, 1, 1)):
        assert len(told({"lr": lr})) == log_edge
        assert len(told({"lr": lr}, space=linear)) == linear_edge
    assert told({"lr": 2e-2}, space=linear)[0].endswith("--set lr=0.0002:0.025")


def test_a_choice_of_numbers_is_at_its_edge_where_more_of_the_best_are_than_chance_puts_there() -> None:
    top = {"image_size": 96}
    assert not told(top, top, top)
    [edge] = told(top, top, top, {}, top)
    assert edge == (
        "image_size: 4 of the best 5 trials lie at the top of 32 to 96 (96); --set image_size=32,48,64,96,128"
    )
    bottom = {"image_size": 32}
    assert told(*4 * [bottom]) == [
        "image_size: 4 of the best 5 trials lie at the bottom of 32 to 96 (32); "
        "--set image_size=16,32,48,64,96"
    ]


def test_words_and_choices_of_one_have_no_edge() -> None:
    assert not told(*5 * [{"unfreeze": "gradual", "augment": "color", "backbone": "test_resnet"}])
    one = SPACE.with_override("image_size=48")
    assert not told(space=replace(one, dimensions={**one.dimensions, "image_size": Choice((48,))}))
    words = Space({**SPACE.dimensions, "class_weights": Choice((False, True))}, SPACE.fixed)
    assert not told(*5 * [{"class_weights": True}], space=words)


def test_at_the_natural_limit_there_is_nothing_to_widen() -> None:
    assert not told(*5 * [{"lr_ratio": 1.0, "dropout": 0.0, "head_depth": 1}])
    smoothed = SPACE.with_override("label_smoothing=0.0,0.1")
    assert not told(*5 * [{"label_smoothing": 0.0}], space=smoothed)
    assert len(told(*5 * [{"label_smoothing": 0.1}], space=smoothed)) == 1


def test_sizes_are_not_widened_beyond_what_goes_with_the_other_sizes() -> None:
    small = Space({**SPACE.dimensions, "start_image_size": Choice((0, 16, 24))}, SPACE.fixed)
    assert len(told(*5 * [{"start_image_size": 24}], space=small)) == 1
    large = Space({**SPACE.dimensions, "start_image_size": Choice((0, 16, 32))}, SPACE.fixed)
    assert not told(*5 * [{"start_image_size": 32}], space=large)  # the smallest images have 32 px
    assert not told(
        *5 * [{"image_size": 32, "start_image_size": 16}], space=small.with_override("start_image_size=0,32")
    )


def test_what_a_trial_did_not_draw_lies_at_no_edge() -> None:
    assert [e.name for e in best_five({"dropout": 0.5})] == ["dropout"]
    assert not told({"dropout": 0.5, "head_depth": 0})
    assert not told({"lr_ratio": 0.05, "unfreeze": "frozen"})


def test_only_complete_trials_are_looked_at() -> None:
    edge = replace(MIDDLE, lr=2e-2)
    for state, cause, value in (
        (State.PRUNED, None, 0.99),
        (State.OUT_OF_TIME, None, 0.99),
        (State.FAILED, Cause.DIVERGED, None),
        (State.FAILED, Cause.ERROR, None),
    ):
        assert not edges([ended(MIDDLE, 0.5), ended(edge, value, state, cause=cause)], SPACE, "accuracy")
    [found] = edges([ended(MIDDLE, 0.5), ended(edge, 0.6)], SPACE, "accuracy")
    assert (found.best_count, found.values) == (2, (2e-2,))
    assert not edges([ended(MIDDLE, 0.5), ended(edge, 0.6)], SPACE, "log_loss")
    assert edges([], SPACE, "accuracy") == ()


def numeric(space: Space) -> list[str]:
    return [
        name
        for name, d in space.dimensions.items()
        if isinstance(d, Range) or not isinstance(d.options[0], str)
    ]


def ends(space: Space, name: str) -> tuple[float, float]:
    dimension = space.dimensions[name]
    if isinstance(dimension, Range):
        return dimension.low, dimension.high
    return min(dimension.options), max(dimension.options)


def at_end(space: Space, name: str, top: bool) -> Edge | None:
    """What is said where five trials that drew this dimension lie at this end of it."""
    values = {"backbone": space.backbones[0], "image_size": space.image_sizes[1], "head_depth": 1}
    start = TrialConfig.from_dict({**space.fixed, **values, "unfreeze": "full", name: ends(space, name)[top]})
    found = edges([ended(start, 0.9, seed=n) for n in range(5)], space, "accuracy")
    return next((e for e in found if e.name == name and e.top is top), None)


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize(
    ("preset", "name"), [(preset, name) for preset, space in SPACES.items() for name in numeric(space)]
)
def test_every_option_that_is_named_is_taken_and_widens_its_end_alone(
    preset: str, name: str, top: bool
) -> None:
    overrides: list[str] = []
    space = SPACES[preset]
    for _ in range(4):
        edge = at_end(space, name, top)
        if edge is None:
            limit = BOUNDS[name][top]
            step = math.lcm(*(BACKBONES[b].multiple for b in space.backbones)) if name == "image_size" else 0
            assert abs(ends(space, name)[top] - limit) <= step
            break
        overrides += parser().parse_args(edge.option.split()).set
        wider, _ = chosen_space(preset, overrides, Weights.parse("none"))
        (low, high), (new_low, new_high) = ends(space, name), ends(wider, name)
        assert (new_low == low and new_high > high) if top else (new_low < low and new_high == high)
        old, new = space.dimensions[name], wider.dimensions[name]
        assert new.when == old.when
        if isinstance(old, Choice):
            assert isinstance(new, Choice)
            assert set(old.options) < set(new.options)
        else:
            assert isinstance(new, Range)
            assert new.log == old.log
        assert {n: d for n, d in wider.dimensions.items() if n != name} == {
            n: d for n, d in space.dimensions.items() if n != name
        }
        assert len(drawn(10, space=wider)) == 10
        space = wider


@pytest.mark.parametrize(
    ("text", "name", "top", "option"),
    [
        ("batch_size=8,32,128", "batch_size", True, "batch_size=8,32,128,512"),
        ("batch_size=8,32,128", "batch_size", False, "batch_size=2,8,32,128"),
        ("batch_size=8,12,16", "batch_size", False, "batch_size=4,8,12,16"),
        ("weight_decay=0.0,0.02", "weight_decay", True, "weight_decay=0.0,0.02,0.04"),
        ("weight_decay=1e-4:1e-2", "weight_decay", False, "weight_decay=3.2e-05:0.01"),
        ("ema=0.0,0.998", "ema", True, "ema=0.0,0.998,0.999"),
        ("ema=0.9:0.9999", "ema", True, "ema=0.9:0.99999"),
        ("dropout=0.5:0.9", "dropout", True, "dropout=0.5:0.95"),
        ("image_size=1024,2048", "image_size", True, ""),
    ],
)
def test_a_wider_choice_goes_on_in_its_own_steps(text: str, name: str, top: bool, option: str) -> None:
    edge = at_end(SPACES["gpu"].with_override(text), name, top)
    assert (edge.option.removeprefix("--set ") if edge else "") == option

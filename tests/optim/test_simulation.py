"""The simulated search keeps time, workers and budget as a real one, and heeds the scheduler."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune import RunConfig, Trainable, TuneConfig, Tuner
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    TrialScheduler,
)
from ray.tune.search import Searcher

from carmodels.training.config import TrialConfig
from carmodels.training.run import Origin, Run
from tune.optim.searcher import QueueSearcher

ROOT = Path(__file__).parents[2]
CONFIG = TrialConfig("mobilenetv2_035", image_size=64, epochs=4)


class Fixed:
    """A surrogate: a second an epoch, twice that at 128 px, accuracy grows by the learning rate."""

    curves = SimpleNamespace(fills={("mobilenetv2_035", 64): 10.0})

    def of(self, config: TrialConfig) -> tuple[np.ndarray, np.ndarray]:
        seconds = np.full(config.epochs, config.image_size / 64)
        return config.lr * np.arange(1, config.epochs + 1), seconds

    def sample(self, mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return mean


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """With trials that take no time besides their epochs."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    import simulation

    monkeypatch.setattr(simulation, "START", 0.0)
    yield simulation
    sys.path.remove(folder)


def run(
    simulation: Any,
    configs: list[TrialConfig],
    scheduler: Any,
    budget: float = 100.0,
    workers: int = 2,
    searcher: Searcher | None = None,
) -> list[Any]:
    return simulation.simulate(
        searcher or QueueSearcher(runs_of(configs), metric="accuracy", mode="max"),
        scheduler,
        Fixed(),
        metric="accuracy",
        budget=budget,
        workers=workers,
        seed=0,
        clock=simulation.Clock(),
    )


def runs_of(configs: list[TrialConfig]) -> list[Run]:
    """A run of each, with a seed of its own."""
    return [Run(config, Origin(seed=number)) for number, config in enumerate(configs)]


def changed(**values: Any) -> TrialConfig:
    return TrialConfig.from_dict({**CONFIG.__dict__, **values})


def test_two_workers_take_turns_as_they_are_free(simulation: Any) -> None:
    seen = run(simulation, [changed(image_size=128), CONFIG, changed(lr=0.1)], FIFOScheduler())
    assert [(s.at, s.trial) for s in seen if s.finished] == [(4.0, 1), (8.0, 0), (8.0, 2)]
    assert [s.at for s in seen] == sorted(s.at for s in seen)
    assert len(seen) == 12
    assert all(s.value == s.mean for s in seen)


def test_each_trial_takes_time_to_start(simulation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "START", 0.5)
    seen = run(simulation, [CONFIG, CONFIG], FIFOScheduler(), workers=1)
    assert [s.at for s in seen] == [1.5, 2.5, 3.5, 4.5, 6.0, 7.0, 8.0, 9.0]


def test_nothing_is_seen_after_the_budget(simulation: Any) -> None:
    seen = run(simulation, [CONFIG, CONFIG], FIFOScheduler(), budget=2.5)
    assert [s.at for s in seen] == [1.0, 1.0, 2.0, 2.0]


def test_outputs_of_a_frozen_backbone_are_stored_once_for_each_view(simulation: Any) -> None:
    frozen = changed(unfreeze="frozen")
    seen = run(simulation, [frozen, changed(unfreeze="frozen", lr=0.1)], FIFOScheduler())
    ends = [s.at for s in seen if s.finished]
    assert sum(ends) == 8 * 1.0 + 4 * 10.0  # eight epochs and four views, whichever trial needs one first


def test_a_trial_that_the_scheduler_stops_makes_room_for_the_next(simulation: Any) -> None:
    def asha() -> AsyncHyperBandScheduler:
        return AsyncHyperBandScheduler(
            time_attr="epoch", metric="accuracy", mode="max", max_t=4, grace_period=1, reduction_factor=2
        )

    falling = [changed(lr=lr) for lr in (0.2, 0.1, 0.05, 0.02)]
    with_stops, without = run(simulation, falling, asha()), run(simulation, falling, FIFOScheduler())
    assert {s.trial for s in with_stops} == {s.trial for s in without} == {0, 1, 2, 3}
    assert len(with_stops) < len(without)
    assert with_stops[-1].at < without[-1].at
    assert max(s.value for s in with_stops if s.finished) == pytest.approx(0.8)


# ---- schedulers that pause

LRS = (0.02, 0.16, 0.08, 0.2, 0.01, 0.12, 0.04, 0.18, 0.06, 0.14, 0.1)


class Halfway(FIFOScheduler):
    """Pauses every trial after its second epoch; paused trials go on where no new one is left."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return TrialScheduler.PAUSE if result["epoch"] == 2 else TrialScheduler.CONTINUE


class Limited(QueueSearcher):
    """Draws while fewer trials run than there are workers, paused ones not counted, as TuneBOHB does.

    `told` is all that it hears, by the numbers of trials.
    """

    def __init__(self, configs: list[TrialConfig], workers: int) -> None:
        super().__init__(runs_of(configs), metric="accuracy", mode="max")
        self._workers = workers
        self._running: set[str] = set()
        self._numbers: dict[str, int] = {}
        self.told: list[list[Any]] = []

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        if len(self._running) >= self._workers:
            return None
        drawn = super().suggest(trial_id)
        if isinstance(drawn, dict):
            self._running.add(trial_id)
            self._numbers[trial_id] = len(self._numbers)
            self._tell("drawn", trial_id)
        return drawn

    def on_pause(self, trial_id: str) -> None:
        self._running.discard(trial_id)
        self._tell("paused", trial_id)

    def on_unpause(self, trial_id: str) -> None:
        self._running.add(trial_id)
        self._tell("unpaused", trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._tell("result", trial_id, result["epoch"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._running.discard(trial_id)
        self._tell("complete", trial_id, result and result["epoch"], error)

    def _tell(self, what: str, trial_id: str, *more: Any) -> None:
        self.told.append([what, self._numbers[trial_id], *more])


def hyperband(kind: type[HyperBandScheduler] = HyperBandForBOHB) -> HyperBandScheduler:
    return kind(time_attr="epoch", metric="accuracy", mode="max", max_t=4, reduction_factor=2)


def test_a_paused_trial_goes_on_where_it_was_and_no_worker_idles(simulation: Any) -> None:
    seen = run(simulation, [CONFIG, CONFIG, CONFIG], Halfway())
    by_trial = [[s.at for s in seen if s.trial == trial] for trial in range(3)]
    assert by_trial == [[1, 2, 3, 4], [1, 2, 5, 6], [3, 4, 5, 6]]
    assert [s.trial for s in seen if s.finished] == [0, 1, 2]


def test_a_trial_paused_after_its_last_epoch_ends_when_it_is_chosen_again(simulation: Any) -> None:
    class AtTheEnd(Halfway):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            return TrialScheduler.PAUSE if result["epoch"] == 4 else TrialScheduler.CONTINUE

    searcher = Limited([CONFIG], 1)
    run(simulation, [], AtTheEnd(), searcher=searcher)
    assert searcher.told[-2:] == [["result", 0, 4], ["complete", 0, 4, False]]


@pytest.mark.parametrize(
    ("kind", "workers"), [(HyperBandForBOHB, 1), (HyperBandForBOHB, 2), (HyperBandScheduler, 3)]
)
def test_every_trial_of_hyperband_ends_and_the_best_runs_longest(
    simulation: Any, kind: type[HyperBandScheduler], workers: int
) -> None:
    configs = [changed(lr=lr) for lr in LRS]
    scheduler = hyperband(kind)
    searcher = Limited(configs, workers) if kind is HyperBandForBOHB else None
    seen = run(simulation, configs, scheduler, workers=workers, searcher=searcher)
    assert [trial.status for trial in scheduler._trial_info] == ["TERMINATED"] * len(LRS)
    epochs = {trial: [s.value / LRS[trial] for s in seen if s.trial == trial] for trial in range(len(LRS))}
    for reported in epochs.values():
        assert reported == pytest.approx([1, 2, 3, 4][: len(reported)])
    assert len(epochs[LRS.index(max(LRS))]) == 4
    assert len(seen) < 4 * len(LRS)
    at_work = Counter(s.at for s in seen)  # an epoch takes a second
    last_begun = next(s.at for s in seen if s.trial == len(LRS) - 1) - 1
    assert all(at_work[second] == workers for second in np.arange(1, last_begun + 1))


def test_the_budget_ends_a_search_with_paused_trials(simulation: Any) -> None:
    configs = [changed(lr=lr) for lr in LRS]
    scheduler = hyperband()
    seen = run(simulation, configs, scheduler, budget=1.5, searcher=Limited(configs, 2))
    assert [(s.at, s.trial) for s in seen] == [(1.0, 0), (1.0, 1)]
    assert [t.status for t in scheduler._trial_info] == ["PAUSED", "PAUSED", "RUNNING", "RUNNING"]


def growing() -> type[Trainable]:
    """A trial that reports what `Fixed` says; sent to Ray as it stands here."""

    class Growing(Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.lr, self.epoch = config["config"]["lr"], 0

        def step(self) -> dict[str, float]:
            self.epoch += 1
            return {"epoch": self.epoch, "accuracy": self.lr * self.epoch}

        def save_checkpoint(self, folder: str) -> None:
            Path(folder, "epoch").write_text(str(self.epoch))

        def load_checkpoint(self, folder: str) -> None:  # type: ignore[override]
            self.epoch = int(Path(folder, "epoch").read_text())

        def reset_config(self, config: dict[str, Any]) -> bool:
            self.setup(config)
            return True

    return Growing


@pytest.mark.usefixtures("own_ray")
def test_a_searcher_hears_what_it_hears_of_a_real_ray(simulation: Any, tmp_path: Path) -> None:
    configs = [changed(lr=lr) for lr in LRS[:6]]
    real, simulated = Limited(configs, 1), Limited(configs, 1)
    tune = TuneConfig(search_alg=real, scheduler=hyperband(), num_samples=-1, reuse_actors=True)
    Tuner(growing(), tune_config=tune, run_config=RunConfig(storage_path=str(tmp_path), verbose=0)).fit()
    run(simulation, [], hyperband(), workers=1, searcher=simulated)
    assert {what for what, *_ in simulated.told} == {"drawn", "paused", "unpaused", "result", "complete"}
    assert simulated.told == real.told


def test_noise_around_a_surrogate_is_that_of_the_repeated_seeds(simulation: Any) -> None:
    """At the end of a schedule a run keeps the luck it has."""
    from surrogate import Curves, Surrogate, repeat_noise

    curves = Curves.read(ROOT / "results" / "curves" / "cars9-cpu.csv")
    covariance = repeat_noise(curves)
    spread = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(spread, spread)
    assert 0.01 < spread.min() < spread.max() < 0.04
    assert correlation[-1, -2] > 0.7 > 0.3 > correlation[0, 1]
    surrogate = Surrogate(curves.only(range(4)), noise=covariance)
    rng, mean = np.random.default_rng(0), np.full(8, 0.5)
    drawn = np.array([surrogate.sample(mean, rng) for _ in range(4000)])
    assert np.cov(drawn.T) == pytest.approx(covariance, abs=0.1 * spread.max() ** 2)
    single = {key: value for key, value in curves.accuracy.items() if key[1] == 0}
    assert repeat_noise(replace(curves, accuracy=single)) == pytest.approx(1e-4 * np.eye(8))

"""python tests/benchmarks/bench_search.py

Searchers and schedulers against each other in simulated time, on surrogates of the learning curves in
results/curves (`collect_curves.py` makes them). Regret is in points of noise-free val accuracy, of the
model that a search has in hand at 1/8, 1/4, 1/2 and the whole of its budget. A search of ours begins with
the baseline, which costs it time and teaches it nothing; it is also run without. Two surrogates,
of disjoint halves of the configurations: `--half design` to develop on, `--half final` for the table that is
quoted; with `--trees` the truth is a forest instead of a Gaussian process.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import numpy as np
import optuna
import scipy.stats
from bohb import INSTALLED, bohb, check_draws
from collect_curves import SIZES
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console
from rich.table import Table
from simulation import Clock, Seen, simulate, simulated
from surrogate import BACKBONES, Curves, Surrogate, errors, repeat_noise

from carmodels.presets import SPACES, baseline
from carmodels.space import Space
from carmodels.training.config import TrialConfig
from carmodels.training.run import Origin, Run
from tune.budget.plan import TRIAL_SHARE, Plan
from tune.optim.optuna_records import suggest
from tune.optim.scheduler import AshaScheduler, TimeLimit, grace_period
from tune.optim.searcher import OptunaSearcher
from tune.runtime.search_stage import BASELINE_SHARE

FOLDER = Path(__file__).parents[2] / "results"
WORKERS, BUDGET = 2, 3600.0  # seconds, of two cores
FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 1.0)
METRIC, EPOCHS = "accuracy", 8
_MANY = 20_000  # random configurations, whose best stands for the best there is

OURS = ("ours", "ours, no baseline")
Method = Callable[..., tuple[Searcher, TrialScheduler]]  # of seed, surrogate, space and clock


def main() -> None:
    """Simulate every method with every seed, print the table and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--half", choices=("design", "final"), default="design")
    parser.add_argument("--trees", action="store_true")
    parser.add_argument("--curves", type=Path, default=FOLDER / "curves" / "cars9-cpu.csv")
    parser.add_argument("--seeds", type=int, default=30, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="other than 0: a replication, kept apart")
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=[*METHODS])
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds of searching, another is kept apart"
    )
    parser.add_argument(
        "--trial-share", type=float, default=TRIAL_SHARE, help="of the budget that a trial of ours may take"
    )
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if not INSTALLED and "HyperBand + BOHB" in options.methods:
        options.methods = [name for name in options.methods if name != "HyperBand + BOHB"]
        print("HyperBand + BOHB is skipped; it needs: pip install hpbandster ConfigSpace")
    elif "HyperBand + BOHB" in options.methods:
        check_draws(SPACES["cpu"])
    curves = Curves.read(options.curves)
    design, final = curves.halves()
    known, unseen = (final, design) if options.half == "final" else (design, final)
    found = errors(known, unseen, trees=options.trees)
    print("surrogate on the other half: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()))
    first = options.first_seed
    jobs = [(name, seed) for name in options.methods for seed in range(first, first + options.seeds)]
    run = partial(
        one,
        curves=options.curves,
        half=options.half,
        trees=options.trees,
        budget=options.budget,
        share=options.trial_share,
    )
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        outcomes = list(pool.map(run, jobs, chunksize=5))
    by_method = {
        name: np.array([o for (n, _), o in zip(jobs, outcomes, strict=True) if n == name])
        for name in options.methods
    }
    parts = [options.half, *(["trees"] if options.trees else []), *([f"from-{first}"] if first else [])]
    if options.budget != BUDGET or options.trial_share != TRIAL_SHARE:
        parts.append(f"{options.budget:g}-seconds-share-{options.trial_share:g}")
    if options.methods != [*METHODS]:
        parts += [re.sub(r"\W+", "-", name).strip("-").lower() for name in options.methods]
    if options.curves != parser.get_default("curves"):
        parts.append(options.curves.stem)
    if options.seeds != parser.get_default("seeds"):
        parts.append(f"{options.seeds}-seeds")
    for reference in [one for one in OURS if one in by_method] or [None]:
        name = "-".join(parts + ["without-recipe"] * (reference == OURS[1]))
        report(by_method, name, reference)


def report(by_method: dict[str, np.ndarray], name: str, reference: str | None) -> None:
    """Mean regrets with the paired difference to a method of ours, and the time to come within a point."""
    ours = None if reference is None else by_method[reference]
    names = ["method", *(f"regret at {f:g}" for f in FRACTIONS), "minutes to within 1 point", "trials"]
    table = Table(*names, title=f"{name}, points of val accuracy; in brackets theirs - {reference}, 95 %")
    rows = []
    for method, outcome in by_method.items():
        cells = [method]
        for column in range(len(FRACTIONS)):
            text = f"{outcome[:, column].mean():.2f}"
            if ours is not None and method != reference:
                low, high = paired(outcome[:, column] - ours[:, column])
                text += f" ({low:+.2f} to {high:+.2f})"
            cells.append(text)
        cells += [f"{np.median(outcome[:, -2]) / 60:.1f}", f"{outcome[:, -1].mean():.0f}"]
        table.add_row(*cells)
        rows.append(cells)
    Console(width=170).print(table)
    path = FOLDER / "search" / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, "seeds"])
        writer.writerows([*row, len(by_method[row[0]])] for row in rows)


def paired(difference: np.ndarray) -> tuple[float, float]:
    """The 95 % interval (t) of a mean difference over seeds."""
    half = scipy.stats.t.ppf(0.975, len(difference) - 1) * scipy.stats.sem(difference)
    return float(difference.mean() - half), float(difference.mean() + half)


@lru_cache(maxsize=2)
def prepared(path: Path, half: str, trees: bool) -> tuple[Surrogate, Space, float]:
    """The surrogate of a half, the space, and the best accuracy in it."""
    curves = Curves.read(path)
    surrogate = Surrogate(curves.halves()[half == "final"], trees=trees, noise=repeat_noise(curves))
    space = SPACES["cpu"].with_override(SIZES).with_backbones(BACKBONES)  # as the curves were drawn
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    configs = [TrialConfig.from_dict(suggest(study.ask(), space)) for _ in range(_MANY)]
    return surrogate, space, float(surrogate.means(configs).max())


def one(
    job: tuple[str, int],
    curves: Path,
    half: str,
    trees: bool,
    budget: float,
    share: float,
) -> list[float]:
    """Regret in points at each fraction, seconds to within a point of the best, and trials, of one search."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name, seed = job
    np.random.seed(seed)  # noqa: NPY002  Ray's schedulers draw from it
    surrogate, space, best = prepared(curves, half, trees)
    clock = Clock()
    own = {"budget": budget, "share": share} if name in OURS else {}
    searcher, scheduler = METHODS[name](seed, surrogate, space, clock, **own)
    seen = simulate(
        searcher,
        scheduler,
        surrogate,
        metric=METRIC,
        budget=budget,
        workers=WORKERS,
        seed=seed,
        clock=clock,
    )
    in_hand = held(seen, finished_only=name in OURS)
    regrets = [100 * (best - worth(in_hand, fraction * budget)) for fraction in FRACTIONS]
    within = next((at for at, mean in in_hand if mean >= best - 0.01), budget)
    return [*regrets, within, float(len({result.trial for result in seen}))]


def held(seen: Sequence[Seen], *, finished_only: bool) -> list[tuple[float, float]]:
    """(time, noise-free accuracy) of the model that is best by what was observed, whenever it changes.

    Our searches keep the weights of complete trials alone.
    """
    found: list[tuple[float, float]] = []
    best = -1.0
    for result in seen:
        if result.value > best and (result.finished or not finished_only):
            best = result.value
            found.append((result.at, result.mean))
    return found


def worth(in_hand: Sequence[tuple[float, float]], at: float) -> float:
    """Accuracy of what is in hand at a time; chance before there is anything."""
    return next((mean for moment, mean in reversed(in_hand) if moment <= at), 1 / 9)


# ---- the methods


def plain(
    sampler: Callable[[int], optuna.samplers.BaseSampler],
    scheduler: Callable[[], TrialScheduler],
    seed: int,
    surrogate: Surrogate,
    space: Space,
    clock: Clock,
) -> tuple[Searcher, TrialScheduler]:
    """Ray's OptunaSearch and one of its schedulers, put together as the tutorials do."""
    searcher = OptunaSearch(partial(suggest, space=space), metric=METRIC, mode="max", sampler=sampler(seed))
    return searcher, scheduler()


def asha() -> TrialScheduler:
    """As in Ray's tutorials."""
    return AsyncHyperBandScheduler(
        time_attr="epoch", metric=METRIC, mode="max", max_t=EPOCHS, grace_period=1, reduction_factor=2
    )


def median() -> TrialScheduler:
    return MedianStoppingRule(time_attr="epoch", metric=METRIC, mode="max", grace_period=1)


def tpe(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed)


def at_random(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def ours(
    seed: int,
    surrogate: Surrogate,
    space: Space,
    clock: Clock,
    *,
    budget: float = BUDGET,
    share: float = TRIAL_SHARE,
    baseline_first: bool = True,
) -> tuple[Searcher, TrialScheduler]:
    """The searcher and the scheduler of a search, as `search_stage.search` makes them, the baseline first."""
    plan = Plan(surrogate.curves.costs(), budget, WORKERS, max_trial_seconds=share * budget)
    with simulated(clock):
        config, _ = plan.shrink_to_fit(baseline(space), space.image_sizes, BASELINE_SHARE)
    origin = Origin(metric=METRIC)
    first = Run(config, origin)
    searcher = OptunaSearcher(
        space,
        origin=origin,
        metric=METRIC,
        mode="max",
        seed=seed,
        limit=None,
        fits=plan.fits,
        queue=[first] if baseline_first else [],
    )
    scheduler = AshaScheduler(
        metric=METRIC,
        mode="max",
        epochs=EPOCHS,
        grace_period=grace_period(EPOCHS),
        time_limit=TimeLimit(soft=budget, hard=budget),
        protect={first.id},
    )
    return searcher, scheduler


def hyperband_bohb(
    seed: int, surrogate: Surrogate, space: Space, clock: Clock
) -> tuple[Searcher, TrialScheduler]:
    return bohb(space, metric=METRIC, epochs=EPOCHS, workers=WORKERS, seed=seed)


METHODS: dict[str, Method] = {
    "random": partial(plain, at_random, FIFOScheduler),
    "random + ASHA": partial(plain, at_random, asha),
    "TPE": partial(plain, tpe, FIFOScheduler),
    "TPE + ASHA (tutorial)": partial(plain, tpe, asha),
    "TPE + MedianStopping": partial(plain, tpe, median),
    "HyperBand + BOHB": hyperband_bohb,
    OURS[0]: ours,
    OURS[1]: partial(ours, baseline_first=False),
}


if __name__ == "__main__":
    main()

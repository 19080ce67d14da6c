"""Work of tune/search.py: all stages of a search, from the data to the report."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import torch

from carmodels.data.dataset import Splits
from carmodels.data.layout import data_roots, list_images
from carmodels.demo.folder import DEMO_WEIGHTS, draw_demo
from carmodels.ensembling.network import load_ensemble
from carmodels.files import user_path
from carmodels.formatting import duration
from carmodels.models.backbones import known_backbones
from carmodels.models.facts import short_name
from carmodels.models.weights import Weights
from carmodels.presets import SPACES
from carmodels.space import Space
from carmodels.steady_clock import steady_time
from carmodels.study import Study
from carmodels.training.run import Origin
from tune.budget.clock import STOPS_SHARE, Clock, last_share, search_share
from tune.budget.plan import TRIAL_SHARE
from tune.budget.stages import CPU_HOURS, GPU_HOURS, STAGES
from tune.cli import resources, session
from tune.cli.options import LONGEST_NAME, cache_folder, cost_limit
from tune.cli.preflight import findings
from tune.cli.study_folder import (
    begin,
    check_folder,
    check_resumed,
    describe_space,
    earlier_studies,
    refuse_within,
)
from tune.finalize import blending, confirmation, folds, repeats, retraining, stop_check
from tune.monitor.terminal import Screen
from tune.optim.standings import CONTENDERS
from tune.runtime import audition, search_stage
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job
from tune.runtime.profiling import costs_of, processor

COMMAND = "python tune/search.py"
DEMO_HOURS = 0.15  # a limit for slow machines; the demo usually ends by its number of trials


def run(options: argparse.Namespace, typed: Sequence[str], screen: Screen) -> int:
    """Run the whole command. `typed`: the options that differ from their defaults, as shell text."""
    begun = steady_time()
    bare = options.data is None
    granted = resources.check_machine(options)
    preset = options.preset or ("demo" if bare else "gpu" if torch.cuda.is_available() else "cpu")
    weights = Weights.parse(options.weights or (str(DEMO_WEIGHTS) if bare else "hub"))
    space, left_out = chosen_space(preset, options.set, weights)
    if left_out:
        screen.say(f"Left out of the space, no weights for them: {', '.join(left_out)}.")
    study = Study(user_path(options.results) / (options.study or default_name(options.data)))
    refuse_within(study, options)
    overwrite = options.overwrite or repeats_the_demo(study, typed)
    check_folder(study, resume=options.resume, overwrite=overwrite)
    later = models_later(options)
    found = findings(study, space, granted, cache_folder(options), later=later)
    session.report([*found, *resources.device_findings(preset, options.address)], screen)
    earlier = [] if options.resume else earlier_studies(options.warm_start, study, options.metric)
    data = user_path(options.data) if options.data else demo_data(options, screen)
    list_images(data_roots(data, cache_folder(options)), data)  # its errors come before weights are fetched
    backbones = described_backbones(weights, space, screen)
    if weights.source == "hub" and not options.address:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for the workers: the weights are on this disk now
    splits = session.open_data(data, options, space.largest_size, options.seed, screen)
    if options.fold_in:
        retraining.check_has_test(splits)
    if options.folds:
        folds.check_fold_count(splits, options.folds, options.seed)
    clock, trials = budget(options, space, bare, begun)
    facts = {
        "data": study.relative(data),
        "weights": study.relative(Path(weights.source)) if weights.is_folder else weights.source,
        "warm_start": [study.relative(user_path(f)) for f in options.warm_start],
        "backbones": backbones,
        **describe(options, typed, preset, space, splits),
    }
    describe_data(splits, screen)
    if options.check:
        if options.address:
            with session.ray_running(options, screen):
                session.look_at_machines(study, data, weights, options, screen, space.backbones)
        screen.say("Checked: data, weights, space, folders, disk, memory. Nothing stands in the way.")
        return 0
    with session.held(study):
        if options.resume:
            check_resumed(study, facts, splits, screen)
        with session.ray_running(options, screen) as workers:
            if options.address:
                session.look_at_machines(study, data, weights, options, screen, space.backbones)
            if not options.resume:
                begin(study, facts, splits, earlier)
            screen.say(
                f"Study {study.folder}: preset {preset}, {workers.count} trials side by side "
                f"on {facts['hardware']['device']}, {described_budget(clock, trials)}."
            )
            job = Job(study, splits, weights, workers, cache_folder(options), spent=study.seconds_by_stage())
            try:
                return go(job, space, options, clock, trials, screen)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("search.py --resume goes on with what was recorded") from None


def repeats_the_demo(study: Study, typed: Sequence[str]) -> bool:
    """Whether this is the plain demo (--check and --plain allowed) and the study is an earlier one."""
    if not set(typed) <= {"--check", "--plain"} or not study.exists:
        return False
    command = str(study.metadata.get("command"))
    more = command.removeprefix(COMMAND).split()
    return command.startswith(COMMAND) and set(more) <= {"--plain", "--overwrite"}


def described_budget(clock: Clock, trials: int | None) -> str:
    """The search's limits as text."""
    count = f"{trials} trials" if trials else "as many trials as fit"
    return count if math.isinf(clock.seconds) else f"{count}, {duration(clock.seconds)} in all"


def go(
    job: Job,
    space: Space,
    options: argparse.Namespace,
    clock: Clock,
    trials: int | None,
    screen: Screen,
) -> int:
    """Run the stages up to --until. Returns the exit code."""
    origin = Origin(
        metric=options.metric,
        seed=options.seed,
        data=job.splits.fingerprint,
        split=job.splits.split_hash,
    )
    if options.audition == "on":
        space, rows = audition.shortlisted(job, space, clock, seed=options.seed, say=screen.say)
        screen.audition(rows)
    if math.isfinite(clock.seconds) or job.workers.packed:
        job = replace(job, costs=costs_of(job, space, screen.say))
    watch = session.watched(job, clock, trials, screen)
    search = partial(
        search_stage.search,
        job,
        space,
        origin=origin,
        trials=trials,
        seed=options.seed,
        watch=watch,
        say=screen.say,
    )
    completed = search(clock=clock)
    if completed:
        repeats.chosen_trial(job.study, None)  # ValueError if none has finished
    longer = with_spare_time(job, options, clock) if completed and trials is None else clock
    if longer != clock:
        more = duration(longer.at(longer.search) - steady_time())
        screen.say(f"What follows does not need all the time that is left: the search goes on for {more}.")
        completed, clock = search(clock=longer, resumed=False), longer
    completed = completed and trained_further(job, options, clock, watch, screen)
    screen.rest()
    if not completed:
        screen.table(job.study)
        screen.say(
            f"Interrupted. The same command with --resume goes on; the table is {job.study.table_file}."
        )
        return 130
    last = STAGES.index(options.until)
    results = None
    if last >= STAGES.index("ensemble"):
        results = blending.ensemble(job, clock=clock, say=screen.say, max_seconds=cost_limit(options))
    screen.table(job.study)
    if results:
        screen.answer(results, job.study)
    if options.until == "report":
        report(job, clock, screen, with_thumbnails=options.thumbnails or options.data is None)
    screen.say(
        f"Every trial: {job.study.table_file}. All of it took {duration(steady_time() - clock.begun)}."
    )
    return 0


def report(job: Job, clock: Clock, screen: Screen, *, with_thumbnails: bool) -> None:
    """Last stage: write report.html, with thumbnails of the worst mistakes if requested."""
    from tune.reporting import page, thumbnails  # a second of imports, only for this stage

    if with_thumbnails:
        network = load_ensemble(job.study).to("cuda" if torch.cuda.is_available() else "cpu")
        seconds = min(thumbnails.SECONDS, clock.left)
        thumbnails.write_thumbnails(job.study, network, job.splits, seconds=seconds)
    screen.say(f"Report: {page.write_report(job.study)}")


def with_spare_time(job: Job, options: argparse.Namespace, clock: Clock) -> Clock:
    """The clock with the spare time of the later stages given to the search.

    Unchanged if the search ended long before its time: the space has nothing more to draw.
    """
    ends = clock.at(clock.search)
    if steady_time() < ends - TRIAL_SHARE * (ends - clock.begun):
        return clock
    packed = job.costs if job.workers.packed else None
    less = retraining.FOLD_IN_SHARE if options.fold_in else 0.0
    within = clock.at(clock.retrain - less) - steady_time()
    reruns = confirmation.confirmation_seconds(
        job.study, job.workers.count, max_reruns=options.confirm, costs=packed
    )
    return clock.with_spare_time(
        confirm=min(reruns, clock.seconds * (clock.confirm - clock.search)),  # the stage's own bound
        retrain=retraining.retraining_seconds(job, within=within, folds=options.folds) + less * clock.seconds,
        ensemble=blending.ensemble_seconds(job, folds=options.folds),
        stops=STOPS_SHARE if options.check_stops else 0.0,
    )


def trained_further(
    job: Job, options: argparse.Namespace, clock: Clock, watch: ProgressCallback, screen: Screen
) -> bool:
    """Run the training stages after the search, up to --until. False if interrupted."""
    last, say = STAGES.index(options.until), screen.say
    if options.check_stops:
        if not stop_check.check_stops(
            job,
            count=options.check_stops,
            seed=options.seed,
            clock=clock,
            watching=lambda study: session.watched(
                replace(job, study=study), clock, None, screen, inner="stops"
            ),
            say=say,
        ):
            return False
        screen.stops(job.study)
    if last >= STAGES.index("confirm"):
        if not confirmation.confirm(job, clock=clock, watch=watch, say=say, max_reruns=options.confirm):
            return False
        screen.standings(job.study)
    return last < STAGES.index("retrain") or retraining.retrain_all(
        job, clock=clock, watch=watch, say=say, folds=options.folds, fold_in=options.fold_in
    )


def models_later(options: argparse.Namespace) -> int:
    """Most models that the later stages save: reruns, retrained models, folds, soups."""
    until = STAGES.index(options.until)
    found = options.check_stops  # kept until all of them end
    found += 1 + options.confirm if until >= STAGES.index("confirm") else 1  # 1: the baseline
    if until >= STAGES.index("retrain"):
        found += folds.MOST_FOLDED * options.folds if options.folds else repeats.SEEDS + CONTENDERS - 1
        found += repeats.SEEDS if options.fold_in else 0
    return found + (CONTENDERS if until >= STAGES.index("ensemble") else 0)


def demo_data(options: argparse.Namespace, screen: Screen) -> Path:
    """Folder of the built-in data set. Drawn on first use."""
    folder = cache_folder(options) / "demo"
    screen.say("No --data given: this is the demo, ten classes of drawn cars in the competition's layout.")
    draw_demo(folder)
    return folder


def default_name(data: str | None) -> str:
    """Default name of the study: the name of the data."""
    return re.sub(r"[^\w.-]", "_", user_path(data).resolve().stem)[:LONGEST_NAME] if data else "demo"


def chosen_space(preset: str, overrides: list[str], weights: Weights) -> tuple[Space, list[str]]:
    """The preset with the overrides, without backbones that lack weights; and their names."""
    space = SPACES[preset]
    first = ("backbone", "image_size")  # other overrides are checked against these
    for text in sorted(overrides, key=lambda text: text.partition("=")[0] not in first):
        space = space.with_override(text)
    left_out = [name for name in space.backbones if not weights.has(name)]
    if len(left_out) == len(space.backbones):
        raise ValueError(
            f"--weights {weights.source}: no weights for any of {', '.join(left_out)}; "
            "name the files <timm name>.safetensors, or give --set backbone=NAME, --weights hub "
            "or --weights none"
        )
    return space.with_backbones(tuple(b for b in space.backbones if b not in left_out)), left_out


def described_backbones(weights: Weights, space: Space, screen: Screen) -> dict[str, dict[str, Any]]:
    """Fetch the weights. Returns facts about each backbone of the space, for study.json."""
    backbones = known_backbones(weights, space.backbones)
    for name, facts in backbones.items():
        sizes = space.sizes_of(name)
        if set(sizes) != set(space.image_sizes):
            screen.say(f"{short_name(name)} takes images of {', '.join(map(str, sizes))} px.")
        if facts["non_commercial"]:
            licence = f"the licence of its weights, {facts['licence']}, forbids commercial use"
            screen.say(f"{short_name(name)}: {licence}.", "yellow")
    return backbones


def budget(options: argparse.Namespace, space: Space, bare: bool, begun: float) -> tuple[Clock, int | None]:
    """The clock of the whole command, and the number of trials if limited."""
    asked = {"confirm": options.confirm, "check_stops": options.check_stops}
    hours, trials = options.hours, options.trials
    if hours is None and trials is None:
        on_gpus = torch.cuda.is_available() or (options.address and options.preset == "gpu")
        hours = DEMO_HOURS if bare else GPU_HOURS if on_gpus else CPU_HOURS
        trials = space.trials if bare else None
    clock = Clock(
        begun,
        math.inf if hours is None else 3600 * hours,
        search=search_share(**asked),
        last=last_share(options.until, **asked),
    )
    return clock, trials


def describe(
    options: argparse.Namespace, typed: Sequence[str], preset: str, space: Space, splits: Splits
) -> dict[str, Any]:
    """Facts for study.json: options, data, package versions and hardware."""
    packages = (
        "torch",
        "torchvision",
        "timm",
        "ray",
        "optuna",
        "albumentations",
        "numpy",
        "opencv-python-headless",
    )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": " ".join([COMMAND, *typed]),
        "begun": time.strftime("%Y-%m-%d %H:%M:%S"),
        "preset": preset,
        "space": describe_space(space),
        "seed": options.seed,
        "metric": options.metric,
        "fingerprint": splits.fingerprint,
        "split_hash": splits.split_hash,
        "classes": list(splits.classes),
        "class_names": list(splits.class_names),
        "images": {s.name: len(s) for s in (splits.train, splits.val, splits.holdout, splits.test)},
        "excluded": [asdict(e) for e in splits.excluded],
        "test_duplicates": [list(pair) for pair in splits.test_duplicates],
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in packages},
        },
        "max_size": space.largest_size,
        "hardware": {"device": gpus[0] if gpus else processor(), "gpus": gpus, "cores": joblib.cpu_count()},
    }


def describe_data(splits: Splits, screen: Screen) -> None:
    """Print the data set's sizes, excluded images and duplicates."""
    sizes = ", ".join(f"{s.name} {len(s)}" for s in (splits.train, splits.val, splits.holdout, splits.test))
    screen.say(f"{len(splits.classes)} classes ({', '.join(splits.class_names)}); images: {sizes}.")
    for lost in splits.excluded[:5]:
        screen.say(f"Left out: {lost.path} ({lost.reason}).", "yellow")
    if len(splits.excluded) > 5:
        screen.say(f"... {len(splits.excluded)} images left out in all; study.json lists them.", "yellow")
    if splits.test_duplicates:
        screen.say(
            f"{len(splits.test_duplicates)} test images look like labelled ones; study.json lists them."
        )

"""Training what the search found once more: from new seeds, over folds, on everything there is."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from carmodels.catalog import UNFREEZE
from carmodels.data.dataset import Splits
from carmodels.evaluation.metrics import METRICS
from carmodels.evaluation.predictions import blend
from carmodels.files import write_json
from carmodels.models.classifier import weights_damage
from carmodels.records import FOLD, FOLD_IN, TRAIN_SPLIT_STAGES, Role, State, TrialRecord
from carmodels.study import Study
from carmodels.submission import write_submission
from carmodels.training.config import TrialConfig
from carmodels.training.run import Run
from tune.budget.clock import LATE_RETRAIN_SHARE, Clock
from tune.budget.costs import SLOWER, Costs, expected_seconds, times_as_long
from tune.finalize.folds import MOST_FOLDED, all_folds, fold_records, folds_of, gather, ready, restore
from tune.optim.searcher import QueueSearcher
from tune.optim.standings import CONTENDERS, described, judged, without_seed
from tune.runtime.callbacks import ProgressCallback
from tune.runtime.job import Job, Say
from tune.runtime.runner import run_trials

SEEDS = 3  # runs of the best
FOLD_IN_SHARE = 0.06  # of the time, less for retraining where a last run on everything follows
LONGER = 2.0  # times a trial's epochs, where there is time: +5.9 points in results/final/NOTES.md
LEAST_OF_A_TRIAL = 0.5  # of its epochs: no shorter schedule is begun
NEW_HEAD = {"head", "head_depth"}  # what the weights of another configuration do not fit

# How a frozen backbone learns after all: at the rate of its head, groups below at half that of the one above.
OPENED: Mapping[str, Any] = {"unfreeze": "full", "layer_decay": 0.5}


@dataclass(frozen=True)
class Way:
    """How a configuration of the search is trained again."""

    epochs: int | None = None  # of a new model; None: from a trial's number to LONGER times that, as fits
    changes: Mapping[str, Any] = field(default_factory=dict)  # fields of TrialConfig, with their values
    goes_on: bool = False  # from the trial's weights in any case, with `epochs`, too, or not at all
    space_epochs: int = 0  # of the study's trials, some of which have fewer for want of time; 0: not known

    def inside(self, study: Study) -> Way:
        """The same, with the epochs of the study's trials."""
        return replace(self, space_epochs=epochs_of_space(study))

    def all_of(self, run: Run, parents: Sequence[str]) -> list[Run]:
        """What it may come to where there are weights of these runs to go on from, the best first."""
        if parents and (self.goes_on or not (self.epochs or self.changes.keys() & NEW_HEAD)):
            return self.onward(run, parents[0])
        return self.of(run)

    def onward(self, run: Run, parent: str) -> list[Run]:
        """A further schedule from the weights of that run of it, all of the backbone open; likewise.

        Of every length down to the trial's: each epoch more of it helps.
        """
        usual = max(run.config.epochs, self.space_epochs)
        lengths = [self.epochs] if self.epochs else range(round(LONGER * usual), usual - 1, -1)
        config = replace(self._opened(run.config), **{"unfreeze": "full", **self.changes})
        like = replace(run, config=config).with_origin(continues=parent)
        return [like.with_config(epochs=epochs) for epochs in lengths]

    def of(self, run: Run) -> list[Run]:
        """What a new model may come to, the longest schedule first; ValueError for an unfit change."""
        config = run.config
        usual = (max(config.epochs, self.space_epochs), config.epochs)  # one and the same for most trials
        lengths = {self.epochs} if self.epochs else {*usual, *(round(LONGER * epochs) for epochs in usual)}
        like = replace(run, config=replace(self._opened(config), **self.changes))
        return [like.with_config(epochs=epochs) for epochs in sorted(lengths, reverse=True)]

    def _opened(self, config: TrialConfig) -> TrialConfig:
        stays = self.changes.get("unfreeze") == "frozen"
        return config if stays else opened(config)


AS_IN_THE_TRIAL = Way()


def epochs_of_space(study: Study) -> int:
    """Of a trial of the study, but for a baseline that was shortened; 0 where its space is not known."""
    space = study.space
    return int(space.fixed.get("epochs", 0)) if space else 0


def _frozen(config: TrialConfig) -> bool:
    return UNFREEZE[config.unfreeze].head_only_epochs is None


def opened(config: TrialConfig) -> TrialConfig:
    """The configuration with a backbone that learns.

    A frozen one wins where the time for trials is short, and gains ten points when it is opened
    (results/final/NOTES.md).
    """
    return replace(config, **OPENED) if _frozen(config) else config


@dataclass(frozen=True)
class Room:
    """The time there is for training, and what that is measured by."""

    left: float  # seconds
    workers: int
    costs: Costs | None = None
    packed: bool = False  # whether trials had a share of a GPU each

    @classmethod
    def until(cls, end: float, job: Job) -> Room:
        """For training until `end`, time.time()."""
        return cls(max(0.0, end - time.time()), job.workers.count, job.costs, bool(job.workers.packed))

    def seconds(self, record: TrialRecord, config: TrialConfig, train: float = 1.0) -> float:
        """What training it another way takes, on `train` times as many images, by the pace of the trial.

        That says little where its backbone was frozen, and is not any more, or where it shared a GPU.
        """
        if self.costs and (self.packed or (_frozen(record.config) and not _frozen(config))):
            return train * SLOWER * self.costs.schedule(config)
        return expected_seconds(record) * times_as_long(config, record.config, train)

    def holds(
        self, record: TrialRecord, config: TrialConfig, runs: int, train: float = 1.0
    ) -> tuple[int, int]:
        """How many of the runs fit, and epochs of each: whole schedules if one fits, else shorter ones."""
        per_epoch = self.seconds(record, config, train) / config.epochs
        if math.isinf(self.left) or per_epoch <= 0:
            return runs, config.epochs
        rounds = int(self.left / (per_epoch * config.epochs))
        if rounds:
            return min(runs, rounds * self.workers), config.epochs
        shorter = int(self.left / per_epoch)
        return (min(runs, self.workers), shorter) if shorter >= _fewest(config.epochs) else (0, 0)


def retrain_all(
    job: Job,
    *,
    clock: Clock,
    watch: ProgressCallback,
    say: Say,
    trial_id: str | None = None,
    seeds: int = SEEDS,
    way: Way = AS_IN_THE_TRIAL,
    folds: int = 0,
    fold_in: bool = False,
) -> bool:
    """Retrain from new seeds or over folds, and then, if asked for, on everything; False if interrupted."""
    if fold_in:
        check_test(job.splits)
    less = FOLD_IN_SHARE if fold_in else 0.0
    if folds:
        completed = retrain_folds(
            job, folds=folds, clock=clock, watch=watch, say=say, trial_id=trial_id, way=way, less=less
        )
    else:
        completed = retrain(
            job, clock=clock, watch=watch, say=say, trial_id=trial_id, seeds=seeds, way=way, less=less
        )
    if not (completed and fold_in):
        return completed
    return retrain_on_everything(
        job, clock=clock, watch=watch, say=say, trial_id=trial_id, seeds=seeds, way=way
    )


def retrain(
    job: Job,
    *,
    clock: Clock,
    watch: ProgressCallback,
    say: Say,
    trial_id: str | None = None,
    seeds: int = SEEDS,
    way: Way = AS_IN_THE_TRIAL,
    less: float = 0.0,  # of the time, for what follows
) -> bool:
    """Train the best (or the named) configuration from new seeds, side by side; False if interrupted.

    Training goes on from the weights of the configuration's runs, in turn, with a schedule of its own (a warm
    restart, Loshchilov and Hutter, 2017) as long as the time holds, up to LONGER times the trial's. Without
    weights, or with `way.epochs`, they are new models. A frozen backbone is opened (linear probing, then
    fine-tuning; Kumar et al., 2022). Runs with new seeds that there are already count, where they were made
    that way. What time that leaves goes to the next best.
    """
    study = job.study
    way = way.inside(study)
    room = Room.until(clock.at(clock.retrain - less), job)
    best = _chosen(study, trial_id)
    others = [] if trial_id or math.isinf(room.left) else _alike(study)
    chosen = next((r for r in (best, *others) if _has_time(study, r, seeds, way, room)), best)
    runs, like = _to_train(study, chosen, seeds, way, room)
    if chosen != best:
        say(f"The time that is left does not hold one run of {best.config.title} ({best.trial_id}).")
    say(_announced(chosen, len(runs), len(_again(study, chosen, like)), like))
    owners = dict.fromkeys(runs, chosen)
    if trial_id is None:
        owners |= _beside(study, chosen, runs, way, room)
    for run, record in owners.items():
        if record != chosen:
            name = f"{record.config.title} ({record.trial_id})"
            say(f"Beside it, as there is time for it: {name}, {_difference(record.config, run)}.")
    roles = {run.id: _repeat(record, f"seed {run.origin.seed}") for run, record in owners.items()}
    completed = _train(
        job, list(owners), stage="retrain", roles=roles, clock=clock, share=clock.retrain - less, watch=watch
    )
    again = {r.trial_id: {"seed": r.origin.seed, "val": r.value} for r in _again(study, chosen, like)}
    _write_best(study, chosen, like if again else chosen.run, again)
    return completed


def most_seconds(job: Job, *, within: float = math.inf, folds: int = 0) -> float:
    """What retraining takes at most, where time is no matter, if the best stay those that they are now.

    None at all where `within` seconds hold not even the shortest run of any of them. Without the runs on
    everything, which have `FOLD_IN_SHARE`. Infinite where there are no trials.
    """
    study, splits = job.study, job.splits
    room = Room(math.inf, job.workers.count, job.costs, bool(job.workers.packed))
    way = AS_IN_THE_TRIAL.inside(study)
    if least_seconds(job) > within:
        return 0.0
    best = [standing.record for standing in judged(study)[:CONTENDERS]]
    each = max((room.seconds(r, way.of(r.run)[0].config) for r in best), default=math.inf)
    runs = folds * MOST_FOLDED if folds else SEEDS + CONTENDERS - 1
    images = 1 + len(splits.val) / len(splits.train) if folds else 1.0  # for each that a trial learns from
    return each * images * math.ceil(runs / room.workers)


def least_seconds(job: Job) -> float:
    """What the shortest run takes of those that cannot be told apart from the best; 0 without trials."""
    room = Room(math.inf, job.workers.count, job.costs, bool(job.workers.packed))
    way = AS_IN_THE_TRIAL.inside(job.study)
    lasts = ((record, way.of(record.run)[-1].config) for record in _alike(job.study))
    return min((room.seconds(r, c) * _fewest(c.epochs) / c.epochs for r, c in lasts), default=0.0)


def backbones(study: Study, trial_id: str | None = None) -> set[str]:
    """Those of the best few, or of the named trial."""
    best = [] if trial_id else [standing.record for standing in judged(study)[:CONTENDERS]]
    return {record.config.backbone for record in (_chosen(study, trial_id), *best)}


def _alike(study: Study) -> list[TrialRecord]:
    """The best few that cannot be told apart from the best, which is the first of them."""
    return [standing.record for standing in judged(study)[:CONTENDERS] if not standing.clearly_worse]


def _has_time(study: Study, record: TrialRecord, seeds: int, way: Way, room: Room) -> bool:
    """Whether there are runs of it, or is time for one."""
    runs, like = _to_train(study, record, seeds, way, room)
    return bool(runs or _again(study, record, like))


def _train(
    job: Job,
    runs: Sequence[Run],
    *,
    stage: str,
    roles: dict[str, Role],
    clock: Clock,
    share: float,
    watch: ProgressCallback,
) -> bool:
    """Train all of these side by side, each with a GPU of its own, until that share of the time is over.

    One that had been cut short, and does not come as far this time, stays what it was.
    """
    study, end = job.study, clock.at(share)
    ids = {run.id for run in runs}
    before = {r.trial_id: r for r in study.records() if r.trial_id in ids and r.state is State.COMPLETE}
    try:
        completed = not runs or run_trials(
            replace(job, workers=replace(job.workers, packed=0), until=end),
            stage=stage,
            begun=clock.begun,
            end=clock.late(share, 1.0, LATE_RETRAIN_SHARE),
            search_alg=QueueSearcher(runs, metric=study.metric, mode=METRICS[study.metric].mode),
            roles=roles,
            watch=watch,
        )
    finally:
        for record in study.records():
            if (old := before.get(record.trial_id)) and not _as_far(record, old):
                study.append(old)
    study.write_table()
    return completed


def _as_far(new: TrialRecord, old: TrialRecord) -> bool:
    """Whether a run has come as far as the one before it, which the clock cut short."""
    return new.state is State.COMPLETE and (not new.cut_short or new.epochs_run >= old.epochs_run)


def _write_best(study: Study, chosen: TrialRecord, like: Run, again: dict[str, Any]) -> None:
    content = {
        "trial_id": chosen.trial_id,
        **like.to_dict(),
        "metric": study.metric,
        "val": chosen.value,
        "retrained": again,
        "standings": described(judged(study)),
    }
    write_json(study.best_file, content)


def _to_train(study: Study, chosen: TrialRecord, seeds: int, way: Way, room: Room) -> tuple[list[Run], Run]:
    """The runs that retraining lacks and has time for, and what they are but for their seeds."""
    first = chosen.origin.seed + 1
    parents = _parents(study, chosen)
    names = [record.trial_id for record in parents]
    if way.goes_on and not parents:
        raise ValueError(
            f"--onward: {study.folder} has no weights of {chosen.trial_id}; leave it out, or name another "
            "with --trial"
        )
    there: Run | None = None  # the best of what there are runs of
    for longest in way.all_of(chosen.run, names):
        like = longest.with_origin(head_seed=chosen.origin.init_seed)  # so that they make a soup
        made = _again(study, chosen, like)
        done = {r.origin.seed for r in made if not r.cut_short and not _lost(study, r)}
        there = there or (like if made else None)
        cut = {r.origin.seed for r in made if r.cut_short}  # they stay, and other seeds are whole
        free = (seed for seed in itertools.count(first) if seed not in cut)
        used_up = done | _diverged(study, like)
        runs = [like.with_origin(seed=seed) for seed in itertools.islice(free, seeds)]
        if like.origin.continues:
            runs = [_onto(r, parents[i % len(parents)]) for i, r in enumerate(runs)]
        missing = [r for r in runs if r.origin.seed not in used_up]
        count, planned = room.holds(chosen, like.config, len(missing))
        if not missing or (count and planned == like.config.epochs):
            return missing[:count], like
        if done:
            return [], there or like  # a shorter schedule is only for want of a whole one
    shorter = (like.with_config(epochs=n) for n in range(like.config.epochs - 1, max(planned, 1) - 1, -1))
    for made_shorter in shorter:  # for want of time, earlier
        if seeds_made := {r.origin.seed for r in _again(study, chosen, made_shorter) if not r.cut_short}:
            epochs = made_shorter.config.epochs
            left = [r.with_config(epochs=epochs) for r in missing[:count] if r.origin.seed not in seeds_made]
            return left if planned >= epochs else [], made_shorter
    if not count:
        return [], there or like
    return [r.with_config(epochs=planned) for r in missing[:count]], like.with_config(epochs=planned)


def _lost(study: Study, run: TrialRecord) -> bool:
    """Whether the weights of a finished run are gone or damaged, so that it is of no use."""
    return bool(weights_damage(study.weights_file(run.trial_id)))


def _diverged(study: Study, like: Run) -> set[int]:
    """Seeds with which just that configuration diverged, as it would again."""
    found = (r.run for r in study.records() if r.diverged and r.stage in TRAIN_SPLIT_STAGES)
    own = {name: getattr(like.origin, name) for name in ("seed", "head_seed", "continues")}
    return {r.origin.seed for r in found if r.with_origin(**own) == like}


def _onto(run: Run, parent: TrialRecord) -> Run:
    """To go on from that run; the head's start is its own, by which soups know what mixes."""
    return run.with_origin(continues=parent.trial_id, head_seed=parent.origin.init_seed)


def _beside(
    study: Study, chosen: TrialRecord, first: Sequence[Run], way: Way, room: Room
) -> dict[Run, TrialRecord]:
    """A run each of the next best configurations, as members of the ensemble, as far as bounded time goes.

    Of those that cannot be told apart from the best.
    """
    found: dict[Run, TrialRecord] = {}
    busy = [0.0] * room.workers  # seconds that each has work for
    if first:
        busy = _loaded(busy, len(first), room.seconds(chosen, first[0].config))
    for standing in judged(study) if math.isfinite(room.left) else ():
        record = standing.record
        if record == chosen or standing.clearly_worse or len(found) == CONTENDERS - 1:
            continue
        one = replace(room, left=room.left - min(busy), workers=1)
        for run in _to_train(study, record, 1, way, one)[0]:
            if run.config.epochs >= record.config.epochs:  # a shorter one would hardly be a better member
                found[run] = record
                busy = _loaded(busy, 1, room.seconds(record, run.config))
    return found


def _parents(study: Study, chosen: TrialRecord) -> list[TrialRecord]:
    """The runs of its configuration whose weights training goes on from, the trial itself first."""
    runs = sorted(_runs(study, chosen), key=lambda r: r.trial_id != chosen.trial_id)
    return [r for r in runs if not weights_damage(study.weights_file(r.trial_id))]


def _runs(study: Study, chosen: TrialRecord) -> list[TrialRecord]:
    """The finished runs of just that configuration in search and reruns, best first."""
    like = without_seed(chosen.run)
    board = (r for r in study.leaderboard() if r.stage in ("search", "confirm"))
    return [r for r in board if without_seed(r.run) == like]


def _again(study: Study, chosen: TrialRecord, like: Run) -> list[TrialRecord]:
    """Finished runs of just that configuration with other seeds than the trial's, best first."""
    board = (
        r for r in study.leaderboard() if r.stage in TRAIN_SPLIT_STAGES and r.trial_id != chosen.trial_id
    )
    start = like.origin
    own = {r.trial_id for r in _runs(study, chosen)} if start.continues else set()

    def alike(run: Run) -> bool:
        parent = start.continues if run.origin.continues in own else run.origin.continues
        return run.with_origin(seed=start.seed, head_seed=start.head_seed, continues=parent) == like

    return [r for r in board if alike(r.run)]


def _announced(chosen: TrialRecord, missing: int, done: int, like: Run) -> str:
    """What retraining is about to do, in words."""
    name = f"{chosen.config.title} ({chosen.trial_id})"
    if missing:
        there = f", {done} more are there" if done else ""
        return f"Retraining {name}, new seeds: {missing}{there}; {_difference(chosen.config, like)}."
    if done:
        return f"Retraining {name} is left out, new seeds that are there: {done}."
    return "Retraining is left out: the time that is left does not hold one run of it."


def _difference(old: TrialConfig, run: Run) -> str:
    """What is done in another way than in the trial, in words."""
    new = run.config
    more = f" instead of {old.epochs}" if new.epochs != old.epochs else ""
    words = [f"{new.epochs} epochs each{more}"]
    if run.origin.continues:
        words = [f"{new.epochs} epochs more each, on from its weights"]
    before = vars(old)
    for name, value in vars(new).items():
        if name not in ("epochs", "patience") and value != before[name]:
            words.append(f"{name} {value} instead of {before[name]}")
    return ", ".join(words)


def retrain_folds(
    job: Job,
    *,
    folds: int,
    clock: Clock,
    watch: ProgressCallback,
    say: Say,
    trial_id: str | None = None,
    way: Way = AS_IN_THE_TRIAL,
    less: float = 0.0,  # of the time, for what follows
) -> bool:
    """Train the best few configurations (or the named one) once a fold; False if interrupted.

    As many as the time holds, the best in any case where it holds one; where it holds none, new seeds take
    their place. Folds that are there are not trained again, but for those that the clock cut short. Holdout
    is not touched.
    """
    study, splits = job.study, job.splits
    way = way.inside(study)
    chosen = [_chosen(study, trial_id)]
    if trial_id is None:
        chosen += _runners_up(study, chosen[0], way, say)
    train = (len(splits.train) + len(splits.val)) * (folds - 1) / folds / len(splits.train)
    room = Room.until(clock.at(clock.retrain - less), job)
    planned = _folds_to_train(study, chosen, folds, way, room, train)
    for record, like in planned.items():
        say(
            f"Over {folds} folds of train and val: {record.config.title} ({record.trial_id}), "
            f"{_difference(record.config, like)}."
        )
    there = [
        r for r in chosen if any(_all_there(study, like, folds) for like in _fold_ways(study, r, folds, way))
    ]
    if not planned and not there:
        say(
            f"Folds are left out: the time that is left does not hold {folds} runs of the best. New seeds "
            "take their place."
        )
        return retrain(job, clock=clock, watch=watch, say=say, trial_id=trial_id, way=way, less=less)
    missing = {m: r for r, like in planned.items() for m in _missing_folds(study, like, folds)}
    roles = {m.id: _repeat(r, f"fold {1 + (m.origin.fold or 0)} of {folds}") for m, r in missing.items()}
    completed = _train(
        job, list(missing), stage=FOLD, roles=roles, clock=clock, share=clock.retrain - less, watch=watch
    )
    restore(job)
    for record in gather(study):
        say(f"{record.trial_id}: {record.note} ({len(splits.train) + len(splits.val)} images).")
    study.write_table()
    own = [r for r in ready(study) if r.repeats == chosen[0].trial_id]
    if completed and not own and any(_fails(study, like, folds) for like in planned.values()):
        say("A fold diverged, so that there is no whole set of the best: new seeds take their place.")
        return retrain(job, clock=clock, watch=watch, say=say, trial_id=trial_id, way=way, less=less)
    best = own[0].run.with_origin(folds=0) if own else chosen[0].run
    _write_best(study, chosen[0], best, {r.trial_id: {"val": r.value} for r in own})
    return completed


def _runners_up(study: Study, best: TrialRecord, way: Way, say: Say) -> list[TrialRecord]:
    """The next best few, save those that cannot be trained that way."""
    found = []
    for standing in judged(study)[:MOST_FOLDED]:
        record = standing.record
        if record == best:
            continue
        try:
            way.of(record.run)
        except ValueError as error:
            say(f"{record.config.title} ({record.trial_id}) is left out: {error}.")
            continue
        found.append(record)
    return found


def _done(study: Study) -> set[str]:
    """Ids of the runs that are finished, and were not cut short."""
    return {r.trial_id for r in study.records() if r.state is State.COMPLETE and not r.cut_short}


def _fails(study: Study, like: Run, folds: int) -> bool:
    """Whether one of its folds has diverged, as it would again."""
    ids = {run.id for run in folds_of(like, folds)}
    return any(r.trial_id in ids and r.diverged for r in study.records())


def _missing_folds(study: Study, like: Run, folds: int) -> list[Run]:
    done, records = _done(study), {r.trial_id: r for r in study.records()}
    wanted = folds_of(like, folds)
    return [r for r in wanted if r.id not in done or _lost(study, records[r.id])]


def _all_there(study: Study, like: Run, folds: int) -> bool:
    """Whether each of its folds has been trained, be it cut short."""
    return len(fold_records(study, all_folds(folds_of(like, folds)[0]))) == folds


def _begun_folds(study: Study, record: TrialRecord, folds: int, way: Way) -> list[Run]:
    """Schedules of other lengths, for want of time, of which some folds are there and some are not."""
    like = way.of(record.run)[0].with_config(patience=0)
    others = (r.run for r in study.records() if r.stage == FOLD and r.origin.folds == folds)
    found = {r.with_origin(folds=0, fold=None) for r in others}
    own = [r for r in found if not way.epochs and r.with_config(epochs=like.config.epochs) == like]
    return [r for r in own if _missing_folds(study, r, folds)]


def _fold_ways(study: Study, record: TrialRecord, folds: int, way: Way) -> list[Run]:
    """What its folds may be, those first that were begun."""
    ways = [*way.of(record.run), *_begun_folds(study, record, folds, way)]
    ways = [like for like in ways if not _fails(study, like, folds)]
    return sorted(ways, key=lambda like: len(_missing_folds(study, like, folds)) == folds)


def _folds_to_train(
    study: Study,
    chosen: Sequence[TrialRecord],
    folds: int,
    way: Way,
    room: Room,
    train: float,
) -> dict[TrialRecord, Run]:
    """How each of these, best first, is trained over folds, of those that there is time for."""
    found: dict[TrialRecord, Run] = {}
    busy = [0.0] * room.workers  # seconds that each has work for
    for record in chosen:
        ways = _fold_ways(study, record, folds, way)
        complete = [like for like in ways if _all_there(study, like, folds)]
        for like in complete[:1] or ways:  # where some were cut short a set of another length is no better
            each = room.seconds(record, like.config, train)
            after = _loaded(busy, len(_missing_folds(study, like, folds)), each)
            if max(after) <= room.left:
                found[record], busy = like, after
                break
        else:
            if record == chosen[0] and not complete:
                return _shorter_folds(study, record, folds, way, room, train) if ways else {}
    return found


def _shorter_folds(
    study: Study,
    best: TrialRecord,
    folds: int,
    way: Way,
    room: Room,
    train: float,
) -> dict[TrialRecord, Run]:
    """For want of time for whole schedules a shorter one of the best, unless some of its folds are there."""
    like = way.of(best.run)[-1]
    per_epoch = room.seconds(best, like.config, train) / like.config.epochs
    shorter = int(room.left / (math.ceil(folds / room.workers) * per_epoch))
    begun = fold_records(study, all_folds(folds_of(like, folds)[0]))
    fewer = like.with_config(epochs=max(1, shorter))
    if begun or shorter < _fewest(like.config.epochs) or _fails(study, fewer, folds):
        return {}
    return {best: fewer}


def _loaded(busy: Sequence[float], runs: int, each: float) -> list[float]:
    """What workers have to do with so many runs more, each of them the next one's that is free."""
    found = list(busy)
    for _ in range(runs):
        found[found.index(min(found))] += each
    return found


def check_test(splits: Splits) -> None:
    """Raises ValueError where there is nothing that models could answer which learnt from everything."""
    if not len(splits.test):
        raise ValueError("--fold-in: there are no test images to answer; leave it out")


def retrain_on_everything(
    job: Job,
    *,
    clock: Clock,
    watch: ProgressCallback,
    say: Say,
    trial_id: str | None = None,
    seeds: int = SEEDS,
    way: Way = AS_IN_THE_TRIAL,
) -> bool:
    """Train the best (or the named) configuration on all labelled images, holdout too; False if interrupted.

    What these models say of the test images is a submission of its own. No number goes with it: nothing is
    left that they have not learnt from.
    """
    study, splits = job.study, job.splits
    check_test(splits)
    chosen = _chosen(study, trial_id)
    train = sum(len(s) for s in (splits.train, splits.val, splits.holdout)) / len(splits.train)
    room = Room.until(clock.at(clock.retrain), job)
    missing, alike = _everything_to_train(study, chosen, seeds, way.inside(study), room, train)
    name = f"{chosen.config.title} ({chosen.trial_id})"
    if missing:
        difference = _difference(chosen.config, missing[0])
        say(f"Training {name} on all labelled images, holdout too, seeds: {len(missing)}; {difference}.")
    roles = {r.id: _repeat(chosen, f"seed {r.origin.seed}, all labelled images") for r in missing}
    completed = _train(
        job, missing, stage=FOLD_IN, roles=roles, clock=clock, share=clock.retrain, watch=watch
    )
    there = [r for r in study.records() if r.trial_id in alike and r.state is State.COMPLETE]
    there = [r for r in there if not r.cut_short] or there  # no val would keep out those that were cut short
    answers = [r.trial_id for r in there if study.has_predictions(r.trial_id, "test")]
    if not answers and not missing:
        say(f"A last run of {name} on everything is left out: there is no time for it.")
    if answers:
        blended = blend([study.predictions(i, "test") for i in answers])
        write_submission(blended, study.fold_in_file, sample=splits.sample_file)
        say(
            f"{study.fold_in_file}: the mean of {len(answers)} models that learnt from everything. No score "
            "goes with it: nothing is left that they have not seen."
        )
    return completed


def _everything_to_train(
    study: Study, chosen: TrialRecord, seeds: int, way: Way, room: Room, train: float
) -> tuple[list[Run], set[str]]:
    """Runs on everything that are lacking and fit into the time; ids of all that count, whatever length."""
    done, alike = {i for i in _done(study) if study.has_predictions(i, "test")}, set[str]()
    for longest in way.of(chosen.run):
        like = longest.with_config(patience=0).with_origin(fold_in=True)
        runs = [like.with_origin(seed=like.origin.seed + 1 + i) for i in range(seeds)]
        alike |= {r.id for r in runs}
        missing = [r for r in runs if r.id not in done]
        count, planned = room.holds(chosen, like.config, len(missing), train)
        if not missing or (count and planned == like.config.epochs):
            break
    others = [r for r in study.records() if r.stage == FOLD_IN and r.state is State.COMPLETE]
    epochs, seed = like.config.epochs, like.origin.seed
    shorter = {r.run for r in others if r.run.with_config(epochs=epochs).with_origin(seed=seed) == like}
    alike |= {r.id for r in shorter}
    if planned < epochs:  # what there is of as many epochs, or more, does not need to be made again
        there = {r.origin.seed for r in shorter if r.config.epochs >= planned and r.id in done}
        missing = [r for r in missing if r.origin.seed not in there]
        count -= len(there)
    missing = [r.with_config(epochs=planned) for r in missing[: max(0, count)]]
    return missing, alike | {r.id for r in missing}


def _repeat(of: TrialRecord, how: str) -> Role:
    return Role(repeats=of.trial_id, note=f"{how} of {of.trial_id}")


def _chosen(study: Study, trial_id: str | None) -> TrialRecord:
    """The named trial, else the one whose configuration is best by all its runs."""
    candidates = [r for r in study.leaderboard() if r.stage == "search"]
    if trial_id is not None:
        candidates = [r for r in candidates if r.trial_id == trial_id]
        if not candidates:
            raise ValueError(
                f"--trial {trial_id}: no finished trial of {study.folder} has this id; see trials.csv"
            )
        return candidates[0]
    if not candidates:
        reasons = [r.reason for r in study.records() if r.state is not State.COMPLETE]
        last = f" (the last one: {reasons[-1]})" if reasons else ""
        raise ValueError(f"{study.folder} has no finished trial{last}; --resume goes on, with more --hours")
    found = judged(study)
    return found[0].record if found else candidates[0]


def _fewest(epochs: int) -> int:
    """The shortest schedule that may take the place of a whole one, in epochs."""
    return max(2, int(LEAST_OF_A_TRIAL * epochs))

"""Starts or resumes a study, after checks of its folder."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from carmodels.data.dataset import Splits
from carmodels.files import user_path
from carmodels.space import Space
from carmodels.study import SplitRow, Study
from tune.monitor.terminal import Screen


def earlier_studies(folders: Sequence[str], own: Study, metric: str) -> list[Study]:
    """The studies to warm-start from. Raises ValueError for this study, another metric or no trials."""
    studies = [Study(user_path(folder)) for folder in folders]
    for study in studies:
        if study.folder == own.folder:
            raise ValueError(f"--warm-start {study.folder} is this study itself; --resume goes on with it")
        if study.metric != metric:
            raise ValueError(f"--warm-start {study.folder}: its metric is {study.metric}, not {metric}")
        if not study.records():
            raise ValueError(f"--warm-start {study.folder}: it has no trials; leave it out")
    return studies


def check_folder(study: Study, *, resume: bool, overwrite: bool) -> None:
    """Raises ValueError if the study's folder does not fit --resume or --overwrite.

    A folder that is not a study is refused. It may hold images, which --overwrite would delete.
    """
    if not study.exists and (study.folder.is_file() or any(study.folder.glob("*"))):
        raise ValueError(
            f"{study.folder} is there already, but is no study: it holds no study.json; bring that back, "
            "move the folder away, or give another --study NAME"
        )
    if resume and not study.exists:
        raise ValueError(f"--resume: there is no study at {study.folder}; leave --resume out to begin one")
    if study.exists and not (resume or overwrite):
        raise ValueError(
            f"{study.folder} holds a study already; give --resume to go on with it, "
            "--overwrite to delete it, or another --study NAME"
        )


def refuse_within(study: Study, options: argparse.Namespace) -> None:
    """Raises ValueError for data, weights or a cache in the study's folder: --overwrite deletes it."""
    for name in ("data", "weights", "cache"):
        value = getattr(options, name)
        if value in (None, "hub", "none"):
            continue
        if user_path(value).resolve().is_relative_to(study.folder.resolve()):
            raise ValueError(
                f"--{name} {value} lies in the folder of the study, {study.folder}; "
                "give another --study NAME or --results DIR"
            )


def check_resumed(study: Study, facts: dict[str, Any], splits: Splits, screen: Screen) -> None:
    """Report damaged records. Raises ValueError if the resumed search or its data has changed."""
    before = study.metadata  # read first: refuses a study of another version
    if damaged := study.damaged_lines():
        screen.say(f"{study.trials_file}: lines {damaged} are damaged, their trials run again.", "yellow")
    if lost := study.missing_trials():
        screen.say(
            f"{study.trials_file} was cut short: it lacks {len(lost)} trials of "
            f"{study.table_file.name}, which may run again.",
            "yellow",
        )
    for name in ("preset", "space", "seed", "metric", "warm_start", "weights", "fingerprint", "split_hash"):
        if not _same_fact(study, name, before[name], facts[name]):
            raise ValueError(
                f"--resume: {name} was {before[name]} in {study.folder} and is {facts[name]} now; "
                "give the options of the first run, or another --study NAME"
            )
    study.make_folders()
    study.write_splits(split_rows(splits))  # restores a damaged file
    moved = {"data": facts["data"], "weights": facts["weights"]}  # the paths may have changed
    study.write_metadata({**before, **moved})


def _same_fact(study: Study, name: str, before: Any, now: Any) -> bool:
    """Whether a fact of the study is unchanged. Folders may have moved."""
    if name == "warm_start":  # the study holds a copy of their trials
        return [Path(folder).name for folder in before] == [Path(folder).name for folder in now]
    moved = name == "weights" and not {before, now} & {"hub", "none"} and not study.resolved(before).is_dir()
    return moved or before == now


def begin(study: Study, facts: dict[str, Any], splits: Splits, earlier: Sequence[Study]) -> None:
    """Start the study. An existing one is replaced."""
    if study.exists:
        old = study.folder.with_name(f".{study.folder.name}.old")  # atomic, in case the process is killed
        shutil.rmtree(old, ignore_errors=True)
        study.folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    study.begin(facts, split_rows(splits), earlier)


def split_rows(splits: Splits) -> list[SplitRow]:
    """The rows of splits.csv, one for every image."""
    groups = splits.images.groups
    return [
        (split.name, image, -1 if split.labels is None else int(split.labels[i]), int(groups[split.rows[i]]))
        for split in (splits.train, splits.val, splits.holdout, splits.test)
        for i, image in enumerate(split.ids)
    ]


def describe_space(space: Space) -> dict[str, Any]:
    """The space as JSON types."""
    dimensions = {n: {"kind": type(d).__name__, **_listed(asdict(d))} for n, d in space.dimensions.items()}
    return {"dimensions": dimensions, "fixed": dict(space.fixed)}


def _listed(value: dict[str, Any]) -> dict[str, Any]:
    """Nested tuples as lists, to compare equal with values read from JSON."""
    return {k: _as_list(v) for k, v in value.items()}


def _as_list(value: Any) -> Any:
    return [_as_list(v) for v in value] if isinstance(value, list | tuple) else value

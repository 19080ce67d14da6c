"""A study's folder: the one owner of the file names under `results/`, and of what each file holds."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from carmodels.catalog import BACKBONES
from carmodels.evaluation.metrics import METRICS
from carmodels.evaluation.predictions import Predictions
from carmodels.files import append_line, csv_text, read_json, write_json, write_whole
from carmodels.records import FOLD, NOT_ENDED, State, TrialRecord

VERSION = "0.2"  # of what a study's files hold: raise it whenever an older study could be misread


@dataclass(frozen=True)
class Study:
    """A study's folder and what is in it. Paths are where a file is or will be."""

    folder: Path

    @property
    def trials_file(self) -> Path:
        return self.folder / "trials.jsonl"

    @property
    def table_file(self) -> Path:
        return self.folder / "trials.csv"

    @property
    def best_file(self) -> Path:
        return self.folder / "best.json"

    @property
    def ensemble_file(self) -> Path:
        return self.answer_file("ensemble")

    def answer_file(self, name: str) -> Path:
        """ensemble.json, or student.json for what was distilled from it."""
        return self.folder / f"{name}.json"

    @property
    def submission_file(self) -> Path:
        return self.folder / "submission.csv"

    @property
    def fold_in_file(self) -> Path:
        """The submission of models that learnt from all labelled images."""
        return self.folder / "submission-fold-in.csv"

    @property
    def report_file(self) -> Path:
        return self.folder / "report.html"

    @property
    def thumbnails_file(self) -> Path:
        return self.folder / "thumbnails.json"

    @property
    def earlier_file(self) -> Path:
        return self.folder / "earlier.json"

    @property
    def stops_file(self) -> Path:
        return self.folder / "stops.json"

    @property
    def stops(self) -> Study:
        """A study of its own inside this one: stopped trials that were finished after all, with their ids."""
        return Study(self.folder / "stops")

    def begin_stops(self) -> Study:
        """The study of stops, begun where it was not yet."""
        inner, facts = self.stops, self.facts
        if not inner.exists:
            paths = {
                name: inner.relative(self.resolved(facts[name]))
                for name in ("data", "weights")
                if facts[name] not in ("hub", "none")
            }
            rows = [(row["split"], row["id"], int(row["label"])) for row in self._split_rows()]
            inner.begin({**facts, **paths}, rows)
        return inner

    def _keep_earlier(self, studies: Sequence[Study]) -> None:
        """Copy the search trials of other studies, so that this one can go on without them."""
        lines = {str(s.folder): [r.to_json() for r in s.records() if r.stage == "search"] for s in studies}
        write_json(self.earlier_file, lines)

    def earlier(self) -> dict[str, list[TrialRecord]]:
        """The trials of other studies that this one began with, by folder."""
        if not self.earlier_file.is_file():
            return {}
        lines = read_json(self.earlier_file)
        return {folder: [TrialRecord.from_json(line) for line in found] for folder, found in lines.items()}

    @property
    def ray_folder(self) -> Path:
        return self.folder / "ray"

    @property
    def tensorboard_folder(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def optuna_file(self) -> Path:
        return self.folder / "optuna.db"

    def predictions_file(self, trial_id: str, split: str, view: str = "plain") -> Path:
        middle = split if view == "plain" else f"{split}.{view}"
        return self.folder / "predictions" / f"{trial_id}.{middle}.npz"

    def weights_file(self, trial_id: str) -> Path:
        return self.folder / "weights" / f"{trial_id}.safetensors"

    @property
    def lock_file(self) -> Path:
        """Beside the folder, since that may be deleted to start anew."""
        return self.folder.with_name(f".{self.folder.name}.lock")

    @property
    def exists(self) -> bool:
        """Whether a study was begun here."""
        return (self.folder / "study.json").is_file()

    def begin(
        self,
        facts: Mapping[str, Any],
        splits: Iterable[tuple[str, str, int]],
        earlier: Sequence[Study] = (),
    ) -> None:
        """Write splits.csv, from rows as in `write_splits`, earlier studies' trials, and last study.json."""
        self.make_folders()
        self.write_splits(splits)
        if earlier:
            self._keep_earlier(earlier)
        self.write_facts(facts)

    def make_folders(self) -> None:
        """Make those for what is not committed, which a copy of a study may lack."""
        for name in ("predictions", "weights"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Write study.json, with the version of this project's files."""
        write_json(self.folder / "study.json", {"version": VERSION, **facts})

    def write_splits(self, splits: Iterable[tuple[str, str, int]]) -> None:
        """Write splits.csv from rows of (split, id, class index or -1)."""
        _write_csv(self._splits_file, ("split", "id", "label"), splits)

    @property
    def facts(self) -> dict[str, Any]:
        """study.json. Raises ValueError where there is none, or one of another version."""
        path = self.folder / "study.json"
        if not path.is_file():
            raise ValueError(
                f"{self.folder} is no study: it holds no study.json; give a folder under results/"
            )
        facts = read_json(path)
        if facts.get("version") != VERSION:
            raise ValueError(
                f"{self.folder} was made by version {facts.get('version', '0.1')} of this project, this is "
                f"{VERSION}: use that version, or begin another study"
            )
        return facts

    @property
    def metric(self) -> str:
        return self.facts["metric"]

    def relative(self, path: Path) -> str:
        """A path as study.json keeps it: seen from the study's folder, so that both may move together."""
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def resolved(self, path: str) -> Path:
        """The absolute path of what `relative` gave."""
        return Path(os.path.normpath(self.folder / path))

    def labels(self, split: str) -> dict[str, int]:
        """Class index by id for a labelled split."""
        return {row["id"]: int(row["label"]) for row in self._split_rows() if row["split"] == split}

    @property
    def _splits_file(self) -> Path:
        return self.folder / "splits.csv"

    def _split_rows(self) -> list[dict[str, str]]:
        """Raises ValueError where it does not end as it should, or lacks images that study.json counts."""
        with self._splits_file.open(newline="", encoding="utf-8") as file:
            text = file.read()
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        found = Counter(row["split"] for row in rows)
        wanted = Counter(self.facts.get("images", {}))
        if not text.endswith("\n") or (wanted and found != wanted):
            raise ValueError(
                f"{self._splits_file} is damaged: it names {found.total()} images instead of "
                f"{wanted.total()}, or ends within a line; search.py --resume writes it anew"
            )
        return rows

    def append(self, record: TrialRecord) -> None:
        """Add a trial to trials.jsonl: one write, on disk before this returns."""
        append_line(self.trials_file, record.to_json())

    def records(self) -> list[TrialRecord]:
        """Every trial as its last line has it, in the order of those; a torn line is skipped."""
        return list(self._read()[0].values())

    def lost(self) -> list[str]:
        """Ids of trials that trials.csv names and trials.jsonl does not: it was cut short at a line's end."""
        if not self.table_file.is_file():
            return []
        known = {r.trial_id for r in self.records()}
        with self.table_file.open(newline="", encoding="utf-8") as file:
            return [row["trial_id"] for row in csv.DictReader(file) if row["trial_id"] not in known]

    def damaged_lines(self) -> list[int]:
        """Numbers of the lines of trials.jsonl that are no records (the first line is 1)."""
        return self._read()[1]

    def _read(self) -> tuple[dict[str, TrialRecord], list[int]]:
        if not self.trials_file.is_file():
            return {}, []
        found = self.trials_file.stat()
        return _parsed(self.trials_file, found.st_size, found.st_mtime_ns)

    def spent(self) -> dict[str, float]:
        """Seconds up to the last trial of each stage, over all commands."""
        found: dict[str, float] = {}
        for record in self.records():
            found[record.stage] = max(found.get(record.stage, 0.0), record.at)
        return found

    def leaderboard(self) -> list[TrialRecord]:
        """Finished trials that have a value on val, best first; a single fold has one on other images."""
        sign = -1 if METRICS[self.metric].mode == "max" else 1
        finished = (r for r in self.records() if r.state is State.COMPLETE and r.stage != FOLD)
        ranked = [(sign * r.value, r) for r in finished if r.value is not None]
        return [record for _, record in sorted(ranked, key=lambda pair: pair[0])]

    def predictions(self, trial_id: str, split: str, view: str = "plain") -> Predictions:
        """Raises ValueError where the file is damaged, OSError where it is missing."""
        return Predictions.load(self.predictions_file(trial_id, split, view))

    def answers(self, trial_id: str, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities (N, C) and class indices (N,) of a labelled split, in the order of its labels.

        Raises as `predictions` does.
        """
        labels = self.labels(split)
        return self.predictions(trial_id, split).aligned(list(labels)).probs, np.array(list(labels.values()))

    def forget_predictions(self, trial_id: str) -> None:
        """Delete all that a model of that name has said, through whatever view."""
        pattern = self.predictions_file(trial_id, "*")
        for file in pattern.parent.glob(pattern.name):
            file.unlink()

    def has_predictions(self, trial_id: str, split: str, view: str = "plain") -> bool:
        """Whether they are there and intact."""
        try:
            self.predictions(trial_id, split, view)
        except (FileNotFoundError, ValueError):
            return False
        return True

    def table(self) -> list[dict[str, Any]]:
        """A row a trial, finished ones first, best first; a column a hyperparameter."""
        finished = self.leaderboard()
        ranked = {r.trial_id for r in finished}
        others = sorted(
            (r for r in self.records() if r.trial_id not in ranked), key=lambda r: (r.state, r.at)
        )
        rows = [_table_row(rank, r) for rank, r in enumerate(finished, start=1)]
        return rows + [_table_row(None, r) for r in others]

    def write_table(self) -> None:
        """Write trials.csv, the table."""
        rows = self.table()
        names = tuple(rows[0]) if rows else ("rank", "trial_id", "state")
        _write_csv(self.table_file, names, (tuple(row.values()) for row in rows))

    def keep_weights(self, count: int, *, also: Iterable[str] = ()) -> None:
        """Delete the search's weights, save those of its best `count` finished trials and of `also`.

        A trial that runs may have written its own already, and is left alone, as are an ensemble's members.
        """
        best = [r.trial_id for r in self.leaderboard() if r.stage == "search"][:count]
        kept = {*best, *also, *self._members()}
        for record in self.records():
            ended = record.stage == "search" and record.state not in NOT_ENDED
            if ended and record.trial_id not in kept:
                self.weights_file(record.trial_id).unlink(missing_ok=True)

    def _members(self) -> list[str]:
        """Ids of the models of the ensemble that there is."""
        try:
            return [member["trial_id"] for member in read_json(self.ensemble_file)["members"]]
        except (FileNotFoundError, ValueError):
            return []


@lru_cache(maxsize=8)  # it is asked for several times as each trial ends
def _parsed(path: Path, size: int, modified: int) -> tuple[dict[str, TrialRecord], list[int]]:
    """The records of a file of this size, written to at this time, and the numbers of its damaged lines."""
    found: dict[str, TrialRecord] = {}
    damaged: list[int] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        try:
            record = _record(line)
            found.pop(record.trial_id, None)
            found[record.trial_id] = record
        except ValueError:
            damaged.append(number)
    return found, damaged


@lru_cache(maxsize=10_000)
def _record(line: bytes) -> TrialRecord:
    return TrialRecord.from_json(line.decode("utf-8", errors="replace"))


def _table_row(rank: int | None, record: TrialRecord) -> dict[str, Any]:
    value = record.value
    best = None
    if record.curve and value is not None:
        best = min(record.curve, key=lambda epoch: abs(epoch.value - value))
    origin = asdict(record.origin)
    for name in ("data", "split", "metric"):  # the study's, in study.json
        origin.pop(name)
    return {
        "rank": rank or "",
        "trial_id": record.trial_id,
        "stage": record.stage,
        "state": str(record.state),
        "cause": record.cause or "",
        "value": "" if value is None else round(value, 5),
        "val_accuracy": round(best.val_accuracy, 5) if best else "",
        "val_loss": round(best.val_loss, 5) if best else "",
        "best_epoch": best.epoch if best else "",
        "epochs_run": record.epochs_run,
        "seconds": round(record.seconds, 1),
        "parameters_millions": BACKBONES[record.config.backbone].millions,
        **asdict(record.config),
        **origin,
        "cut_short": record.cut_short,
        "baseline": record.baseline,
        "repeats": record.repeats,
        "note": record.note,
        "reason": record.reason,
    }


def _write_csv(path: Path, names: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> None:
    write_whole(path, csv_text([names, *rows]))

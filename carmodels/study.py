"""A study's folder. Owns the file names under `results/<study>/` and what each file holds."""

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

from carmodels.evaluation.metrics import METRICS
from carmodels.evaluation.predictions import Predictions
from carmodels.files import NUMBER, append_line, csv_text, read_json, write_atomic, write_json
from carmodels.models.facts import facts_of, remember
from carmodels.records import FOLD, NOT_ENDED, State, TrialRecord
from carmodels.space import Space

SplitRow = tuple[str, str, int, int | str]  # split, id, class index or -1, group or ""
VERSION = "0.3"  # of a study's files; raise it when an older study could be misread

_METADATA: dict[str, Any] = {  # kinds of values in study.json, as in `other_kind`
    **dict.fromkeys(("data", "weights", "command", "begun", "metric", "fingerprint", "split_hash"), str),
    **dict.fromkeys(("seed", "max_size"), int),
    **{key: [str] for key in ("classes", "class_names", "warm_start")},
    **{key: {} for key in ("images", "backbones", "hardware", "versions")},
    "excluded": [{}],
}
_RESULTS: dict[str, Any] = {  # of ensemble.json and student.json
    "members": [{"trial_id": str, "weight": NUMBER, "temperature": NUMBER}],
    "temperature": NUMBER,
    "tta": {"views": [str]},
    "val": {"single": {"trial_id": str}},
    **{key: {} for key in ("holdout", "nested", "cost")},
}
_OWN_FOLDERS = ("predictions", "weights", "ray", "tensorboard", "stops")
_OWN_FILES = (
    *("study.json", "splits.csv", "trials.jsonl", "trials.csv", "best.json", "ensemble.json", "student.json"),
    *("holdout.jsonl", "submission.csv", "submission-fold-in.csv", "thumbnails.json", "earlier.json"),
    *("stops.json", "optuna.db"),
)


@dataclass(frozen=True)
class Study:
    """A study's folder and its contents. A path property names a file that may not exist yet."""

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
    def audition_file(self) -> Path:
        """How linear probes ranked the backbones before the first trial, best first."""
        return self.folder / "audition.json"

    @property
    def ensemble_file(self) -> Path:
        return self.results_file("ensemble")

    def results_file(self, name: str) -> Path:
        """Members and scores of the ensemble, or of its student: ensemble.json or student.json."""
        return self.folder / f"{name}.json"

    def results(self, name: str = "ensemble") -> dict[str, Any]:
        """What `results_file` holds. Raises ValueError if it is damaged, OSError if it is missing."""
        return read_json(self.results_file(name), _RESULTS)

    @property
    def holdout_file(self) -> Path:
        return self.folder / "holdout.jsonl"

    @property
    def submission_file(self) -> Path:
        return self.folder / "submission.csv"

    @property
    def fold_in_file(self) -> Path:
        """The submission of the models trained on all labelled images."""
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

    def refuse_own(self, out: Path) -> None:
        """Raises ValueError if writing to `out`, a path without links, would replace a file of the study.

        The report may be replaced: it is made anew at any time.
        """
        folder = Path(os.path.realpath(self.folder))
        own = any(out.is_relative_to(folder / name) for name in _OWN_FOLDERS)
        if own or out in [folder / name for name in _OWN_FILES]:
            raise ValueError(f"--out {out} is a file of the study {self.folder}: give another name")

    @property
    def lock_file(self) -> Path:
        """Beside the folder, since `--overwrite` deletes the folder."""
        return self.folder.with_name(f".{self.folder.name}.lock")

    @property
    def _splits_file(self) -> Path:
        return self.folder / "splits.csv"

    @property
    def _metadata_file(self) -> Path:
        return self.folder / "study.json"

    @property
    def exists(self) -> bool:
        """Whether the folder holds a study."""
        return self._metadata_file.is_file()

    def begin(
        self,
        metadata: Mapping[str, Any],
        splits: Iterable[SplitRow],
        earlier: Sequence[Study] = (),
    ) -> None:
        """Write the files of a new study: splits.csv, the earlier studies' trials and, last, study.json."""
        self.make_folders()
        self.write_splits(splits)
        if earlier:
            self._write_earlier(earlier)
        self.write_metadata(metadata)

    def make_folders(self) -> None:
        """Create the folders that are not committed, which a copy of a study may lack."""
        for name in ("predictions", "weights"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def write_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Write study.json and the version of its format."""
        write_json(self._metadata_file, {"version": VERSION, **metadata})

    def add_backbones(self, backbones: Mapping[str, Mapping[str, Any]]) -> None:
        """Write facts about backbones to study.json. What it holds already stays."""
        metadata = self.metadata
        self.write_metadata({**metadata, "backbones": {**backbones, **metadata.get("backbones", {})}})

    def remember_backbones(self) -> None:
        """Know what study.json says of backbones that have no row in the catalog.

        Their hub or folder may be out of reach.
        """
        if self.exists:
            remember(read_json(self._metadata_file, _METADATA).get("backbones", {}))

    def write_splits(self, splits: Iterable[SplitRow]) -> None:
        """Write splits.csv."""
        _write_csv(self._splits_file, ("split", "id", "label", "group"), splits)

    @property
    def metadata(self) -> dict[str, Any]:
        """study.json. Raises ValueError if it is missing or of another version."""
        if not self.exists:
            raise ValueError(
                f"{self.folder} is no study: it holds no study.json; give a folder under results/"
            )
        metadata = read_json(self._metadata_file, _METADATA)
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{self.folder} was made by version {metadata.get('version', '0.1')} of this project, this "
                f"is {VERSION}: use that version, or begin another study"
            )
        if (metric := metadata.get("metric")) and metric not in METRICS:
            raise ValueError(
                f"{self._metadata_file}: metric is {metric!r}, must be one of {', '.join(METRICS)}; "
                "bring a copy back"
            )
        return metadata

    @property
    def metric(self) -> str:
        return self.metadata["metric"]

    @property
    def space(self) -> Space | None:
        """The search space; None if another version of the project wrote one that this version lacks."""
        metadata = self.metadata
        self.remember_backbones()
        try:
            return Space.from_dict(metadata["space"])
        except ValueError:
            return None

    def relative(self, path: Path) -> str:
        """A path relative to the study's folder, as study.json stores it: the two can be moved together."""
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def resolved(self, path: str) -> Path:
        """The absolute path of what `relative` returned."""
        return Path(os.path.normpath(self.folder / path))

    def labels(self, split: str) -> dict[str, int]:
        """Class index by id, for a labelled split."""
        return {row["id"]: int(row["label"]) for row in self._split_rows() if row["split"] == split}

    def groups(self, ids: Iterable[str]) -> np.ndarray:
        """(N,) groups of labelled images, for `carmodels.evaluation.intervals`: near-duplicates share one.

        In a study of a version that did not write them down, each image is its own group.
        """
        rows = (row for row in self._split_rows() if row["label"] != "-1" and row.get("group"))
        group_of = {row["id"]: int(row["group"]) for row in rows}
        unused = 1 + max(group_of.values(), default=-1)
        return np.array([group_of.get(name, unused + n) for n, name in enumerate(ids)], dtype=np.int64)

    def _split_rows(self) -> list[dict[str, str]]:
        """Raises ValueError if splits.csv is missing or damaged, or lacks images that study.json counts."""
        file, remedy = self._splits_file, "search.py --resume writes it anew"
        if not file.is_file():
            raise ValueError(f"{file} is missing; {remedy}")
        text = file.read_bytes().decode("utf-8-sig", errors="replace")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        if wrong := [number for number, row in enumerate(rows, start=1) if not _is_split_row(row)]:
            raise ValueError(f"{file} is damaged: row {wrong[0]} is no split,id,label,group; {remedy}")
        counts = Counter(row["split"] for row in rows)
        expected = Counter(self.metadata.get("images", {}))
        if not text.endswith("\n") or (expected and counts != expected):
            raise ValueError(
                f"{file} is damaged: it names {counts.total()} images instead of "
                f"{expected.total()}, or ends within a line; {remedy}"
            )
        return rows

    @property
    def stop_check(self) -> Study:
        """The study of pruned trials that were trained to the end after all, under their own ids."""
        return Study(self.folder / "stops")

    def begin_stop_check(self) -> Study:
        """`stop_check`, created if it does not exist."""
        inner, metadata = self.stop_check, self.metadata
        if not inner.exists:
            paths = {
                name: inner.relative(self.resolved(metadata[name]))
                for name in ("data", "weights")
                if metadata[name] not in ("hub", "none")
            }
            rows = [(r["split"], r["id"], int(r["label"]), r.get("group") or "") for r in self._split_rows()]
            inner.begin({**metadata, **paths}, rows)
        return inner

    def _write_earlier(self, studies: Sequence[Study]) -> None:
        """Copy other studies' search trials, so that this study does not need their folders again."""
        lines = {str(s.folder): [r.to_json() for r in s.records() if r.stage == "search"] for s in studies}
        write_json(self.earlier_file, lines)

    def earlier(self) -> dict[str, list[TrialRecord]]:
        """The earlier studies' trials that this study was warm-started with, by folder."""
        if not self.earlier_file.is_file():
            return {}
        self.remember_backbones()
        by_folder = read_json(self.earlier_file)
        return {
            folder: [TrialRecord.from_json(line) for line in lines] for folder, lines in by_folder.items()
        }

    def append(self, record: TrialRecord) -> None:
        """Add a record to trials.jsonl. It is on disk when this returns."""
        append_line(self.trials_file, record.to_json())

    def records(self) -> list[TrialRecord]:
        """The last record of each trial, in file order. Skips damaged lines."""
        return list(self._read_trials()[0].values())

    def damaged_lines(self) -> list[int]:
        """Numbers of the lines of trials.jsonl that hold no record; the first line is 1."""
        return self._read_trials()[1]

    def _read_trials(self) -> tuple[dict[str, TrialRecord], list[int]]:
        if not self.trials_file.is_file():
            return {}, []
        self.remember_backbones()
        status = self.trials_file.stat()
        return _parse_trials(self.trials_file, status.st_size, status.st_mtime_ns)

    @property
    def damage(self) -> str:
        """What trials.jsonl has lost, in words; "" if it is whole."""
        if damaged := self.damaged_lines():
            return (
                f"{self.trials_file}: lines {damaged} are damaged, their trials left out; bring a copy back"
            )
        return ""

    def missing_trials(self) -> list[str]:
        """Ids in trials.csv that trials.jsonl lacks, because it was truncated at a line end."""
        if not self.table_file.is_file():
            return []
        existing = {r.trial_id for r in self.records()}
        with self.table_file.open(newline="", encoding="utf-8") as file:
            return [row["trial_id"] for row in csv.DictReader(file) if row["trial_id"] not in existing]

    def seconds_by_stage(self) -> dict[str, float]:
        """Seconds that each stage has run, up to the end of its last trial, over all commands."""
        seconds: dict[str, float] = {}
        for record in self.records():
            seconds[record.stage] = max(seconds.get(record.stage, 0.0), record.at)
        return seconds

    def leaderboard(self) -> list[TrialRecord]:
        """Complete trials, best value on val first. Single folds are left out: they are not scored on val."""
        return best_first(self.records(), self.metric)

    def table(self) -> list[dict[str, Any]]:
        """One row per trial, one column per hyperparameter. The leaderboard first, then the other trials."""
        complete = self.leaderboard()
        ranked = {r.trial_id for r in complete}
        others = sorted(
            (r for r in self.records() if r.trial_id not in ranked), key=lambda r: (r.state, r.at)
        )
        rows = [_table_row(rank, r) for rank, r in enumerate(complete, start=1)]
        return rows + [_table_row(None, r) for r in others]

    def write_table(self) -> None:
        """Write `table` to trials.csv."""
        rows = self.table()
        names = tuple(rows[0]) if rows else ("rank", "trial_id", "state")
        _write_csv(self.table_file, names, (tuple(row.values()) for row in rows))

    def predictions(self, trial_id: str, split: str, view: str = "plain") -> Predictions:
        """Raises ValueError if the file is damaged, OSError if it is missing."""
        return Predictions.load(self.predictions_file(trial_id, split, view))

    def has_predictions(self, trial_id: str, split: str, view: str = "plain") -> bool:
        """Whether the file exists and is intact."""
        try:
            self.predictions(trial_id, split, view)
        except (FileNotFoundError, ValueError):
            return False
        return True

    def delete_predictions(self, trial_id: str) -> None:
        """Delete a model's predictions for all splits and views."""
        pattern = self.predictions_file(trial_id, "*")
        for file in pattern.parent.glob(pattern.name):
            file.unlink()

    def probs_and_labels(self, trial_id: str, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities (N, C) and class indices (N,) of a labelled split. Raises as `predictions` does."""
        labels, file = self.labels(split), self.predictions_file(trial_id, split)
        found = self.predictions(trial_id, split).aligned(list(labels), ours=str(file), theirs="splits.csv")
        return found.probs, np.array(list(labels.values()))

    def keep_weights(self, count: int, *, also: Iterable[str] = ()) -> None:
        """Delete the weights of search trials, except the best `count`, those in `also` and ensemble members.

        Weights of a trial that has not ended stay: it may have written them already.
        """
        best = [r.trial_id for r in self.leaderboard() if r.stage == "search"][:count]
        kept = {*best, *also, *self._ensemble_members()}
        for record in self.records():
            ended = record.stage == "search" and record.state not in NOT_ENDED
            if ended and record.trial_id not in kept:
                self.weights_file(record.trial_id).unlink(missing_ok=True)

    def _ensemble_members(self) -> list[str]:
        try:
            return [member["trial_id"] for member in self.results()["members"]]
        except (FileNotFoundError, ValueError):
            return []


def best_first(records: Iterable[TrialRecord], metric: str) -> list[TrialRecord]:
    """Complete trials that are scored on val, best value first. Log loss breaks ties."""
    sign = -1 if METRICS[metric].mode == "max" else 1
    complete = (r for r in records if r.state is State.COMPLETE and r.stage != FOLD)
    ranked = [(sign * r.value, r.log_loss, r) for r in complete if r.value is not None]
    return [record for *_, record in sorted(ranked, key=lambda row: row[:2])]


def _is_split_row(row: Mapping[str, str]) -> bool:
    """Whether the columns are there, with numbers where they belong. An older study has no groups."""
    numbers = (row.get("label"), row.get("group") or "0")
    return (
        bool(row.get("split"))
        and row.get("id") is not None
        and all(number is not None and number.removeprefix("-").isdecimal() for number in numbers)
    )


@lru_cache(maxsize=8)  # each trial's end asks several times
def _parse_trials(path: Path, size: int, modified: int) -> tuple[dict[str, TrialRecord], list[int]]:
    """Records by trial_id, and numbers of damaged lines. `size` and `modified` are for the cache's key."""
    records: dict[str, TrialRecord] = {}
    damaged: list[int] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        try:
            record = _parse_line(line)
            records.pop(record.trial_id, None)
            records[record.trial_id] = record
        except ValueError:
            damaged.append(number)
    return records, damaged


@lru_cache(maxsize=10_000)
def _parse_line(line: bytes) -> TrialRecord:
    return TrialRecord.from_json(line.decode("utf-8", errors="replace"))


def _table_row(rank: int | None, record: TrialRecord) -> dict[str, Any]:
    value, best = record.value, record.best_epoch
    origin = asdict(record.origin)
    for name in ("data", "split", "metric"):  # the same for all trials, in study.json
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
        "microbatches": record.microbatches,
        "parameters_millions": facts_of(record.config.backbone).millions,
        **asdict(record.config),
        **origin,
        "cut_short": record.cut_short,
        "baseline": record.baseline,
        "repeats": record.repeats,
        "note": record.note,
        "reason": record.reason,
    }


def _write_csv(path: Path, names: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> None:
    write_atomic(path, csv_text([names, *rows]))

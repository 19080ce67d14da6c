"""Looks at holdout. Each is kept with its date; the first is the score to quote.

A later score is somewhat too good: what the earlier ones showed may have led to it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from carmodels.files import append_line, json_ready, write_atomic
from carmodels.formatting import interval_text
from carmodels.study import Study

ANSWERS = {"ensemble": "an ensemble", "student": "a student"}  # what is scored on holdout


@dataclass(frozen=True)
class Look:
    """One score on holdout."""

    number: int  # within the study, from 1
    at: str  # local time; "" in a study of a version that did not write it down
    answer: str  # key of ANSWERS
    members: Mapping[str, float]  # weight by trial id
    views: tuple[str, ...]
    scores: Mapping[str, Any]  # `holdout` of the results file
    hidden: Mapping[str, Any] | None  # expected score on the test images; None without such

    @property
    def title(self) -> str:
        date = f" ({self.at})" if self.at else ""
        return ("first look" if self.number == 1 else f"look {self.number}") + date


def looks(study: Study) -> list[Look]:
    """All looks at holdout, in order. Skips damaged lines of holdout.jsonl.

    A study of an older version has no such file. Its results files keep the last look each and a count.
    """
    if not study.holdout_file.is_file():
        return _older_looks(study)
    lines = study.holdout_file.read_text(encoding="utf-8", errors="replace").split("\n")
    found = (_parsed(line) for line in lines)
    return [look for look in found if look is not None]


def quoted_look(study: Study, answer: str) -> Look:
    """The first look at an ensemble, or at a student. The results file of `answer` must exist."""
    kept = next((look for look in looks(study) if look.answer == answer), None)
    return kept or _look(answer, study.results(answer), number=1, at="")


def later_looks(study: Study, answer: str) -> list[Look]:
    """The looks at an ensemble, or at a student, that are not to be quoted."""
    return [look for look in looks(study) if look.answer == answer][1:]


def quoted_suffix(study: Study, answer: str) -> str:
    """Which look is quoted, to append to a heading. Empty if the study had no other."""
    look = quoted_look(study, answer)
    if look.number == 1:
        return f", {look.title}" if len(looks(study)) > 1 else ""
    return f", {look.title}, the first at {ANSWERS[answer]} that is on record"


def later_sentence(study: Study, answer: str) -> str:
    """What the last look showed, if it is not the quoted one; else ""."""
    later = later_looks(study, answer)
    if not later:
        return ""
    last = later[-1]
    return (
        f"Holdout was looked at {looks(study)[-1].number} times. Not to quote, as earlier looks may have led "
        f"to it: {last.title} at {ANSWERS[answer]}, {interval_text(study.metric, last.scores[answer])}."
    )


def add_look(study: Study, answer: str, results: Mapping[str, Any]) -> Look:
    """Add a look to holdout.jsonl. It is on disk when this returns.

    `results` is the content of the results file of `answer`.
    """
    earlier = looks(study)
    if earlier and not study.holdout_file.is_file():
        write_atomic(study.holdout_file, "".join(f"{_line(look)}\n" for look in earlier))
    number = 1 + (earlier[-1].number if earlier else 0)
    look = _look(answer, results, number=number, at=time.strftime("%Y-%m-%d %H:%M:%S"))
    append_line(study.holdout_file, _line(look))
    return look


def _look(answer: str, results: Mapping[str, Any], *, number: int, at: str) -> Look:
    return Look(
        number=number,
        at=at,
        answer=answer,
        members={member["trial_id"]: member["weight"] for member in results["members"]},
        views=tuple(results["tta"].get("views", ())),
        scores={name: value for name, value in results["holdout"].items() if name != "looks"},
        hidden=results.get("hidden"),
    )


def _line(look: Look) -> str:
    return json.dumps(json_ready(vars(look)), ensure_ascii=False)


def _parsed(line: str) -> Look | None:
    """The look of a line; None if the line is damaged."""
    try:
        fields = json.loads(line)
        return Look(**{**fields, "views": tuple(fields["views"])})
    except (json.JSONDecodeError, TypeError, KeyError):
        return None


def _older_looks(study: Study) -> list[Look]:
    """The last look of each results file. Its number counts those whose scores were overwritten."""
    found: list[Look] = []
    for answer in ANSWERS:
        if study.results_file(answer).is_file():
            results = study.results(answer)
            before = found[-1].number if found else 0
            number = before + results["holdout"].get("looks", 1)
            found.append(_look(answer, results, number=number, at=""))
    return found

"""One page that compares studies: progress, scores and settings."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from carmodels.evaluation.intervals import Interval, paired_gain
from carmodels.files import write_atomic
from carmodels.formatting import duration, gain_text, gain_unit, interval_text, score_text
from carmodels.holdout import Look, looks, quoted_look
from carmodels.records import TrialRecord
from carmodels.study import Study
from tune.optim.standings import standings_of
from tune.reporting import charts
from tune.reporting.page import counts, refuse_empty, rendered

PAGE = "compare.html"
_SCORED = {"ensemble": "ensemble", "single": "best single trial", "baseline": "baseline"}

# keys of study.json that describe the search, in display order
_FACTS = ("preset", "seed", "fingerprint", "split_hash", "max_size", "weights", "warm_start")
NOTHING = "-"
Rows = dict[str, list[str]]  # name -> one cell per study


@dataclass(frozen=True)
class Side:
    """A study in the comparison, with its records and results."""

    name: str
    study: Study
    metadata: Mapping[str, Any]
    records: Sequence[TrialRecord]
    results: Mapping[str, Any] | None  # of its ensemble; None without one

    @property
    def quoted(self) -> Look | None:
        """The look at holdout that is quoted of its ensemble. None without one."""
        return quoted_look(self.study, "ensemble") if self.results else None

    @property
    def searched(self) -> list[TrialRecord]:
        return [r for r in self.records if r.stage == "search"]

    @property
    def best(self) -> TrialRecord | None:
        """Best trial on val over all its runs. None if no trial is complete."""
        found = standings_of(self.study)
        return found[0].record if found else next(iter(self.study.leaderboard()), None)


def write_comparison(studies: Sequence[Study], path: Path | None = None) -> Path:
    """Write the page to `path`, by default compare.html beside the first study. The write is atomic."""
    path = path or studies[0].folder.parent / PAGE
    write_atomic(path, render(studies))
    return path


def render(studies: Sequence[Study], refresh: int = 0) -> str:
    """The page as HTML.

    ValueError if a folder is not a study, has no trials, is given twice or was searched for another metric.
    """
    sides = opened(studies)
    metric = studies[0].metric
    settings, alike = differing([_settings(side) for side in sides])
    config, same_config = differing([_config(side.best) for side in sides])
    by_name = {side.name: side.searched for side in sides}
    scored_rows = _score_rows(sides)
    drawn = {
        "rivals": charts.rivals(by_name, metric),
        "spent": charts.spent({s.name: s.records for s in sides}),
    }
    if scored_rows:
        drawn["scores"] = charts.scores(scored_rows, metric)
    return rendered(
        "compare.html",
        title=f"{', '.join(side.name for side in sides)} · {metric}",
        refresh=refresh,
        sides=sides,
        metric=metric,
        colours=charts.COLOURS,
        headline=[_headline(side, metric) for side in sides],
        verdicts=[verdict(sides[0], other, metric) for other in sides[1:]],
        warning=holdout_warning(sides),
        outcomes=_outcomes(sides, metric),
        settings=settings,
        alike=alike,
        config=config,
        same_config=same_config,
        charts=drawn,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def opened(studies: Sequence[Study]) -> list[Side]:
    """The studies under their shortest distinct names. ValueError as in `render`."""
    metrics = [study.metric for study in studies]  # ValueError if a folder is not a study
    folders = [study.folder.resolve() for study in studies]
    for n, study in enumerate(studies):
        if folders[n] in folders[:n]:
            raise ValueError(f"{study.folder} is given twice: name each study once")
        if metrics[n] != metrics[0]:
            raise ValueError(
                f"{study.folder} was searched for {metrics[n]}, {studies[0].folder} for {metrics[0]}: "
                "compare studies of one metric"
            )
    for study in studies:
        refuse_empty(study)
    return [
        Side(
            name,
            study,
            study.metadata,
            study.records(),
            study.results() if study.ensemble_file.is_file() else None,
        )
        for name, study in zip(names(folders), studies, strict=True)
    ]


def names(folders: Sequence[Path]) -> list[str]:
    """The shortest path suffixes that are all distinct. Each has the same number of parts."""
    return next(
        found
        for parts in count(1)
        if len(set(found := ["/".join(folder.parts[-parts:]) for folder in folders])) == len(folders)
    )


def _headline(side: Side, metric: str) -> tuple[str, str, str]:
    """A study's score on val, its interval and a label."""
    if side.results:
        return score_text(metric, side.results["val"]["ensemble"]), "", f"{side.name}, ensemble on val"
    value = score_text(metric, side.best.value) if side.best else NOTHING
    return value, "", f"{side.name}, best on val so far"


def _score_rows(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """One row per score on holdout."""
    return [
        {"study": side.name, "what": words, **side.quoted.scores[name]}
        for side in sides
        if side.quoted
        for name, words in _SCORED.items()
        if name in side.quoted.scores
    ]


def holdout_warning(sides: Sequence[Side]) -> str:
    """Why not to choose a study by its score on holdout; "" unless several ensembles share a split."""
    shared: dict[str, list[Side]] = {}
    for side in sides:
        if side.results:
            shared.setdefault(side.metadata["split_hash"], []).append(side)
    return " ".join(
        f"{' and '.join(s.name for s in of)} share a holdout, which was looked at "
        f"{sum(looks(s.study)[-1].number for s in of)} times. Choosing among them by it makes it a "
        "validation set, and the score of the chosen one too good to quote: choose by val."
        for of in shared.values()
        if len(of) > 1
    )


def verdict(first: Side, other: Side, metric: str) -> str:
    """Text on which ensemble is better on val, by a paired interval if the studies share a split.

    Holdout names no winner: what is chosen by it has no score left to quote.
    """
    pair = f"{first.name} over {other.name}"
    if not (first.results and other.results):
        return f"{pair}: not both have an ensemble yet."
    if first.metadata["split_hash"] != other.metadata["split_hash"]:
        return f"{pair}: their images or splits differ, the scores are not of the same images."
    found = _gain(first.study, other.study, metric)
    if found is None:
        return f"{pair}: the probabilities on val are not both there, only the scores can be compared."
    value, ends = gain_text(metric, asdict(found))
    clear = found.low > 0 or found.high < 0
    better = first.name if found.value > 0 else other.name
    words = f"{better} is better on val" if clear else "neither is clearly better on val"
    images = len(first.study.labels("val"))
    return f"{pair}: {value} {gain_unit(metric)} ({ends}) on the same {images} images of val; {words}."


def _gain(first: Study, other: Study, metric: str) -> Interval | None:
    """Gain of one ensemble over another on their shared val. None if predictions are missing."""
    if not all(study.predictions_file("ensemble", "val").is_file() for study in (first, other)):
        return None
    mine, truth = first.probs_and_labels("ensemble", "val")
    ids = list(first.labels("val"))
    theirs = other.predictions("ensemble", "val").aligned(ids).probs
    return paired_gain(metric, mine, theirs, truth, groups=first.groups(ids))


def _outcomes(sides: Sequence[Side], metric: str) -> Rows:
    """Scores and cost of the studies. Rows without any value are left out."""
    found = [_holdout_rows(side, metric) | _other_rows(side, metric) for side in sides]
    rows = {name: [of[name] for of in found] for name in found[0]}
    return {name: cells for name, cells in rows.items() if set(cells) != {NOTHING}}


def _holdout_rows(side: Side, metric: str) -> dict[str, str]:
    """Scores at the first look at holdout, gain over the baseline, expected score on the hidden images."""
    holdout = side.quoted.scores if side.quoted else {}
    found = {
        f"{words} on holdout": interval_text(metric, holdout[name]) if name in holdout else NOTHING
        for name, words in _SCORED.items()
    }
    gain = gain_text(metric, holdout["gain_over_baseline"]) if "gain_over_baseline" in holdout else ()
    found[f"gain over the baseline, {gain_unit(metric)}"] = f"{gain[0]} ({gain[1]})" if gain else NOTHING
    hidden = side.quoted.hidden if side.quoted else None
    found["expected on the hidden images"] = interval_text(metric, hidden) if hidden else NOTHING
    return found


def _other_rows(side: Side, metric: str) -> dict[str, str]:
    """Scores on val, trials, time and hardware."""
    best = side.best
    ended = ", ".join(f"{n} {state}" for state, n in counts(side.records).items() if n)
    return {
        "ensemble on val": score_text(metric, side.results["val"]["ensemble"]) if side.results else NOTHING,
        "best trial on val": score_text(metric, best.value) if best else NOTHING,
        "trials": f"{len(side.records)}: {ended}",
        "time of the search": duration(max((r.at for r in side.searched), default=0.0)),
        "training, all trials together": duration(sum(r.seconds for r in side.records)),
        "hardware": side.metadata["hardware"]["device"],
        "begun": side.metadata["begun"],
    }


def _settings(side: Side) -> dict[str, str]:
    """Settings of a search, name -> text."""
    facts = side.metadata
    found = {name.replace("_", " "): _text(facts.get(name)) for name in _FACTS}
    space = facts.get("space") or {}
    dimensions = space.get("dimensions", {})
    found |= {f"space: {name}": _dimension(values) for name, values in dimensions.items()}
    found |= {f"fixed: {name}": _text(value) for name, value in space.get("fixed", {}).items()}
    found |= {f"hardware: {name}": _text(value) for name, value in facts["hardware"].items()}
    found |= {f"version: {name}": _text(value) for name, value in facts["versions"].items()}
    return {**found, "command": facts["command"]}


def _dimension(values: Mapping[str, Any]) -> str:
    """A dimension of study.json as text, for any version of the file."""
    if "options" in values:
        text = ", ".join(charts.short(option) for option in values["options"])
    else:
        text = f"{values.get('low')} to {values.get('high')}{' (log)' if values.get('log') else ''}"
    return f"{text}, where {values['when'][0]} is {_text(values['when'][1])}" if values.get("when") else text


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return charts.short(value) or NOTHING


def _config(record: TrialRecord | None) -> dict[str, str]:
    """A trial's hyperparameters, name -> text."""
    if record is None:
        return {}
    return {n.replace("_", " "): _text(v) for n, v in asdict(record.config).items()}


def differing(found: Sequence[Mapping[str, str]]) -> tuple[Rows, list[str]]:
    """One mapping per study -> rows that differ, and names of those that do not."""
    every = dict.fromkeys(name for of in found for name in of)
    rows = {name: [of.get(name, NOTHING) for of in found] for name in every}
    return {n: row for n, row in rows.items() if len(set(row)) > 1}, [
        n for n, row in rows.items() if len(set(row)) == 1
    ]

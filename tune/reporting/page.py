"""The report of a study: one self-contained HTML page, made from the study's files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import vl_convert

from carmodels.evaluation.intervals import accuracy_interval
from carmodels.evaluation.metrics import log_loss
from carmodels.evaluation.predictions import Predictions, blend
from carmodels.files import read_json, write_atomic
from carmodels.formatting import (
    duration,
    gain_text,
    gain_unit,
    interval_text,
    points_text,
    range_text,
    score_text,
    stops_sentence,
)
from carmodels.holdout import ANSWERS, looks, quoted_look, quoted_suffix
from carmodels.records import FOLD, FOLD_IN, State, TrialRecord
from carmodels.space import Space
from carmodels.study import Study
from tune.optim.standings import standings_json, standings_of, standings_sentence
from tune.reporting import charts
from tune.reporting.charts import Chart
from tune.reporting.mistakes import found_mistakes

MOST_ROWS = 1000  # of the table of trials; trials.csv has all
MOST_CLASSES = 30  # in the charts of confusion and recall: those with the lowest recall
BINS = 10  # of confidence, in the calibration chart


@dataclass(frozen=True)
class Section:
    """A chart of the page, with a text on how to read it."""

    name: str
    title: str
    words: str
    chart: Chart


def write_report(study: Study, path: Path | None = None) -> Path:
    """Write the page to `path`, by default report.html in the study's folder. The write is atomic.

    ValueError for a study without trials.
    """
    path = path or study.report_file
    write_atomic(path, render(study))
    return path


def render(study: Study, refresh: int = 0) -> str:
    """The page as HTML. It reloads every `refresh` seconds; 0: never."""
    facts, records = study.metadata, study.records()
    refuse_empty(study)
    results = study.results() if study.ensemble_file.is_file() else None
    space, metric = study.space, facts["metric"]
    rows, columns = table(study)
    standings = standings_of(study)
    chart_sections = sections(study, records, space, results)
    found_stops = read_json(study.stops_file) if study.stops_file.is_file() else None
    return rendered(
        "page.html",
        title=f"{study.folder.name} · {metric}",
        name=study.folder.name,
        folder=study.folder,
        refresh=refresh,
        facts=facts,
        results=results,
        headline=headline(study, results, metric),
        first=quoted_look(study, "ensemble") if results else None,
        which=quoted_suffix(study, "ensemble") if results else "",
        looks=[
            (look.number, look.title, ANSWERS[look.answer], look.scores[look.answer]) for look in looks(study)
        ],
        counts=counts(records),
        rows=rows,
        columns=columns,
        sections=chart_sections,
        charts={section.name: section.chart for section in chart_sections},
        standings=standings_json(standings),
        verdict=standings_sentence(standings) if standings else "",
        stops=found_stops,
        stops_verdict=stops_sentence(found_stops) if found_stops else "",
        mistakes=found_mistakes(study) if results else None,
        thumbnails=read_json(study.thumbnails_file) if study.thumbnails_file.is_file() else {},
        failures=failures(records),
        excluded=facts["excluded"],
        written=time.strftime("%Y-%m-%d %H:%M"),
        score=lambda value: score_text(metric, value),
        interval=lambda found: interval_text(metric, found),
        points=lambda value: points_text(metric, value),
        unit=gain_unit(metric),
    )


def refuse_empty(study: Study) -> None:
    """ValueError for a study without trials."""
    if not study.records():
        raise ValueError(study.damage or f"{study.folder} has no trials yet: there is nothing to report")


def rendered(template: str, **values: Any) -> str:
    """A rendered template. Scripts in the page draw the `charts`."""
    return _templates().get_template(template).render(library=_library(), json=_json, **values)


@cache
def _templates() -> jinja2.Environment:
    here = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    return jinja2.Environment(loader=here, autoescape=True, undefined=jinja2.StrictUndefined)


@cache
def _library() -> str:
    """JavaScript of Vega, Vega-Lite and vega-embed, to embed in the page."""
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # wrongly annotated
    return bundle.replace("</script", "<\\/script")


def _json(value: Any) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def counts(records: Sequence[TrialRecord]) -> dict[str, int]:
    """Number of trials in each state."""
    return {str(s): sum(r.state is s for r in records) for s in State}


def failures(records: Sequence[TrialRecord]) -> list[tuple[str, list[TrialRecord]]]:
    """Trials that failed or diverged, by reason, most frequent first."""
    found: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.state is State.FAILED:
            found.setdefault(record.reason, []).append(record)
    return sorted(found.items(), key=lambda pair: -len(pair[1]))


def headline(study: Study, results: Mapping[str, Any] | None, metric: str) -> list[tuple[str, str, str]]:
    """(figure, interval, label), most important first, cost last."""
    board, records = study.leaderboard(), study.records()
    seconds = sum(r.seconds for r in records)
    cost = (duration(seconds), "", f"of training in {len(records)} trials")
    if results is None:
        best = (
            [(score_text(metric, board[0].value), "", f"{metric} on val, best trial so far")] if board else []
        )
        return [*best, cost]
    first = quoted_look(study, "ensemble")
    holdout = first.scores

    def scored(found: Mapping[str, float], words: str) -> tuple[str, str, str]:
        return score_text(metric, found["value"]), range_text(metric, found), words

    found = [scored(holdout["ensemble"], f"{metric} of the ensemble on holdout")]
    if "gain_over_baseline" in holdout:
        found.append(
            (
                *gain_text(metric, holdout["gain_over_baseline"]),
                f"{gain_unit(metric)} better than the baseline, on holdout",
            )
        )
    if hidden := first.hidden:
        found.append(scored(hidden, f"{metric} expected on the {hidden['images']} hidden images"))
    return [*found, scored(holdout["single"], "best single trial, on holdout"), cost]


def table(study: Study) -> tuple[list[dict[str, str]], list[str]]:
    """Rows of trials.csv, and the columns to show: the main ones and those whose values differ."""
    rows = [{name: charts.short(v) for name, v in row.items()} for row in study.table()[:MOST_ROWS]]
    always: tuple[str, ...] = (
        "rank",
        "trial_id",
        "stage",
        "state",
        "value",
        "epochs_run",
        "seconds",
        "reason",
        "note",
    )
    always += ("microbatches",) if any(row["microbatches"] != "1" for row in rows) else ()
    columns = [c for c in rows[0] if c in always or len({row[c] for row in rows}) > 1]
    hidden = ("val_accuracy", "parameters_millions", "seed") if study.metric == "accuracy" else ()
    return rows, [c for c in columns if c not in hidden]


def sections(
    study: Study, records: Sequence[TrialRecord], space: Space | None, results: Mapping[str, Any] | None
) -> list[Section]:
    """The charts that there is data for."""
    metric = study.metric
    found = []
    on_val = [r for r in records if r.stage not in (FOLD, FOLD_IN)]
    if any(r.curve for r in on_val):
        found.append(
            Section(
                "curves",
                "Learning curves",
                "Each line is a trial, a cross is where it was cut off. A group that is cut while it still "
                "climbs steeply was judged too early.",
                charts.curves(on_val, metric),
            )
        )
    searched = [r for r in records if r.stage == "search"]
    complete = [r for r in searched if r.state is State.COMPLETE and r.value is not None]
    if complete:
        found += [
            Section(
                "progress",
                "Best so far",
                "How fast the search got there. The dashed line is the baseline, which the search was given.",
                charts.progress(searched, metric),
            ),
            Section(
                "cost",
                "Accuracy against cost",
                "Finished trials; the dashed line joins those that nothing beats in both.",
                charts.cost(complete, metric),
            ),
        ]
    if complete and space is not None:
        found.append(
            Section(
                "parallel",
                "Hyperparameters",
                "Every trial as a line through its settings, coloured by what it came to.",
                charts.parallel(searched, space, metric),
            )
        )
    return found + answers(study, results)


def answers(study: Study, results: Mapping[str, Any] | None) -> list[Section]:
    """Charts of the ensemble on holdout: by class, and calibration. Empty without an ensemble."""
    path = study.predictions_file("ensemble", "holdout")
    if results is None or not path.is_file():
        return []
    names = study.metadata["class_names"]
    labels = study.labels("holdout")
    holdout = study.predictions("ensemble", "holdout").aligned(list(labels))
    truth = np.array(list(labels.values()))
    groups = study.groups(labels)
    by_stage = {"with temperatures": holdout.probs}
    if (untempered := _as_trained(study, results)) is not None:
        by_stage = {"as trained": untempered.aligned(list(labels)).probs} | by_stage
    bins = [{"when": w, **row} for w, probs in by_stage.items() for row in reliability(probs, truth)]
    losses = ", ".join(f"{log_loss(probs, truth):.3f} {when}" for when, probs in by_stage.items())
    return [
        *by_class(holdout.probs, truth, names, groups),
        Section(
            "calibration",
            "Calibration",
            "Of answers given with so much confidence, the share that is right, on holdout; large dots: many "
            "images. Each member has a temperature and the ensemble another one, fitted on val. Log loss: "
            f"{losses}.",
            charts.calibration(bins),
        ),
    ]


def _as_trained(study: Study, results: Mapping[str, Any]) -> Predictions | None:
    """The ensemble on holdout without any temperature. None if a member's predictions are missing."""
    members, views = results["members"], results["tta"]["views"]
    if not all(study.has_predictions(m["trial_id"], "holdout", view) for m in members for view in views):
        return None
    means = [blend([study.predictions(m["trial_id"], "holdout", view) for view in views]) for m in members]
    return blend(means, [m["weight"] for m in members])


def by_class(probs: np.ndarray, truth: np.ndarray, names: Sequence[str], groups: np.ndarray) -> list[Section]:
    """probs (N, C), truth (N,), groups (N,) -> confusion and recall, of many classes the lowest recalls."""
    confused = np.zeros((len(names), len(names)), int)
    np.add.at(confused, (truth, probs.argmax(1)), 1)
    recalls = recall(probs, truth, names, groups)
    worst = " and ".join(f"{row['name']} ({row['recall']:.0%})" for row in recalls[:2])
    shown, some = list(range(len(names))), ""
    if len(names) > MOST_CLASSES:
        recalls = recalls[:MOST_CLASSES]
        shown = sorted(row["column"] for row in recalls)
        some = f" Of {len(names)} classes the {MOST_CLASSES} that are least often recognised."
    return [
        Section(
            "confusion",
            "Confusion",
            f"The ensemble on holdout: a row a class as it is, a column as it was answered.{some}",
            charts.confusion(confused, names, shown),
        ),
        Section(
            "recall",
            "Recall by class",
            f"Of a class's images in holdout, the share that is answered rightly, with its 95 % interval. "
            f"Least often recognised: {worst}.{some}",
            charts.recall(recalls),
        ),
    ]


def recall(
    probs: np.ndarray, truth: np.ndarray, names: Sequence[str], groups: np.ndarray
) -> list[dict[str, Any]]:
    """probs (N, C), truth (N,), groups (N,) -> recall per class, with Wilson's 95 % interval.

    Lowest recall first. Classes without images are left out.
    """
    found = []
    for k in np.unique(truth).tolist():
        rows = truth == k
        share = accuracy_interval(probs[rows], truth[rows], groups=groups[rows])
        found.append({"column": k, "name": names[k], "recall": share.value, "images": int(rows.sum())})
        found[-1] |= {"low": share.low, "high": share.high}
    return sorted(found, key=lambda row: (row["recall"], -row["images"]))


def reliability(probs: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """probs (N, C), labels (N,) -> mean confidence and accuracy in each bin of confidence."""
    confidence, right = probs.max(1), probs.argmax(1) == labels
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidence[places == k].mean()),
            "right": float(right[places == k].mean()),
            "images": int((places == k).sum()),
        }
        for k in range(BINS)
        if (places == k).any()
    ]

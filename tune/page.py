"""The report of a study: one self-contained HTML page, from what the study left on disk."""

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

from carmodels.files import write_whole
from carmodels.predictions import with_temperature
from carmodels.space import Space
from carmodels.study import FOLD, FOLD_IN, Status, Study, TrialRecord, read_json
from tune import charts, stops
from tune.charts import Chart
from tune.confirm import described, judged, sentence
from tune.dimensions import CAVEAT, UNKNOWN, edges, importances, space_of

MOST_ROWS = 1000  # of the table of trials; the CSV has them all
BINS = 10  # of confidence, in the picture of calibration


@dataclass(frozen=True)
class Section:
    """A part of the page: a picture, with what to look for in it."""

    name: str
    title: str
    words: str
    chart: Chart


def write_report(study: Study) -> Path:
    """Write report.html into the study's folder, whole or not at all; ValueError without a trial."""
    write_whole(study.report_file, render(study))
    return study.report_file


def render(study: Study, refresh: int = 0) -> str:
    """The page of a study, as HTML; one that loads itself anew every `refresh` seconds, if that is not 0."""
    facts, records = study.facts, study.records()
    if not records:
        raise ValueError(f"{study.folder} has no trials yet: there is nothing to report")
    results = read_json(study.ensemble_file) if study.ensemble_file.is_file() else None
    space, metric = space_of(facts), facts["metric"]
    rows, columns = table(study)
    standings = judged(study)
    mattered = importances(records, space, metric) if space is not None else None
    pictures = sections(study, records, space, results)
    drawn = {section.name: section.chart for section in pictures}
    if mattered and mattered.dimensions:
        drawn["importance"] = charts.importance(mattered.dimensions)
    found_stops = read_json(study.stops_file) if study.stops_file.is_file() else None
    return _template().render(
        name=study.folder.name,
        refresh=refresh,
        facts=facts,
        metric=metric,
        results=results,
        headline=headline(study, results, metric),
        counts={str(s): sum(r.status is s for r in records) for s in Status},
        hours=sum(r.seconds for r in records) / 3600,
        rows=rows,
        columns=columns,
        sections=pictures,
        charts=drawn,
        importances=mattered,
        caveat=CAVEAT,
        unknown=UNKNOWN,
        edges=edges(records, space, metric) if space is not None else (),
        standings=described(standings),
        verdict=sentence(standings) if standings else "",
        stops=found_stops,
        stops_verdict=stops.sentence(found_stops) if found_stops else "",
        failures=[r for r in records if r.status in (Status.FAILED, Status.DIVERGED)],
        excluded=facts["excluded"],
        library=_library(),
        written=time.strftime("%Y-%m-%d %H:%M"),
        score=lambda value: score_text(metric, value),
        interval=lambda found: interval_text(metric, found),
        points=lambda value: _points(metric, value),
        json=_json,
    )


@cache
def _template() -> jinja2.Template:
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=here, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("page.html")


@cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed, to be put into the page."""
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its annotations want a snippet
    return bundle.replace("</script", "<\\/script")


def _json(value: Any) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def score_text(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if metric == "log_loss" else f"{100 * value:.1f} %"


def _points(metric: str, value: float) -> str:
    """A difference between two scores, with its sign."""
    return f"{value:+.4f}" if metric == "log_loss" else f"{100 * value:+.1f}"


def interval_text(metric: str, found: Mapping[str, float]) -> str:
    low, high = (score_text(metric, found[end]).removesuffix(" %") for end in ("low", "high"))
    return f"{score_text(metric, found['value'])} ({low} to {high})"


def headline(study: Study, results: Mapping[str, Any] | None, metric: str) -> list[tuple[str, str]]:
    """Figures with what they are, the most wanted first."""
    board = study.leaderboard()
    if results is None:
        best = [(score_text(metric, board[0].value), f"{metric} on val, best trial so far")] if board else []
        return [*best, (str(len(study.records())), "trials")]
    audit = results["audit"]
    found = [(interval_text(metric, audit["ensemble"]), f"{metric} of the ensemble on audit, 95 %")]
    if "hidden" in results:
        hidden = results["hidden"]
        words = f"{metric} expected on the {hidden['pictures']} hidden pictures, in 95 of 100"
        found.append((interval_text(metric, hidden), words))
    if "gain_over_recipe" in audit:
        gain = audit["gain_over_recipe"]
        unit = 1 if metric == "log_loss" else 100
        text = f"{unit * gain['value']:+.1f} ({unit * gain['low']:+.1f} to {unit * gain['high']:+.1f})"
        found.append((text, "points over the competitor's recipe"))
    found.append((interval_text(metric, audit["single"]), "best single trial on audit"))
    return found


def table(study: Study) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of trials.csv and the columns that differ between them, in the order of the file."""
    rows = [{name: charts.short(v) for name, v in row.items()} for row in study.table()[:MOST_ROWS]]
    always = ("rank", "trial_id", "stage", "status", "value", "epochs_run", "seconds", "reason", "note")
    columns = [c for c in rows[0] if c in always or len({row[c] for row in rows}) > 1]
    hidden = ("val_accuracy", "parameters_millions", "seed") if study.metric == "accuracy" else ()
    return rows, [c for c in columns if c not in hidden]


def sections(
    study: Study, records: Sequence[TrialRecord], space: Space | None, results: Mapping[str, Any] | None
) -> list[Section]:
    """The pictures that there is something to draw for."""
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
    finished = [r for r in searched if r.status is Status.FINISHED and r.value is not None]
    if finished:
        found += [
            Section(
                "progress",
                "Best so far",
                "How fast the search got there, beside the same finished trials in random order: the gap is "
                "what choosing the order has gained.",
                charts.progress(searched, metric),
            ),
            Section(
                "cost",
                "Accuracy against cost",
                "Finished trials; the dashed line joins those that nothing beats in both.",
                charts.cost(finished, metric),
            ),
        ]
    if finished and space is not None:
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
    """How the ensemble does, class by class and by confidence; nothing before there is one."""
    path = study.predictions_file("ensemble", "audit")
    if results is None or not path.is_file():
        return []
    facts = study.facts
    names = facts["class_names"]
    labels = study.labels("audit")
    audit = study.predictions("ensemble", "audit").aligned(list(labels))
    truth = np.array(list(labels.values()))
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (truth, audit.probs.argmax(1)), 1)
    before = with_temperature(audit, 1 / results["temperature"])
    bins = [
        {"when": when, **row}
        for when, probs in (("before the temperature", before.probs), ("after", audit.probs))
        for row in reliability(probs, truth)
    ]
    recalls = counts.diagonal() / np.maximum(counts.sum(1), 1)
    worst = [names[k] for k in np.argsort(recalls)[:2]]
    return [
        Section(
            "confusion",
            "Confusion",
            f"The ensemble on audit: rows are the truth. Least often recognised: {' and '.join(worst)} "
            f"({' and '.join(f'{recalls[names.index(n)]:.0%}' for n in worst)}).",
            charts.confusion(counts, names),
        ),
        Section(
            "calibration",
            "Calibration",
            f"Of answers given with so much confidence, the share that is right, on audit; temperature "
            f"{results['temperature']:.2f}, fitted on val.",
            charts.calibration(bins),
        ),
    ]


def reliability(probs: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """probs (N, C), labels (N,) -> mean confidence and share of right answers in bins of confidence."""
    confidence, right = probs.max(1), probs.argmax(1) == labels
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidence[places == k].mean()),
            "right": float(right[places == k].mean()),
            "pictures": int((places == k).sum()),
        }
        for k in range(BINS)
        if (places == k).any()
    ]

"""Charts of the report, as Vega-Lite specifications. No function reads a file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from carmodels.evaluation.metrics import METRICS
from carmodels.records import State, TrialRecord
from carmodels.space import Choice, Space
from carmodels.training.config import EpochMetrics

Chart = dict[str, Any]  # a Vega-Lite specification
MOST_CURVES = 150  # in one chart; complete trials first, then an even sample of the others
HEIGHT = 300  # pixels
_LABEL_OFFSET = 0.05  # share of an axis, from its ends to their labels

# Okabe and Ito (2008): safe for colour-blind readers, on light and dark backgrounds
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933"]


def _spec(chart: alt.TopLevelMixin) -> Chart:
    with alt.data_transformers.disable_max_rows():  # the default maximum is 5,000
        return chart.to_dict(validate=False)


def _colour(field: str, title: str, order: Sequence[str] = ()) -> alt.Color:
    scale = alt.Scale(domain=list(order), range=COLOURS) if order else alt.Scale(range=COLOURS)
    return alt.Color(field, title=title, scale=scale, legend=alt.Legend(orient="top"))


def curves(records: Sequence[TrialRecord], metric: str) -> Chart:
    """Learning curves by unfreeze strategy. A cross marks a trial that was pruned or out of time."""
    shown = thinned(records, MOST_CURVES)
    rows = [_point(r, e) for r in shown for e in r.curve]
    ends = [_point(r, r.curve[-1]) for r in shown if r.state in (State.PRUNED, State.OUT_OF_TIME) and r.curve]
    hover = ["title:N", "strategy:N", "epoch:Q", alt.Tooltip("value:Q", format=".4f"), "reason:N"]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("epoch:Q", axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("value:Q", title=f"{metric} on val", scale=alt.Scale(zero=False)),
        color=_colour("strategy:N", "strategy"),
    )
    lines = base.mark_line(opacity=0.6, strokeWidth=1.5).encode(detail="trial:N")
    dots = base.mark_circle(size=22, opacity=0.6).encode(tooltip=hover)
    layers = [lines, dots]
    if ends:
        layers.append(
            alt.Chart(pd.DataFrame(ends))
            .mark_point(shape="cross", size=70, angle=45, filled=True)
            .encode(x="epoch:Q", y="value:Q", color="strategy:N", tooltip=hover)
        )
    return _spec(alt.layer(*layers).properties(width="container", height=HEIGHT))


def _point(record: TrialRecord, epoch: EpochMetrics) -> dict[str, Any]:
    return {
        "trial": record.trial_id,
        "title": record.config.title,
        "strategy": record.config.unfreeze,
        "epoch": epoch.epoch,
        "value": epoch.value,
        "reason": record.reason,
    }


def thinned(records: Sequence[TrialRecord], most: int) -> list[TrialRecord]:
    """At most `most` records: complete trials first, then an even sample of the others."""
    complete = [r for r in records if r.state is State.COMPLETE]
    others = [r for r in records if r.state is not State.COMPLETE]
    for group in (complete, others):
        room = max(0, most - (len(complete) if group is others else 0))
        if len(group) > room:
            group[:] = [group[int(k)] for k in np.linspace(0, len(group) - 1, room)]
    return complete + others


def best_so_far(records: Sequence[TrialRecord], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The search's own complete trials: minutes since its start, (N,), and the best value up to each, (N,).

    Without the baseline, which the search did not find.
    """
    done = [(r.at / 60, r.value) for r in records if _complete(r) and not r.baseline]
    minutes, values = np.array(done, dtype=float).reshape(-1, 2).T
    best = np.maximum if METRICS[metric].mode == "max" else np.minimum
    return minutes, best.accumulate(values)


def _complete(record: TrialRecord) -> bool:
    return record.state is State.COMPLETE and record.value is not None


def progress(records: Sequence[TrialRecord], metric: str) -> Chart:
    """Best value so far over time, and a rule at the baseline's value."""
    minutes, best = best_so_far(records, metric)
    rows = [{"minutes": m, "value": v} for m, v in zip(minutes.tolist(), best.tolist(), strict=True)]
    y = alt.Y("value:Q", title=f"best {metric} on val so far", scale=alt.Scale(zero=False))
    hover = alt.Tooltip("value:Q", format=".4f")
    layers: list[alt.Chart] = []
    if rows:
        layers.append(
            alt.Chart(pd.DataFrame(rows))
            .mark_line(interpolate="step-after", point=True, color=COLOURS[0])
            .encode(
                x=alt.X("minutes:Q", title="minutes since the start"),
                y=y,
                tooltip=[alt.Tooltip("minutes:Q", format=".1f"), hover],
            )
        )
    if baseline := [{"value": r.value} for r in records if _complete(r) and r.baseline]:
        rule = alt.Chart(pd.DataFrame(baseline)).mark_rule(color="gray", strokeDash=[4, 3])
        layers.append(rule.encode(y=y, tooltip=[hover]))
    return _spec(alt.layer(*layers).properties(width="container", height=HEIGHT))


def cost(records: Sequence[TrialRecord], metric: str) -> Chart:
    """Value against training seconds of complete trials, with the Pareto front."""
    complete = [r for r in records if r.state is State.COMPLETE and r.value is not None]
    front = {r.trial_id for r in pareto(complete, metric)}
    rows = [
        {
            "title": r.config.title,
            "backbone": r.config.backbone,
            "seconds": r.seconds,
            "value": r.value,
            "front": r.trial_id in front,
        }
        for r in complete
    ]
    x = alt.X("seconds:Q", title="seconds of training", scale=alt.Scale(type="log"))
    y = alt.Y("value:Q", title=f"{metric} on val", scale=alt.Scale(zero=False))
    base = alt.Chart(pd.DataFrame(rows))
    line = (
        base.transform_filter("datum.front")
        .mark_line(color="gray", strokeDash=[4, 3])
        .encode(x=x, y=y, order="seconds:Q")
    )
    dots = base.mark_circle(size=80).encode(
        x=x,
        y=y,
        color=_colour("backbone:N", "backbone"),
        tooltip=["title:N", alt.Tooltip("seconds:Q", format=".0f"), alt.Tooltip("value:Q", format=".4f")],
    )
    return _spec((line + dots).properties(width="container", height=HEIGHT))


def pareto(records: Sequence[TrialRecord], metric: str) -> list[TrialRecord]:
    """Pareto front of training seconds and value, fastest first."""
    sign = 1 if METRICS[metric].mode == "max" else -1
    front: list[TrialRecord] = []
    best = -np.inf
    for record in sorted(records, key=lambda r: (r.seconds, -sign * (r.value or 0.0))):
        if record.value is not None and sign * record.value > best:
            best = sign * record.value
            front.append(record)
    return front


def parallel(records: Sequence[TrialRecord], space: Space, metric: str) -> Chart:
    """Parallel coordinates of the hyperparameters, a line per trial, coloured by value."""
    shown = [r for r in thinned(records, MOST_CURVES) if r.value is not None]
    names = list(space.dimensions)
    rows = []
    for r in shown:
        values = {name: getattr(r.config, name) for name in names}
        active = space.active_dimensions(vars(r.config))
        for name in names:
            if name in active:
                rows.append(
                    {
                        "trial": r.trial_id,
                        "title": r.config.title,
                        "dimension": name,
                        "place": place(space, name, values[name]),
                        "setting": short(values[name]),
                        "value": r.value,
                    }
                )
    reverse = METRICS[metric].mode == "min"
    x = alt.X("dimension:N", sort=names, title=None, axis=alt.Axis(labelAngle=-30))
    y = alt.Y("place:Q", axis=None, scale=alt.Scale(domain=[-0.09, 1.09]))
    ends = (
        alt.Chart(pd.DataFrame([end for name in names for end in _ends(space, name)]))
        .mark_text(fontSize=10, color="currentColor", limit=alt.ExprRef(f"width / {len(names)} - 4"))
        .encode(x=x, y=y, text="setting:N")
    )
    lines = (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(point=alt.OverlayMarkDef(size=30), strokeWidth=1.5, opacity=0.7)
        .encode(
            x=x,
            y=y,
            detail="trial:N",
            color=alt.Color(
                "value:Q",
                title=metric,
                scale=alt.Scale(scheme="viridis", reverse=reverse),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=["title:N", "dimension:N", "setting:N", alt.Tooltip("value:Q", format=".4f")],
        )
    )
    return _spec((lines + ends).properties(width="container", height=HEIGHT))


def _ends(space: Space, name: str) -> list[dict[str, Any]]:
    """Labels for the ends of a dimension's axis, placed just outside it."""
    dimension = space.dimensions[name]
    if isinstance(dimension, Choice):
        settings = dict.fromkeys((dimension.options[0], dimension.options[-1]))
    else:
        settings = dict.fromkeys((dimension.low, dimension.high))
    places = (-_LABEL_OFFSET, 1 + _LABEL_OFFSET)
    return [
        {"dimension": name, "place": at, "setting": short(value)}
        for at, value in zip(places, settings, strict=False)
    ]


def place(space: Space, name: str, value: Any) -> float:
    """Position on a dimension's axis, 0 to 1. An unknown option is at 0.5."""
    dimension = space.dimensions[name]
    if isinstance(dimension, Choice):
        options = dimension.options
        return options.index(value) / max(1, len(options) - 1) if value in options else 0.5
    if dimension.log:
        return float(np.log(value / dimension.low) / np.log(dimension.high / dimension.low))
    return (value - dimension.low) / (dimension.high - dimension.low)


def short(value: Any) -> str:
    """A setting as short text. None is empty."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def confusion(counts: np.ndarray, names: Sequence[str], shown: Sequence[int]) -> Chart:
    """counts (C, C), rows are true classes -> confusion matrix of the classes in `shown`."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # of all answers, shown or not
    rows = [
        {
            "truth": names[i],
            "answer": names[j],
            "images": int(counts[i, j]),
            "share": float(shares[i, j]),
        }
        for i, j in itertools.product(shown, shown)
        if counts[i, j]
    ]
    names = [names[k] for k in shown]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("answer:N", scale=alt.Scale(domain=list(names)), axis=alt.Axis(labelAngle=-40)),
        y=alt.Y("truth:N", scale=alt.Scale(domain=list(names))),
        tooltip=["truth:N", "answer:N", "images:Q", alt.Tooltip("share:Q", format=".1%")],
    )
    # opacity shows the share, so the chart suits light and dark backgrounds
    strength = alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.12, 1]), legend=None)
    cells = base.mark_rect(color=COLOURS[0]).encode(opacity=strength)
    text = base.mark_text(fontSize=11).encode(
        text="images:Q",
        color=alt.condition("datum.share > 0.5", alt.value("white"), alt.value("currentColor")),
    )
    side = max(HEIGHT, 24 * len(names))
    return _spec((cells + text).properties(width="container", height=side))


def recall(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Recall of each class, with its interval."""
    base = alt.Chart(pd.DataFrame(rows)).encode(
        y=alt.Y("name:N", sort=[row["name"] for row in rows], title=None),
        tooltip=[
            alt.Tooltip("name:N", title="class"),
            alt.Tooltip("recall:Q", format=".1%"),
            alt.Tooltip("low:Q", format=".1%"),
            alt.Tooltip("high:Q", format=".1%"),
            "images:Q",
        ],
    )
    x = alt.X("low:Q", title="recall", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"))
    lines = base.mark_rule(color=COLOURS[0], strokeWidth=2, opacity=0.6).encode(x=x, x2="high:Q")
    dots = base.mark_circle(color=COLOURS[0], size=80, opacity=1).encode(x="recall:Q")
    return _spec((lines + dots).properties(width="container", height=max(60, 26 * len(rows))))


def calibration(bins: Sequence[Mapping[str, Any]]) -> Chart:
    """Reliability diagram: accuracy against confidence, as trained and after temperature scaling."""
    base = alt.Chart(pd.DataFrame(bins))
    ideal = (
        alt.Chart(pd.DataFrame({"confidence": [0, 1], "right": [0, 1]}))
        .mark_line(color="gray", strokeDash=[4, 3])
        .encode(x="confidence:Q", y="right:Q")
    )
    found = base.encode(
        x=alt.X("confidence:Q", scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("right:Q", title="share that is right", scale=alt.Scale(domain=[0, 1])),
        color=_colour("when:N", "", list(dict.fromkeys(row["when"] for row in bins))),
        tooltip=[
            "when:N",
            "images:Q",
            alt.Tooltip("confidence:Q", format=".2f"),
            alt.Tooltip("right:Q", format=".2f"),
        ],
    )
    size = alt.Size("images:Q", scale=alt.Scale(range=[15, 250]), legend=None)  # small bins are noisy
    lines, dots = found.mark_line(opacity=0.5), found.mark_circle(opacity=1).encode(size=size)
    return _spec((ideal + lines + dots).properties(width="container", height=HEIGHT))


def rivals(studies: Mapping[str, Sequence[TrialRecord]], metric: str) -> Chart:
    """Best value so far over time, a line per study, extended to the end of its search."""
    rows = []
    for name, records in studies.items():
        minutes, best = best_so_far(records, metric)
        points = list(zip(minutes.tolist(), best.tolist(), strict=True))
        if points:
            points.append((max(r.at for r in records) / 60, points[-1][1]))
        rows += [{"study": name, "minutes": m, "value": v} for m, v in points]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(interpolate="step-after", point=alt.OverlayMarkDef(size=25), strokeWidth=2)
        .encode(
            x=alt.X("minutes:Q", title="minutes of searching"),
            y=alt.Y("value:Q", title=f"best {metric} on val so far", scale=alt.Scale(zero=False)),
            color=_colour("study:N", "", list(studies)),
            tooltip=[
                "study:N",
                alt.Tooltip("minutes:Q", format=".1f"),
                alt.Tooltip("value:Q", format=".4f"),
            ],
        )
    )
    return _spec(chart.properties(width="container", height=HEIGHT))


def scores(rows: Sequence[Mapping[str, Any]], metric: str) -> Chart:
    """Holdout scores with intervals of each study's ensemble, best single trial and baseline."""
    names = list(dict.fromkeys(row["study"] for row in rows))
    what = list(dict.fromkeys(row["what"] for row in rows))
    base = alt.Chart(pd.DataFrame(rows)).encode(
        y=alt.Y("what:N", sort=what, title=None),
        yOffset=alt.YOffset("study:N", sort=names),
        color=_colour("study:N", "", names),
        tooltip=[
            "study:N",
            "what:N",
            *(alt.Tooltip(f"{v}:Q", format=".4f") for v in ("value", "low", "high")),
        ],
    )
    x = alt.X("low:Q", title=f"{metric} on holdout, 95 % interval", scale=alt.Scale(zero=False))
    lines = base.mark_rule(strokeWidth=2, opacity=0.6).encode(x=x, x2="high:Q")
    dots = base.mark_circle(size=90, opacity=1).encode(x="value:Q")
    return _spec((lines + dots).properties(width="container", height=30 + 24 * len(rows)))


def spent(studies: Mapping[str, Sequence[TrialRecord]]) -> Chart:
    """Minutes of training of each study, by trial state."""
    rows = [
        {
            "study": name,
            "state": str(state),
            "minutes": sum(r.seconds for r in records if r.state is state) / 60,
            "trials": sum(r.state is state for r in records),
        }
        for name, records in studies.items()
        for state in State
        if any(r.state is state for r in records)
    ]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar()
        .encode(
            x=alt.X("minutes:Q", title="minutes of training"),
            y=alt.Y("study:N", sort=list(studies), title=None, axis=alt.Axis(labelLimit=140)),
            color=_colour("state:N", "", [str(s) for s in State if any(r["state"] == s for r in rows)]),
            tooltip=["study:N", "state:N", "trials:Q", alt.Tooltip("minutes:Q", format=".1f")],
        )
    )
    return _spec(chart.properties(width="container", height=30 + 40 * len(studies)))

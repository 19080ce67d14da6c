"""The report's pictures of a study, as Vega-Lite specifications; none of them reads a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from carmodels.predictions import METRICS
from carmodels.space import Choice, EpochMetrics, Space
from carmodels.study import Status, TrialRecord
from tune.dimensions import Importance

Chart = dict[str, Any]  # a Vega-Lite specification

MOST_CURVES = 150  # in one picture; of more, the finished ones and an even choice of the others
HEIGHT = 300  # pixels
_ORDERS = 200  # random orders behind the picture of what chance would have found
# Okabe and Ito (2008): told apart with any kind of colour vision, on light and on dark
_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933"]


def _spec(chart: alt.TopLevelMixin) -> Chart:
    return chart.to_dict(validate=False)


def _colour(field: str, title: str) -> alt.Color:
    return alt.Color(field, title=title, scale=alt.Scale(range=_COLOURS), legend=alt.Legend(orient="top"))


def curves(records: Sequence[TrialRecord], metric: str) -> Chart:
    """Learning curves by strategy; a cross where the scheduler or the clock cut one off."""
    shown = thinned(records, MOST_CURVES)
    rows = [_point(r, e) for r in shown for e in r.curve]
    ends = [_point(r, r.curve[-1]) for r in shown if r.status is Status.STOPPED and r.curve]
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
    """At most so many: the finished ones first, then an even choice of the others."""
    finished = [r for r in records if r.status is Status.FINISHED]
    others = [r for r in records if r.status is not Status.FINISHED]
    for group in (finished, others):
        room = max(0, most - (len(finished) if group is others else 0))
        if len(group) > room:
            group[:] = [group[int(k)] for k in np.linspace(0, len(group) - 1, room)]
    return finished + others


def progress(records: Sequence[TrialRecord], metric: str) -> Chart:
    """Best value so far over time, and what the same trials in random order would have had by then."""
    sign = 1 if METRICS[metric].mode == "max" else -1
    done = sorted((r for r in records if r.value is not None), key=lambda r: r.at)
    finished = [(r.at, sign * r.value) for r in done if r.value is not None and r.status is Status.FINISHED]
    minutes = [at / 60 for at, _ in finished]
    best = np.maximum.accumulate([value for _, value in finished])
    rows = [
        {"minutes": m, "value": sign * v, "order": "as searched"} for m, v in zip(minutes, best, strict=True)
    ]
    rng, values = np.random.default_rng(0), np.array([value for _, value in finished])
    orders = np.array([np.maximum.accumulate(rng.permutation(values)) for _ in range(_ORDERS)])
    rows += [
        {"minutes": m, "value": sign * v, "order": "same trials in random order, mean"}
        for m, v in zip(minutes, orders.mean(0), strict=True)
    ]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(interpolate="step-after", point=True)
        .encode(
            x=alt.X("minutes:Q", title="minutes since the start"),
            y=alt.Y("value:Q", title=f"best {metric} on val so far", scale=alt.Scale(zero=False)),
            color=_colour("order:N", ""),
            tooltip=[alt.Tooltip("minutes:Q", format=".1f"), alt.Tooltip("value:Q", format=".4f")],
        )
    )
    return _spec(chart.properties(width="container", height=HEIGHT))


def cost(records: Sequence[TrialRecord], metric: str) -> Chart:
    """Value against seconds of every finished trial, with the Pareto front."""
    finished = [r for r in records if r.status is Status.FINISHED and r.value is not None]
    front = {r.trial_id for r in pareto(finished, metric)}
    rows = [
        {
            "title": r.config.title,
            "backbone": r.config.backbone,
            "seconds": r.seconds,
            "value": r.value,
            "front": r.trial_id in front,
        }
        for r in finished
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
    """Those that no other is both faster and better than, fastest first."""
    sign = 1 if METRICS[metric].mode == "max" else -1
    front: list[TrialRecord] = []
    best = -np.inf
    for record in sorted(records, key=lambda r: (r.seconds, -sign * (r.value or 0.0))):
        if record.value is not None and sign * record.value > best:
            best = sign * record.value
            front.append(record)
    return front


def parallel(records: Sequence[TrialRecord], space: Space, metric: str) -> Chart:
    """Every trial as a line through its hyperparameters, the better the darker."""
    shown = [r for r in thinned(records, MOST_CURVES) if r.value is not None]
    names = list(space.dimensions)
    rows = []
    for r in shown:
        values = {name: getattr(r.config, name) for name in names}
        active = space.drawn(values)
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
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(point=alt.OverlayMarkDef(size=30), strokeWidth=1.5, opacity=0.7)
        .encode(
            x=alt.X("dimension:N", sort=names, title=None, axis=alt.Axis(labelAngle=-30)),
            y=alt.Y("place:Q", axis=None),
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
    return _spec(chart.properties(width="container", height=HEIGHT))


def place(space: Space, name: str, value: Any) -> float:
    """0 to 1 between the ends of a dimension."""
    dimension = space.dimensions[name]
    if isinstance(dimension, Choice):
        options = dimension.options
        return options.index(value) / max(1, len(options) - 1) if value in options else 0.5
    if dimension.log:
        return float(np.log(value / dimension.low) / np.log(dimension.high / dimension.low))
    return (value - dimension.low) / (dimension.high - dimension.low)


def short(value: Any) -> str:
    """A setting in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def importance(found: Sequence[Importance]) -> Chart:
    """A bar a dimension, faint where chance comes to as much; a tick where that is."""
    rows = [{"dimension": i.name, **asdict(i), "matters": i.matters} for i in found]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        y=alt.Y("dimension:N", sort=[i.name for i in found], title=None),
        tooltip=[
            "dimension:N",
            alt.Tooltip("share:Q", format=".1%"),
            alt.Tooltip("chance:Q", format=".1%"),
            alt.Tooltip("drawn:Q", title="trials"),
        ],
    )
    bars = base.mark_bar(color=_COLOURS[0]).encode(
        x=alt.X("share:Q", title="share of what sets the best third apart", axis=alt.Axis(format="%")),
        opacity=alt.condition("datum.matters", alt.value(1.0), alt.value(0.35)),
    )
    ticks = base.mark_tick(color=_COLOURS[1], thickness=3, opacity=1).encode(x="chance:Q")
    return _spec((bars + ticks).properties(width="container", height=26 * len(rows)))


def confusion(counts: np.ndarray, names: Sequence[str]) -> Chart:
    """counts (C, C), rows are the truth."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    rows = [
        {
            "truth": names[i],
            "predicted": names[j],
            "pictures": int(counts[i, j]),
            "share": float(shares[i, j]),
        }
        for i, truth in enumerate(names)
        for j in range(len(names))
    ]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("predicted:N", sort=list(names), axis=alt.Axis(labelAngle=-40)),
        y=alt.Y("truth:N", sort=list(names)),
        tooltip=["truth:N", "predicted:N", "pictures:Q", alt.Tooltip("share:Q", format=".1%")],
    )
    cells = base.mark_rect().encode(
        color=alt.Color("share:Q", scale=alt.Scale(scheme="blues", domain=[0, 1]), legend=None)
    )
    text = base.mark_text(fontSize=11).encode(
        text="pictures:Q",
        color=alt.condition("datum.share > 0.5", alt.value("white"), alt.value("#333")),
    )
    return _spec((cells + text).properties(width="container", height=HEIGHT))


def calibration(bins: Sequence[Mapping[str, Any]]) -> Chart:
    """Share of right answers against confidence, before and after the temperature."""
    base = alt.Chart(pd.DataFrame(bins))
    ideal = (
        alt.Chart(pd.DataFrame({"confidence": [0, 1], "right": [0, 1]}))
        .mark_line(color="gray", strokeDash=[4, 3])
        .encode(x="confidence:Q", y="right:Q")
    )
    lines = base.mark_line(point=True).encode(
        x=alt.X("confidence:Q", scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("right:Q", title="share that is right", scale=alt.Scale(domain=[0, 1])),
        color=_colour("when:N", ""),
        tooltip=[
            "when:N",
            "pictures:Q",
            alt.Tooltip("confidence:Q", format=".2f"),
            alt.Tooltip("right:Q", format=".2f"),
        ],
    )
    return _spec((ideal + lines).properties(width="container", height=HEIGHT))

"""Scores, durations, names and errors as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def one_line(error: Exception) -> str:
    """The error's message on one line."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The first line of the error's message: an OSError without its number, the type where there is none."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def names_text(names: Iterable[object], limit: int = 5) -> str:
    """The names in quotes. Past `limit` it gives their number instead."""
    quoted = [repr(str(name)) for name in names]
    more = f" ... ({len(quoted)} in all)" if len(quoted) > limit else ""
    return ", ".join(quoted[:limit]) + more


def score_text(metric: str, value: float | None) -> str:
    """A score in per cent, or as a number for log loss. None becomes a dash."""
    if value is None:
        return "-"
    return f"{value:.4f}" if metric == "log_loss" else f"{100 * value:.1f} %"


def points_text(metric: str, value: float) -> str:
    """A difference between two scores, signed, in percentage points or as a number for log loss."""
    return f"{value:+.4f}" if metric == "log_loss" else f"{100 * value:+.1f}"


def gain_unit(metric: str) -> str:
    """The unit of `points_text`."""
    return "nats" if metric == "log_loss" else "points"


def range_text(metric: str, interval: Mapping[str, float]) -> str:
    """The bounds of an interval."""
    low, high = (score_text(metric, interval[end]).removesuffix(" %") for end in ("low", "high"))
    return f"{low} to {high}"


def interval_text(metric: str, interval: Mapping[str, float]) -> str:
    """A score and the bounds of its interval."""
    return f"{score_text(metric, interval['value'])} ({range_text(metric, interval)})"


def gain_text(metric: str, interval: Mapping[str, float]) -> tuple[str, str]:
    """A difference between two scores, and the bounds of its interval."""
    value, low, high = (points_text(metric, interval[name]) for name in ("value", "low", "high"))
    return value, f"{low} to {high}"


def stops_sentence(results: Mapping[str, Any]) -> str:
    """What the check of stops says, in words."""
    if not results["stopped"]:
        return "No trial was stopped at a rung: there is no stop to check."
    text = f"Of {results['stopped']} trials stopped at a rung {results['drawn']} were drawn at random and "
    if not results["finished"]:
        return f"{text}none was finished: there was no time for it."
    share = results["wrong_share"]
    return (
        f"{text}{results['finished']} of them finished: {results['wrong']} better than the best of the "
        f"search (wrong stops; 95 % interval {100 * share['low']:.0f} to {100 * share['high']:.0f} %), "
        f"{results['debatable']} more above the median of the finished ones (debatable). "
        f"Stopping them saved {results['seconds_saved']:.0f} s of training."
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them: 45 s, 12 min, 3.5 h."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

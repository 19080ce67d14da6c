"""Figures and errors as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def one_line(error: Exception) -> str:
    """What an error says, without line ends."""
    return " ".join(str(error).split())


def score_text(metric: str, value: float | None) -> str:
    """A score: per cent, but for log loss; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.4f}" if metric == "log_loss" else f"{100 * value:.1f} %"


def points_text(metric: str, value: float) -> str:
    """A difference between two scores, with its sign."""
    return f"{value:+.4f}" if metric == "log_loss" else f"{100 * value:+.1f}"


def range_text(metric: str, found: Mapping[str, float]) -> str:
    """The ends of an interval."""
    low, high = (score_text(metric, found[end]).removesuffix(" %") for end in ("low", "high"))
    return f"{low} to {high}"


def interval_text(metric: str, found: Mapping[str, float]) -> str:
    """A score and the ends of its interval."""
    return f"{score_text(metric, found['value'])} ({range_text(metric, found)})"


def gain_text(metric: str, found: Mapping[str, float]) -> tuple[str, str]:
    """A difference between two scores and the ends of its interval."""
    value, low, high = (points_text(metric, found[name]) for name in ("value", "low", "high"))
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
    """Seconds as people say them: 45 s, 12 min, 3.5 h."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""Progress of a run: a live terminal view, and the same as one plain line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from carmodels.evaluation.metrics import METRICS
from carmodels.formatting import duration
from carmodels.records import State, TrialRecord
from carmodels.steady_clock import steady_time
from carmodels.study import best_first
from carmodels.training.config import EpochMetrics
from carmodels.training.run import Run
from tune.budget.clock import Clock
from tune.runtime.callbacks import RunState

BARS = "▁▂▃▄▅▆▇█"
WIDE = 120  # columns; from this width a trial's row also has lr, augmentation and pace
CURVE, WIDE_CURVE = 8, 24  # maximum width of a sparkline, columns
_OTHER_LINES = 7  # lines of the view that are not trials
_MARGIN = 3  # columns kept free at the right: an echoed ^C would wrap the line


@dataclass(frozen=True)
class Running:
    """A running trial and its epochs so far."""

    run: Run
    curve: Sequence[EpochMetrics]

    @property
    def best(self) -> float | None:
        """Best value so far. None before the first epoch, or if no value is finite."""
        values = [e.value for e in self.curve if math.isfinite(e.value)]
        better = max if METRICS[self.run.origin.metric].mode == "max" else min
        return better(values) if values else None


@dataclass(frozen=True)
class RunSnapshot:
    """Snapshot of a run."""

    stage: str
    metric: str
    running: tuple[Running, ...]
    ended: tuple[TrialRecord, ...]  # of this stage
    best: TrialRecord | None  # complete, of any stage but folds
    trials: int | None  # target of the stage, if it has one
    used: float  # seconds since the command started
    left: float  # seconds; estimated if only the number of trials bounds the run; inf: unknown

    @property
    def stopped(self) -> int:
        return sum(r.state in (State.PRUNED, State.OUT_OF_TIME) for r in self.ended)

    @property
    def failed(self) -> int:
        return sum(r.state is State.FAILED for r in self.ended)

    @property
    def counts(self) -> str:
        """Numbers of trials that ended, are running, were cut short, and failed, as text."""
        goal = f" of {self.trials}" if self.trials else ""
        return (
            f"{len(self.ended)}{goal} trials ended, {len(self.running)} running, "
            f"{self.stopped} stopped, {self.failed} failed"
        )

    @property
    def time(self) -> str:
        """Time used and time left, as text."""
        left = "" if math.isinf(self.left) else f", {duration(self.left)} left"
        return f"{duration(self.used)} used{left}"

    @property
    def share_used(self) -> float | None:
        """Share of the time used. None without a limit."""
        left = max(0.0, self.left)
        return None if math.isinf(left) else self.used / (self.used + left) if self.used + left else 1.0


def take_snapshot(
    ended: Iterable[TrialRecord], recorder: RunState, metric: str, clock: Clock, trials: int | None
) -> RunSnapshot:
    """Snapshot of the run now. `trials` is the target of the search."""
    ended = list(ended)
    of_stage = tuple(r for r in ended if r.stage == recorder.stage)
    goal = trials if recorder.stage == "search" else None
    used, left = steady_time() - clock.begun, clock.left
    if math.isinf(left) and goal and recorder.recorded:
        left = used / len(recorder.recorded) * max(0, goal - len(of_stage))
    return RunSnapshot(
        stage=recorder.stage,
        metric=metric,
        running=tuple(Running(recorder.runs[i], tuple(c)) for i, c in recorder.running.items()),
        ended=of_stage,
        best=next(iter(best_first(ended, metric)), None),
        trials=goal,
        used=used,
        left=left,
    )


def line(now: RunSnapshot) -> str:
    """Progress as one line."""
    parts = [f"{now.stage}: {now.counts}"]
    if now.best:
        parts.append(f"best {now.best.value:.4f} ({now.best.config.title})")
    if now.running:
        parts.append("epochs " + " ".join(_epochs(trial) for trial in now.running))
    return ", ".join([*parts, now.time])


@dataclass(frozen=True)
class TerminalView:
    """Terminal view of a run: counts, best trial, time, and a row per running trial."""

    now: RunSnapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - _MARGIN)
        yield from console.render(Group(*self._parts(width, console.height)), options.update_width(width))

    def _parts(self, width: int, height: int) -> Iterator[RenderableType]:
        now = self.now
        yield Rule(Text(now.stage), align="left", style="dim", characters="─")
        yield _cut(now.counts)
        best = (
            f"{now.metric} {now.best.value:.4f}  {now.best.config.title}" if now.best else "none finished yet"
        )
        yield _cut(f"best {best}", "bold green" if now.best else "dim")
        yield self._budget()
        if now.running:
            yield self._trials(wide=width >= WIDE, rows=max(1, height - _OTHER_LINES))

    def _budget(self) -> Table:
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(no_wrap=True)
        share = self.now.share_used
        if share is None:
            grid.add_row(_cut(self.now.time))
        else:
            grid.add_column(ratio=1)
            grid.add_row(_cut(self.now.time), ProgressBar(total=1.0, completed=share))
        return grid

    def _trials(self, *, wide: bool, rows: int) -> Table:
        shown = self.now.running[:rows]
        values = [e.value for trial in shown for e in trial.curve if math.isfinite(e.value)]
        low, high = min(values, default=0.0), max(values, default=0.0)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
        for name in ("epoch", self.now.metric, "best"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("curve", no_wrap=True, min_width=CURVE)
        table.add_column("configuration", no_wrap=True, overflow="ellipsis", ratio=1)
        if wide:
            for name in ("lr", "augment", "s/epoch"):
                table.add_column(name, justify="left" if name == "augment" else "right", no_wrap=True)
        for trial in shown:
            curve = [e.value for e in trial.curve]
            cells = (
                _epochs(trial),
                _number(curve[-1] if curve else None),
                _number(trial.best),
                sparkline(curve, low, high, WIDE_CURVE if wide else CURVE),
                Text(trial.run.title),
            )
            table.add_row(*cells, *(_wide_cells(trial) if wide else ()))
        if len(self.now.running) > rows:
            table.add_row(*[""] * 4, f"and {len(self.now.running) - rows} more")
        return table


def sparkline(values: Sequence[float], low: float, high: float, width: int) -> str:
    """One bar per value, scaled from `low` to `high`. A non-finite value is a blank.

    More than `width` values are sampled evenly. The last value is always kept.
    """
    if len(values) > width:
        values = [values[(i + 1) * len(values) // width - 1] for i in range(width)]
    span = high - low
    return "".join(_bar((v - low) / span if span else 0.5) if math.isfinite(v) else " " for v in values)


def _bar(share: float) -> str:
    return BARS[min(len(BARS) - 1, max(0, int(share * len(BARS))))]


def _epochs(trial: Running) -> str:
    return f"{len(trial.curve)}/{trial.run.config.epochs}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _wide_cells(trial: Running) -> tuple[str, str, str]:
    pace = f"{trial.curve[-1].seconds:.1f}" if trial.curve else "-"
    return f"{trial.run.config.lr:.1e}", trial.run.config.augment, pace


def _cut(text: str, style: str = "") -> Text:
    """One line, cut off at the terminal's width."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")

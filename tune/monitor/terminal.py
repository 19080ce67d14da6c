"""Terminal output of the scripts: a line per ended trial, live progress, and tables at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from carmodels.files import read_json
from carmodels.formatting import gain_text, gain_unit, interval_text, stops_sentence
from carmodels.holdout import later_sentence, quoted_look, quoted_suffix
from carmodels.models.facts import short_name
from carmodels.records import NOT_ENDED, State, TrialRecord
from carmodels.study import Study
from tune.budget.clock import Clock
from tune.monitor import terminal_view
from tune.optim.standings import Standing, standings_of, standings_sentence, top_standings
from tune.runtime.callbacks import ProgressCallback, RunState

NARROWEST = 80  # columns of a table; a narrower terminal wraps its lines
QUIET_SECONDS = 60.0  # between progress lines, if the output is not a terminal

_SCORED_NAMES = {
    "ensemble": "ensemble",
    "single": "best single trial",
    "baseline": "baseline",
}

_COLOURS = {
    State.COMPLETE: "green",
    State.PRUNED: "yellow",
    State.OUT_OF_TIME: "yellow",
    State.FAILED: "red",
}
_CONFIGURATION = ("backbone", "px", "head", "strategy", "lr", "augment")
_DETAILS = ("trial", "augment", "epochs", "s")  # columns left out on a narrow terminal


class _Console(Console):
    """Says nothing more once nobody reads it, or it cannot be written: the result of a run is its files."""

    trouble = ""  # why it cannot be written; "" too where its reader is gone

    def print(self, *objects: Any, **settings: Any) -> None:
        try:
            super().print(*objects, **settings)
        except OSError as error:
            self.quiet, self.trouble = True, str(error.strerror)

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Screen:
    """Output for users: a live view on a terminal, plain lines elsewhere or on request.

    The end of a `with` block removes the live view, so an error message stands alone.
    """

    def __init__(self, *, plain: bool = False) -> None:
        plain = plain or not sys.stdout.isatty()  # even with FORCE_COLOR: a program reads it
        self._terminal = False if plain else None  # None: rich detects the terminal's features
        self.console = _Console(highlight=False, soft_wrap=True, emoji=False, force_terminal=self._terminal)
        self._alive = self.console.is_interactive and not self.console.options.ascii_only
        self._live: Live | None = None
        self._last_line_at = time.monotonic()

    def say(self, text: str, style: str = "") -> None:
        """Print one line, without interpreting markup. Long lines are not cut."""
        self.console.print(text, style=style, markup=False)

    def watch(self, study: Study, clock: Clock, trials: int | None) -> ProgressCallback:
        """Callbacks that print each ended trial and the progress in between."""
        metric = study.metric
        ended = {r.trial_id: r for r in study.records() if r.state not in NOT_ENDED}

        def on_record(record: TrialRecord) -> None:
            ended[record.trial_id] = record
            value = "-" if record.value is None else f"{record.value:.4f}"
            self.say(
                f"{len(ended):>4}  {value:>7}  {record.state:<11} {record.config.title:<52}"
                f" {record.seconds:6.0f} s  {record.reason}",
                _COLOURS.get(record.state, ""),
            )

        def on_step(recorder: RunState) -> None:
            self._show(terminal_view.take_snapshot(ended.values(), recorder, metric, clock, trials))

        return ProgressCallback(on_record, on_step)

    def _show(self, now: terminal_view.RunSnapshot) -> None:
        if self._alive:
            if self._live is None:
                self._live = Live(console=self.console, transient=True)
                self._live.start()
            self._live.update(terminal_view.TerminalView(now))
        elif time.monotonic() - self._last_line_at >= QUIET_SECONDS:
            self._last_line_at = time.monotonic()
            self.say(f"      {terminal_view.line(now)}")

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *error: object) -> None:
        self.rest()

    def rest(self) -> None:
        """Remove the live view."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def decoding(self) -> tuple[Progress, Any]:
        """A progress bar for the data cache, and the function that updates it."""
        columns = (TextColumn("Decoding images, once for all trials"), BarColumn(), TaskProgressColumn())
        progress = Progress(*columns, console=self.console, transient=True, disable=not self._alive)
        task = progress.add_task("decode", total=None)
        return progress, lambda done, total: progress.update(task, completed=done, total=total)

    def audition(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print how linear probes rank the backbones. Nothing without rows."""
        if not rows:
            return
        table = Table(title="linear probes of frozen backbones, out of fold on train", title_justify="left")
        for name in ("backbone", "px", "images", "accuracy", "ImageNet", "ms an image", "tried"):
            table.add_column(name, justify="left" if name in ("backbone", "tried") else "right")
        for row in rows:
            table.add_row(
                short_name(row["backbone"]),
                str(row["image_size"]),
                str(row["images"]),
                f"{row['accuracy']:.3f}",
                f"{row['imagenet']:.1f}" if row["imagenet"] else "",
                f"{1000 * row['seconds_per_image']:.0f}",
                "yes" if row["listed"] else "",
            )
        self._wide(table)

    def table(self, study: Study, rows: int = 10) -> None:
        """Print the best complete trials, with settings and scores. The baseline is always included."""
        table = Table(title=f"{study.metric} on val, best first", title_justify="left")
        names = ("rank", "trial", study.metric, *_CONFIGURATION, "epochs", "s", "note")
        narrow = self._alive and self.console.width < terminal_view.WIDE
        shown = [i for i, name in enumerate(names) if not (narrow and name in _DETAILS)]
        for i in shown:
            right = names[i] in {"rank", study.metric, "px", "lr", "epochs", "s"}
            table.add_column(names[i], justify="right" if right else "left", overflow="fold")
        for rank, record in enumerate(study.leaderboard(), start=1):
            if rank <= rows or record.baseline:
                cells = (str(rank), *_cells(record))
                table.add_row(*(cells[i] for i in shown))
        if table.rows:
            self._wide(table)

    def standings(self, study: Study) -> None:
        """Print the best configurations over all their runs, and which may be as good as the best."""
        found = standings_of(study)
        if not found:
            return
        table = Table(title=f"{study.metric} on val over all runs, best first", title_justify="left")
        for name in ("configuration", "trial"):
            table.add_column(name)
        for name in ("runs", "mean", "estimate", "95 % interval"):
            table.add_column(name, justify="right")
        table.add_column("not clearly worse than the best")
        for standing in top_standings(found):
            table.add_row(*_standing_cells(standing, found[0]))
        self._wide(table)
        self.say(standings_sentence(found))

    def stops(self, study: Study) -> None:
        """Print the results of pruned trials that were trained to the end to check the pruning."""
        results = read_json(study.stops_file)
        table = Table(
            title=f"Stopped trials, finished after all: {study.metric} on val", title_justify="left"
        )
        for name in ("configuration", "trial"):
            table.add_column(name)
        for name in ("stopped at epoch", "value then", "finished", "over the best", "seconds saved"):
            table.add_column(name, justify="right")
        table.add_column("stop")
        for row in results["trials"]:
            table.add_row(*_stop_cells(row))
        if results["trials"]:
            self._wide(table)
        self.say(stops_sentence(results))

    def _wide(self, table: Table) -> None:
        """Print a table. A narrow terminal wraps its rows: rich would cut columns to letters."""
        self.rest()
        width = max(self.console.width, NARROWEST if self._alive else 150)
        height = self.console.height  # without it a "dumb" terminal has 80 columns, whatever its width
        _Console(
            width=width,
            height=height,
            quiet=self.console.quiet,
            highlight=False,
            markup=False,
            emoji=False,
            force_terminal=self._terminal,
        ).print(table)

    def answer(self, results: dict[str, Any], study: Study) -> None:
        """Print the ensemble: members, holdout scores, gain over the baseline, and the submission's path."""
        first, metric = quoted_look(study, "ensemble"), results["metric"]
        holdout = first.scores
        self._members(results)
        images = f"{holdout['images']} images kept aside, 95 % intervals"
        self.say(f"{metric} on holdout ({images}){quoted_suffix(study, 'ensemble')}:")
        for name, words in _SCORED_NAMES.items():
            if name in holdout:
                shown = interval_text(metric, holdout[name])
                self.say(f"  {words:<24}{shown}", "bold" if name == "ensemble" else "")
        if "gain_over_baseline" in holdout:
            value, ends = gain_text(metric, holdout["gain_over_baseline"])
            self.say(f"  {'gain over the baseline':<24}{value} {gain_unit(metric)} ({ends})")
        if "baseline" not in holdout:
            self.say("  The baseline did not finish: there is nothing to compare with.", "yellow")
        if later := later_sentence(study, "ensemble"):
            self.say(f"  {later}", "yellow")
        if hidden := first.hidden:
            shown = interval_text(metric, hidden)
            self.say(f"Expected on the {hidden['images']} hidden images, in 95 of 100: {shown}.")
        if "submission" in results:
            given = ", ".join(f"{row['name']} {row['rows']}" for row in results["submission"]["classes"])
            self.say(f"Submission: {study.submission_file}, {results['submission']['rows']} rows: {given}.")

    def _members(self, results: Mapping[str, Any]) -> None:
        """Print each member with its weight, its gain on val and its time per 1,000 images."""
        cost = results["cost"]
        worker = cost["device"].upper() if cost["device"] != "cpu" else f"{cost['cores']} CPU cores"
        title = f"Ensemble: {cost['seconds_per_1000']:.1f} s for 1,000 images on {worker}, views included"
        table = Table(title=title.replace("1 CPU cores", "1 CPU core"), title_justify="left")
        for name in ("weight", "trial", "model", "stage"):
            table.add_column(name, justify="right" if name == "weight" else "left")
        for name in ("val", "adds on val", "temperature", "s for 1,000"):
            table.add_column(name, justify="right")
        for member in results["members"]:
            table.add_row(
                f"{member['weight']:.2f}",
                member["trial_id"],
                member["title"],
                member["stage"],
                f"{member['val']:.4f}",
                f"{member['gain']:+.4f}",
                f"{member['temperature']:.2f}",
                f"{member['seconds_per_1000']:.2f}",
            )
        self._wide(table)


def _cells(record: TrialRecord) -> tuple[str, ...]:
    config = record.config
    return (
        record.trial_id,
        f"{record.value:.4f}",
        config.backbone,
        str(config.image_size),
        str(config.head_depth),
        config.unfreeze,
        f"{config.lr:.1e}",
        config.augment,
        str(record.epochs_run),
        f"{record.seconds:.0f}",
        _note(record),
    )


def _note(record: TrialRecord) -> str:
    """The record's note, and that memory was short."""
    short = f"batches in {record.microbatches} parts (memory)" if record.microbatches > 1 else ""
    return "; ".join(filter(None, (record.note, short)))


def _standing_cells(standing: Standing, best: Standing) -> tuple[str, ...]:
    estimate, record = standing.estimate, standing.record
    return (
        record.config.title,
        record.trial_id,
        str(standing.runs),
        f"{standing.mean:.4f}",
        f"{estimate.value:.4f}",
        f"{estimate.low:.4f} to {estimate.high:.4f}",
        "the best" if standing is best else "no" if standing.clearly_worse else "yes",
    )


def _stop_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["title"],
        row["trial_id"],
        f"{row['epochs_run']} of {row['epochs']}",
        f"{row['stopped_at']:.4f}",
        f"{row['value']:.4f}",
        f"{row['over_best']:+.4f}",
        f"{row['seconds_saved']:.0f}",
        row["verdict"],
    )

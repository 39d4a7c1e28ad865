"""A run, also while it trains, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from time import sleep as wait
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, RenderableType, group
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from torchprobe.reports import evidence
from torchprobe.reports.events import EventFiles, visible
from torchprobe.reports.evidence import tables
from torchprobe.reports.run import Run, run_of
from torchprobe.reports.summary import ROUNDING, endings, headline, listed, reason, summarise

BARS = "▁▂▃▄▅▆▇█"
_NOT_FINITE = "!"
_WIDTH = 16  # of a curve: the table fits into 100 columns
_STEPS = 6  # of an alert, named one by one
_STYLES = {True: "bold green", False: "bold red", None: "bold yellow"}  # of a verdict
_INDENTED, _INDENTED_TWICE = (0, 0, 0, 1), (0, 0, 0, 4)
_TEXTS = ("what", "where", "tag", "better is")  # columns of what a verdict stands on
_OVER = ("finished", "interrupted", "crashed", "killed", "ended", "stopped recording")


@group()
def rendered(run: Run, summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Everything that is known, in the order in which a person asks: is it well, what goes on, where, what to try."""
    yield Text(f"{summary['run']}: {headline(summary)}", style="bold")
    yield from (Text(ending, style="red") for ending in endings(summary))
    yield from verdict_lines(summary["verdict"])
    if summary["hparams"]:
        yield Text(listed(summary["hparams"]))
    yield _alerts(summary["alerts"])
    for flight in summary["flight_recordings"]:
        about = f"Flight recording of step {flight.get('step', '?')}{reason(flight)}"
        yield Text(f"{about}: {visible(flight['file'])}", style="yellow")
    layers, best, both, times = (_of(table) for table in tables(summary))
    yield from (*best, *both)
    yield from _curves("course of the run", run, summary["curves"])
    yield from layers
    entropies = {f"attention_entropy/{name}": curve for name, curve in summary["attention_entropy"].items()}
    yield from _curves("attention entropy by layer, nats", run, entropies)
    yield from filled("uncertainty", ("what", ">last value"), summary["uncertainty"].items())
    for part, values in summary["calibration"].items():
        title = f"calibration, {'validation' if part else 'training'}"
        yield from filled(title, ("what", ">last value"), values.items())
    yield from times
    said = [thing["advice"] for thing in summary["verdict"]["look_at"]]
    besides = [advice for advice in summary["next_steps"] if advice not in said]
    if besides:
        yield Text("\nwhat to try besides, the gravest first", style="bold")
        yield from (Text(f" {i}. {text}") for i, text in enumerate(besides, 1))


def follow(folder: Path, console: Console, *, seconds: float = 2.0, sleep: Callable[[float], None] = wait) -> Run:
    """Show the run's report, anew whenever there is more, until the run has ended. Returns the run as it was then.

    Reads what has been added alone. KeyboardInterrupt goes through.
    """
    files = EventFiles(folder)
    files.update()
    with Live(console=console, screen=console.is_terminal, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            run = run_of(files)
            summary = summarise(run)
            shown = rendered(run, summary)
            live.update(shown, refresh=True)
            if summary["state"] in _OVER:
                break
            sleep(seconds)
            files.update()
    if console.is_terminal:
        console.print(shown)  # the whole of it stays, where the screen showed what fits
    return run


def verdict_lines(verdict: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The verdict, and below it what to look at and what to try."""
    yield Text(verdict["line"], style=_STYLES[verdict["healthy"]])
    for i, thing in enumerate(verdict["look_at"], 1):
        yield Padding(Text(f"{i}. {thing['what']}", style="bold"), _INDENTED)
        if thing["advice"]:
            yield Padding(Text(thing["advice"]), _INDENTED_TWICE)


def _alerts(alerts: Sequence[Mapping[str, Any]]) -> RenderableType:
    if not alerts:
        return Text("No alert.", style="green")
    table = plain_table("alerts", "rule", "steps", "what it said last")
    for alert in alerts:
        steps = ", ".join(map(str, alert["steps"][:_STEPS])) + (", …" if len(alert["steps"]) > _STEPS else "")
        table.add_row(alert["rule"], steps, escape(alert["said"] or ""), style="yellow")
    return table


def _curves(title: str, run: Run, curves: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    rows = [
        [
            tag.removeprefix("attention_entropy/"),
            *(curve[key] for key in ("first", "last", "lowest", "highest")),
            sparkline(run.scalars[tag].values, _WIDTH),
        ]
        for tag, curve in curves.items()
    ]
    yield from filled(title, ("tag", ">first", ">last", ">lowest", ">highest", "course"), rows)


def _of(table: evidence.Table) -> Iterator[Table]:
    """Texts at the left, numbers at the right; what the line above says already in its first column is left out."""
    columns = [name if name in _TEXTS else f">{name}" for name in table.columns]
    before = [None, *(row[0] for row in table.rows)]
    rows = [["" if row[0] == last else row[0], *row[1:]] for row, last in zip(table.rows, before, strict=False)]
    yield from filled(table.title.lower(), columns, rows)


def filled(title: str, columns: Sequence[str], rows: Collection[Sequence[Any]]) -> Iterator[Table]:
    """A table, if it has any row."""
    if rows:
        table = plain_table(title, *columns)
        for row in rows:
            table.add_row(*map(_cell, row))
        yield table


def _cell(value: str | float | None) -> str:
    if isinstance(value, str):
        return escape(value)
    return str(value) if isinstance(value, int) else short(value)


def short(value: float | None) -> str:
    """Four significant digits; a dash for what is not finite."""
    return "-" if value is None else f"{value:.4g}"


def plain_table(title: str, *columns: str) -> Table:
    """A table under a blank line and its title; a column whose name begins with > is aligned to the right.

    It is never narrower than its title, which would be wrapped. In a narrow terminal the first column is the last to be
    cut: names that look alike say nothing.
    """
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", show_edge=False, min_width=len(title) + 1
    )
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column[0] == ">" else "left", no_wrap=column is columns[0]
        )
    return table


def sparkline(values: NDArray[np.float64], width: int = 24) -> str:
    """The course of values as at most `width` bars, each the mean of its share; ! where one is not finite."""
    if not values.size:
        return ""
    shares = np.array_split(values, min(width, values.size))
    means = np.array([share.mean() for share in shares])
    finite = means[np.isfinite(means)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    scale = (len(BARS) - 1) / (high - low) if high - low > ROUNDING * max(abs(high), abs(low)) else 0.0
    return "".join(BARS[round((m - low) * scale)] if np.isfinite(m) else _NOT_FINITE for m in means.tolist())

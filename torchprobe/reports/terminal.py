"""A run, also while it trains, and the differences of two, as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from torchprobe.reports.events import EventFiles, Series, visible
from torchprobe.reports.evidence import is_of, tables
from torchprobe.reports.run import Run, run_of
from torchprobe.reports.summary import ROUNDING, counted, endings, headline, listed, plain, reason, summarise

BARS = "▁▂▃▄▅▆▇█"
_NOT_FINITE = "!"
_WIDTH = 16  # of a curve: the table fits into 100 columns
_STEPS = 6  # of an alert, named one by one
_TIMES = 10  # apart: from there on so many times says more than a percentage
_WHOLE_RUN = ("overview", "train", "best", "ood", "calibration", "lr", "momentum", "weight_decay")  # tag groups
_STYLES = {True: "bold green", False: "bold red", None: "bold yellow"}  # of a verdict
_INDENTED, _INDENTED_TWICE = (0, 0, 0, 1), (0, 0, 0, 4)
_TEXTS = ("what", "where", "tag", "better is")  # columns of what a verdict stands on
_OVER = ("finished", "crashed", "killed", "ended", "stopped recording")
_NAMED = 5  # tags that one run alone has


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
    yield from _filled("uncertainty", ("what", ">last value"), summary["uncertainty"].items())
    for part, values in summary["calibration"].items():
        title = f"calibration, {'validation' if part else 'training'}"
        yield from _filled(title, ("what", ">last value"), values.items())
    yield from times
    said = [thing["advice"] for thing in summary["verdict"]["look_at"]]
    yield from _next_steps([advice for advice in summary["next_steps"] if advice not in said])


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


def _next_steps(advice: Sequence[str]) -> Iterator[RenderableType]:
    if advice:
        yield Text("\nwhat to try besides, the gravest first", style="bold")
        yield from (Text(f" {i}. {text}") for i, text in enumerate(advice, 1))


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
    yield from _filled(title, ("tag", ">first", ">last", ">lowest", ">highest", "course"), rows)


def _of(table: evidence.Table) -> Iterator[Table]:
    """Texts at the left, numbers at the right; what the line above says already in its first column is left out."""
    columns = [name if name in _TEXTS else f">{name}" for name in table.columns]
    before = [None, *(row[0] for row in table.rows)]
    rows = [["" if row[0] == last else row[0], *row[1:]] for row, last in zip(table.rows, before, strict=False)]
    yield from _filled(table.title.lower(), columns, rows)


def _filled(title: str, columns: Sequence[str], rows: Collection[Sequence[Any]]) -> Iterator[Table]:
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


@dataclass(frozen=True, slots=True)
class Difference:
    """A tag of both runs: where each had settled (`Series.settled`) at the last step that both have, and how far apart.

    size is |a - b| over the largest of |a|, |b| and the spread of either, from 0 (equal) to 2 (of opposite sign and
    equal size); infinite when one of the two is not finite. times is how many times the smaller the larger is, for two
    of one sign: the smaller, or the spread where that is more.
    """

    tag: str
    a: float
    b: float
    size: float
    times: float = 1.0
    step: int = 0

    @property
    def ratio(self) -> str:
        """The second over the first, for two of one sign; else how much is added."""
        if not (math.isfinite(self.a) and math.isfinite(self.b)):
            return "-"
        if self.a and self.b and (self.a > 0) == (self.b > 0):
            return f"x {self.b / self.a:.3g}"
        return f"{self.b - self.a:+.3g}"

    @property
    def rank(self) -> float:
        """What comes first: a size says nearly 100 % of all that are many times apart."""
        return max(self.size, self.times - 1)

    def __str__(self) -> str:
        if not math.isfinite(self.size):
            return "not finite"
        return f"{self.times:,.0f} times" if self.times >= _TIMES else f"{self.size:.1%}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences of common tags, biggest first, and the tags that one run alone has.

    hparams: the hyperparameters that differ, as (name, first run's, second run's); None where a run has none.
    """

    differences: list[Difference]
    only_a: list[str]
    only_b: list[str]
    hparams: list[tuple[str, Any, Any]]


def compare(a: Run, b: Run) -> Comparison:
    """Compare every scalar tag of two runs, each at the last step that both have of it."""
    common = a.scalars.keys() & b.scalars.keys()
    found = [_difference(tag, a.scalars[tag], b.scalars[tag]) for tag in sorted(common)]
    found.sort(key=lambda difference: difference.rank, reverse=True)
    names = sorted(a.hparams.keys() | b.hparams.keys())
    pairs = ((name, a.hparams.get(name), b.hparams.get(name)) for name in names)
    hparams = [(name, one, other) for name, one, other in pairs if (type(one), one) != (type(other), other)]
    return Comparison(found, sorted(a.scalars.keys() - common), sorted(b.scalars.keys() - common), hparams)


def _difference(tag: str, one: Series, other: Series) -> Difference:
    step = int(min(one.steps[-1], other.steps[-1]))
    one, other = one.until(step), other.until(step)
    a, b = one.settled, other.settled
    if not (math.isfinite(a) and math.isfinite(b)):
        same = math.isnan(a) and math.isnan(b)
        return Difference(tag, a, b, 0.0 if same else math.inf, step=step)
    low, high = sorted((abs(a), abs(b)))
    noise = max(one.spread, other.spread)
    size = abs(a - b) / max(high, noise) if high else 0.0
    times = high / max(low, noise) if low and (a > 0) == (b > 0) else 1.0
    return Difference(tag, a, b, size, times, step)


@group()
def differences(a: Run, b: Run, compared: Comparison, *, only: str, most: int) -> Iterator[RenderableType]:
    """Hyperparameters, numbers of the whole run, numbers of its layers; of the numbers those whose tag holds `only`."""
    first, second = visible(str(a.path)), visible(str(b.path))
    yield Text(f"{first} (first, {a.steps} steps) against {second} (second, {b.steps} steps)", style="bold")
    hparams = [[name, *(None if v is None else plain(v) for v in values)] for name, *values in compared.hparams]
    yield from _filled("hyperparameters that differ", ("name", ">first", ">second"), hparams)
    shown = [found for found in compared.differences if only in found.tag and found.size > 0]
    if not shown:
        yield Text("\nNo number that both runs have differs.")
    yield from _of_both("the whole run", [found for found in shown if is_of(_WHOLE_RUN, found.tag)], most)
    yield from _of_both("inside the model", [found for found in shown if not is_of(_WHOLE_RUN, found.tag)], most)
    for name, tags in (("first", compared.only_a), ("second", compared.only_b)):
        if tags:
            rest = ", …" if len(tags) > _NAMED else ""
            yield Text(f"\nIn the {name} run alone, {counted(len(tags), 'tags')}: {', '.join(tags[:_NAMED])}{rest}")


def _of_both(title: str, found: Sequence[Difference], most: int) -> Iterator[RenderableType]:
    columns = ("tag", ">first", ">second", ">ratio", ">difference", ">step")
    yield from _filled(title, columns, [[one.tag, one.a, one.b, one.ratio, str(one), one.step] for one in found[:most]])
    if len(found) > most:
        rest = len(found) - most
        are = "smaller difference is" if rest == 1 else "smaller differences are"
        yield Text(f" {rest} {are} not shown; --most shows more.", style="dim")

"""A run's summary as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from torchprobe.reports.run import Run
from torchprobe.reports.words import headline, listed, reason, sparkline, stopped_early, visible

_BARS = 16  # of a curve: the table fits into 100 columns
_STEPS = 6  # of an alert, named one by one


def rendered(run: Run, summary: Mapping[str, Any]) -> RenderableType:
    """Everything that is known, in the order in which a person asks: is it well, what goes on, where."""
    return Group(*_parts(run, summary))


def _parts(run: Run, summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    yield Text(f"{summary['run']}: {headline(summary)}", style="bold")
    if summary["stopped"] is not None:
        yield Text(stopped_early(summary["stopped"]), style="red")
    if summary["hparams"]:
        yield Text(listed(summary["hparams"]))
    yield _alerts(summary["alerts"])
    yield from _flights(summary["flight_recordings"])
    yield from _curves("course of the run", run, summary["curves"])
    yield from _layers(summary["layers"])
    entropies = {f"attention_entropy/{name}": curve for name, curve in summary["attention_entropy"].items()}
    yield from _curves("attention entropy by layer, nats", run, entropies)
    yield from _numbers("uncertainty", summary["uncertainty"])
    for part, values in summary["calibration"].items():
        yield from _numbers(f"calibration, {'validation' if part else 'training'}", values)


def _alerts(alerts: Sequence[Mapping[str, Any]]) -> RenderableType:
    if not alerts:
        return Text("No alert.", style="green")
    table = plain_table("alerts", "rule", "steps", "what it said last")
    for alert in alerts:
        steps = ", ".join(map(str, alert["steps"][:_STEPS])) + (", …" if len(alert["steps"]) > _STEPS else "")
        table.add_row(alert["rule"], steps, escape(alert["said"] or ""), style="yellow")
    return table


def _flights(flights: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    for flight in flights:
        about = f"Flight recording of step {flight.get('step', '?')}{reason(flight)}"
        yield Text(f"{about}: {visible(flight['file'])}", style="yellow")


def _curves(title: str, run: Run, curves: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    if curves:
        table = plain_table(title, "tag", ">first", ">last", ">lowest", ">highest", "course")
        for tag, curve in curves.items():
            numbers = [short(curve[key]) for key in ("first", "last", "lowest", "highest")]
            table.add_row(
                escape(tag.removeprefix("attention_entropy/")), *numbers, sparkline(run.scalars[tag].values, _BARS)
            )
        yield table


def _layers(layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Table]:
    if any(layers.values()):
        table = plain_table("layers to look at", "what", "where", ">value")
        for title, rows in layers.items():
            for i, row in enumerate(rows[:3]):
                table.add_row("" if i else title, escape(row["where"]), short(row["value"]))
        yield table


def _numbers(title: str, values: Mapping[str, float | None]) -> Iterator[Table]:
    if values:
        table = plain_table(title, "what", ">last value")
        for name, value in values.items():
            table.add_row(escape(name), short(value))
        yield table


def short(value: float | None) -> str:
    """Four significant digits; a dash for what is not finite."""
    return "-" if value is None else f"{value:.4g}"


def plain_table(title: str, *columns: str) -> Table:
    """A table under a blank line and its title; a column whose name begins with > is aligned to the right.

    In a narrow terminal the first column is the last to be cut: names that look alike say nothing.
    """
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", show_edge=False)
    table.min_width = len(title) + 1  # else a long title is wrapped over a narrow table
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column[0] == ">" else "left", no_wrap=column is columns[0]
        )
    return table

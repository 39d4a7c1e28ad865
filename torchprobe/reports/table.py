"""Several runs as a table with a line each, sorted by any metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from torchprobe.reports.evidence import number
from torchprobe.reports.run import Run
from torchprobe.reports.terminal import plain_table, short

LOSSES = ("val/loss", "train/loss", "loss", "overview/loss")  # the first that a run has is shown


def row(run: Run, summary: Mapping[str, Any], metric: str | None) -> dict[str, Any]:
    """What the table says of a run: state, steps, verdict, its loss or `metric` at its last step and at its best."""
    tag = metric_of(run, metric)
    best = summary["final_and_best"].get(tag, {})
    return {
        "run": summary["run"],
        "state": summary["state"],
        "healthy": summary["verdict"]["healthy"],
        "look_at": [thing["what"] for thing in summary["verdict"]["look_at"]],
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "metric": tag,
        "final": number(run.scalars[tag].last) if tag in run.scalars else None,
        "best": best.get("best"),
    }


def metric_of(run: Run, metric: str | None) -> str | None:
    """The tag that is meant: itself, or the only one that ends so. None where the run has none, or several."""
    if metric is None:
        return next((tag for tag in LOSSES if tag in run.scalars), None)
    if metric in run.scalars:
        return metric
    ending = [tag for tag in run.scalars if tag.endswith(f"/{metric}")]
    return ending[0] if len(ending) == 1 else None


def ordered(rows: Sequence[Mapping[str, Any]], *, descending: bool = False) -> list[Mapping[str, Any]]:
    """By the metric's last value; runs that have none come last."""
    sign = -1.0 if descending else 1.0
    return sorted(rows, key=lambda one: math.inf if one["final"] is None else sign * one["final"])


def runs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line a run, in the order given."""
    tags = {one["metric"] for one in rows if one["metric"]}
    metric = tags.pop() if len(tags) == 1 else "metric"
    table = plain_table("runs", "run", "state", ">steps", f">{escape(metric)}", ">best", "verdict")
    for one in rows:
        first = one["look_at"][0] if one["look_at"] else "healthy" if one["healthy"] else "nothing stands out"
        more = f" (and {len(one['look_at']) - 1} more)" if len(one["look_at"]) > 1 else ""
        style = "red" if one["look_at"] else "green" if one["healthy"] else "yellow"
        numbers = str(one["steps"]), short(one["final"]), short(one["best"])
        said = f"[{style}]{escape(first.partition(': ')[0])}{more}[/]"
        table.add_row(escape(one["run"]), one["state"] or "-", *numbers, said)
    return table

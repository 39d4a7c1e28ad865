"""Several runs side by side: as a table with a line each, sorted by any metric; and what differs between two."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType, group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from torchprobe.reports.events import Series, visible
from torchprobe.reports.evidence import is_of, number
from torchprobe.reports.run import Run
from torchprobe.reports.summary import counted, plain
from torchprobe.reports.terminal import filled, plain_table, short

_TIMES = 10  # apart: from there on so many times says more than a percentage
_WHOLE_RUN = ("overview", "train", "best", "ood", "calibration", "lr", "momentum", "weight_decay")  # tag groups
_NAMED = 5  # tags that one run alone has
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


# ---- two runs


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
    yield from filled("hyperparameters that differ", ("name", ">first", ">second"), hparams)
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
    yield from filled(title, columns, [[one.tag, one.a, one.b, one.ratio, str(one), one.step] for one in found[:most]])
    if len(found) > most:
        rest = len(found) - most
        are = "smaller difference is" if rest == 1 else "smaller differences are"
        yield Text(f" {rest} {are} not shown; --most shows more.", style="dim")

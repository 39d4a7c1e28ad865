"""What differs between two runs, biggest first, and as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from torchprobe.reports.run import Run, Series
from torchprobe.reports.terminal import plain_table, short
from torchprobe.reports.words import counted, plain, visible

_TIMES = 10  # apart: from there on so many times says more than a percentage
_WHOLE_RUN = ("overview", "train", "best", "ood", "calibration", "lr", "momentum", "weight_decay")  # tag groups
_NAMED = 5  # tags that one run alone has


@dataclass(frozen=True, slots=True)
class Difference:
    """A tag of both runs: where each has settled (`Series.settled`), and how far apart that is.

    size is |a - b| over the largest of |a|, |b| and the spread of either, from 0 (equal) to 2 (of opposite sign and
    equal size); infinite when one of the two is not finite. times is how many times the smaller the larger is, for two
    of one sign: the smaller, or the spread where that is more.
    """

    tag: str
    a: float
    b: float
    size: float
    times: float = 1.0

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
    """Compare every scalar tag of two runs."""
    common = a.scalars.keys() & b.scalars.keys()
    found = [_difference(tag, a.scalars[tag], b.scalars[tag]) for tag in sorted(common)]
    found.sort(key=lambda difference: difference.rank, reverse=True)
    return Comparison(
        found, sorted(a.scalars.keys() - common), sorted(b.scalars.keys() - common), _hparams(a.hparams, b.hparams)
    )


def _hparams(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    pairs = ((name, a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()))
    return [(name, one, other) for name, one, other in pairs if (type(one), one) != (type(other), other)]


def _difference(tag: str, one: Series, other: Series) -> Difference:
    a, b = one.settled, other.settled
    if not (math.isfinite(a) and math.isfinite(b)):
        same = math.isnan(a) and math.isnan(b)
        return Difference(tag, a, b, 0.0 if same else math.inf)
    low, high = sorted((abs(a), abs(b)))
    noise = max(one.spread, other.spread)
    size = abs(a - b) / max(high, noise) if high else 0.0
    return Difference(tag, a, b, size, high / max(low, noise) if low and (a > 0) == (b > 0) else 1.0)


def rendered(a: Run, b: Run, compared: Comparison, *, only: str, most: int) -> RenderableType:
    """Hyperparameters, numbers of the whole run, numbers of its layers; of the numbers those whose tag holds `only`."""
    return Group(*_parts(a, b, compared, only, most))


def _parts(a: Run, b: Run, compared: Comparison, only: str, most: int) -> Iterator[RenderableType]:
    first, second = visible(str(a.path)), visible(str(b.path))
    yield Text(f"{first} (first, {a.steps} steps) against {second} (second, {b.steps} steps)", style="bold")
    if compared.hparams:
        table = plain_table("hyperparameters that differ", "name", ">first", ">second")
        for name, one, other in compared.hparams:
            table.add_row(escape(name), *("-" if value is None else escape(plain(value)) for value in (one, other)))
        yield table
    shown = [found for found in compared.differences if only in found.tag and found.size > 0]
    if not shown:
        yield Text("\nNo number that both runs have differs.")
    yield from _table("the whole run", [found for found in shown if _of_whole_run(found.tag)], most)
    yield from _table("inside the model", [found for found in shown if not _of_whole_run(found.tag)], most)
    for name, tags in (("first", compared.only_a), ("second", compared.only_b)):
        if tags:
            rest = ", …" if len(tags) > _NAMED else ""
            yield Text(f"\nIn the {name} run alone, {counted(len(tags), 'tags')}: {', '.join(tags[:_NAMED])}{rest}")


def _table(title: str, found: Sequence[Difference], most: int) -> Iterator[RenderableType]:
    if found:
        table = plain_table(title, "tag", ">first", ">second", ">difference")
        for one in found[:most]:
            table.add_row(escape(one.tag), short(one.a), short(one.b), str(one))
        yield table
    if len(found) > most:
        rest = len(found) - most
        are = "smaller difference is" if rest == 1 else "smaller differences are"
        yield Text(f" {rest} {are} not shown; --most shows more.", style="dim")


def _of_whole_run(tag: str) -> bool:
    """Rather than of one layer."""
    rest = tag.removeprefix("val/")
    return "/" not in rest or rest.partition("/")[0] in _WHOLE_RUN

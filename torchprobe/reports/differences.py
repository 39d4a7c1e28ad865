"""What differs between two runs, as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from torchprobe.reports.comparison import Comparison, Difference
from torchprobe.reports.run import Run
from torchprobe.reports.terminal import plain_table, short
from torchprobe.reports.words import counted, plain

_WHOLE_RUN = ("overview", "train", "best", "ood", "calibration", "lr", "momentum", "weight_decay")  # tag groups
_NAMED = 5  # tags that one run alone has


def rendered(a: Run, b: Run, compared: Comparison, *, only: str, most: int) -> RenderableType:
    """Hyperparameters, numbers of the whole run, numbers of its layers; of the numbers those whose tag holds `only`."""
    return Group(*_parts(a, b, compared, only, most))


def _parts(a: Run, b: Run, compared: Comparison, only: str, most: int) -> Iterator[RenderableType]:
    yield Text(f"{a.path} (first, {a.steps} steps) against {b.path} (second, {b.steps} steps)", style="bold")
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
            size = f"{one.size:.1%}" if math.isfinite(one.size) else "not finite"
            table.add_row(escape(one.tag), short(one.a), short(one.b), size)
        yield table
    if len(found) > most:
        rest = len(found) - most
        are = "smaller difference is" if rest == 1 else "smaller differences are"
        yield Text(f" {rest} {are} not shown; --most shows more.", style="dim")


def _of_whole_run(tag: str) -> bool:
    """Rather than of one layer."""
    rest = tag.removeprefix("val/")
    return "/" not in rest or rest.partition("/")[0] in _WHOLE_RUN

"""Everything that belongs to one step, before it leaves the device and when it has arrived."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.records import Value


class Reporter(Protocol):
    """The host half of a probe: turns rows into tags and values, in the drain thread."""

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Tags and values; rows has shape (len(names), fields)."""


class Share(NamedTuple):
    """What the row of a parameter is to that of the whole parameter, when several ranks train one model."""

    whole: int  # elements of the parameter
    part: int  # those that the row is of
    copy: int  # the first of the ranks whose parts make one copy of the parameter

    @property
    def is_whole(self) -> bool:
        """Whether this rank sees all of it."""
        return self.part == self.whole


WHOLE = Share(1, 1, 0)


class Heading(NamedTuple):
    """Whose rows these are; it does not keep them alive on the device."""

    reporter: Reporter
    names: Sequence[str]
    prefix: str
    counted: bool
    shares: Sequence[Share] | None


@dataclass(slots=True)
class Piece:
    """Rows of one probe on one device: shape (len(names), fields), floating."""

    reporter: Reporter
    names: Sequence[str]
    rows: Tensor
    prefix: str = ""
    counted: bool = False  # the last column is a number of calls; rows without a call are left out
    shares: Sequence[Share] | None = None  # of parameters; None where each rank's rows are of its own data

    @property
    def heading(self) -> Heading:
        """All but the rows."""
        return Heading(self.reporter, self.names, self.prefix, self.counted, self.shares)


@dataclass(slots=True)
class StepBuffer:
    """Values of one step: host values by tag, scalar tensors by tag, and rows of probes."""

    values: dict[str, Value] = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    due: Sequence[Reporter] = ()  # the probes that were asked for in this step
    same_data: Sequence[int] = ()  # ranks that computed on the same examples as this one (tensor parallel)
    urgent: bool = False  # the drain thread should see it at once
    void: Tensor | None = None  # a device flag that says the step was skipped: drop what it wrote

    def __bool__(self) -> bool:
        return bool(self.values or self.scalars or self.pieces or self.due)


class Arrived(NamedTuple):
    """A piece whose rows are on the host."""

    heading: Heading
    rows: NDArray[np.float64]


def grouped(arrived: Iterable[Arrived]) -> Mapping[tuple[Reporter, str], list[Arrived]]:
    """The parts of each probe, from several devices, optimizers or sources, by who reports them and the prefix."""
    groups: defaultdict[tuple[Reporter, str], list[Arrived]] = defaultdict(list)
    for part in arrived:
        reporter = part.heading.reporter
        groups[getattr(reporter, "whole", reporter), part.heading.prefix].append(part)
    return groups


def by_reporter(parts: Iterable[Arrived]) -> Mapping[Reporter, tuple[list[str], NDArray[np.float64]]]:
    """Names and rows of each source of one probe, those without any left out. Raises ValueError as `joined` does."""
    groups: defaultdict[Reporter, list[Arrived]] = defaultdict(list)
    for part in parts:
        groups[part.heading.reporter].append(part)
    found = {reporter: joined(some) for reporter, some in groups.items()}
    return {reporter: (names, rows) for reporter, (names, rows) in found.items() if names}


def joined(parts: Sequence[Arrived]) -> tuple[list[str], NDArray[np.float64]]:
    """Parts of one probe as one, without rows that saw no call. Raises ValueError when their widths differ."""
    seen = [seen_rows(part) for part in parts]
    return [name for names, _ in seen for name in names], np.concatenate([rows for _, rows in seen])


def seen_rows(part: Arrived) -> tuple[Sequence[str], NDArray[np.float64]]:
    """Names and rows of what occurred: those that saw no call are left out."""
    heading, rows = part
    if not heading.counted:
        return heading.names, rows
    fired = rows[:, -1] > 0
    return [name for name, there in zip(heading.names, fired, strict=True) if there], rows[fired, :-1]

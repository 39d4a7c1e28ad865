"""Everything that belongs to one step, before it leaves the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
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


@dataclass(slots=True)
class Piece:
    """Rows of one probe on one device: shape (len(names), fields), floating."""

    reporter: Reporter
    names: Sequence[str]
    rows: Tensor
    prefix: str = ""
    counted: bool = False  # the last column is a number of calls; rows without a call are left out


@dataclass(slots=True)
class StepBuffer:
    """Values of one step: host values by tag, scalar tensors by tag, and rows of probes."""

    values: dict[str, Value] = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    due: Sequence[Reporter] = ()  # the probes that were asked for in this step
    void: Tensor | None = None  # a device flag that says the step was skipped: drop what it wrote

    def __bool__(self) -> bool:
        return bool(self.values or self.scalars or self.pieces)


class Joined(NamedTuple):
    """All rows that one reporter gets for a step."""

    reporter: Reporter
    prefix: str
    names: list[str]
    rows: NDArray[np.float64]


def join(pieces: Iterable[tuple[Piece, NDArray[np.float64]]]) -> Iterator[Joined]:
    """The parts of each probe (from several devices or optimizers) as one; without rows that saw no call."""
    parts: defaultdict[tuple[int, str], list[tuple[Piece, NDArray[np.float64]]]] = defaultdict(list)
    for piece, rows in pieces:
        parts[id(piece.reporter), piece.prefix].append((piece, rows))
    for (_, prefix), group in parts.items():
        seen = [_seen(piece, rows) for piece, rows in group]
        names = [name for part, _ in seen for name in part]
        if names:
            yield Joined(group[0][0].reporter, prefix, names, np.concatenate([rows for _, rows in seen]))


def _seen(piece: Piece, rows: NDArray[np.float64]) -> tuple[list[str], NDArray[np.float64]]:
    if not piece.counted:
        return list(piece.names), rows
    fired = rows[:, -1] > 0
    return [name for name, there in zip(piece.names, fired, strict=True) if there], rows[fired, :-1]

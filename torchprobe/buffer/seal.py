"""Closes a step: sends its device values on their way and keeps what is needed to read them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.buffer.lane import Lane, Ticket
from torchprobe.buffer.step import Piece, Reporter, StepBuffer
from torchprobe.records import Value
from torchprobe.statistics.dtypes import row_dtype


@dataclass(slots=True)
class Sealed:
    """A step on its way to the host."""

    step: int
    wall_time: float
    values: dict[str, Value]
    due: Sequence[Reporter]
    transfers: list[tuple[Ticket, list[Piece]]]
    lost: bool = False  # device values that found no room

    def arrive(self) -> list[tuple[Piece, NDArray[np.float64]]]:
        """Wait for the copies; pieces with their host rows."""
        return [pair for ticket, pieces in self.transfers for pair in zip(pieces, ticket.take(), strict=True)]


class Scalars:
    """Reports device scalars under the tags they were logged with."""

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Each name is a tag."""
        yield from zip(names, rows[:, 0].tolist(), strict=True)


class SkippedFlag:
    """Marks the row that says whether a fused optimizer skipped the step."""

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Nothing to show: the reader of the record acts on it."""
        return iter(())


_SCALARS = Scalars()
SKIPPED = SkippedFlag()


class Lanes:
    """The lanes of all devices, made when a device is first seen."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lanes: dict[torch.device, Lane] = {}

    @property
    def crowded(self) -> bool:
        """Whether any device's slots run short."""
        return any(lane.crowded for lane in self._lanes.values())

    def seal(self, step: int, wall_time: float, buffer: StepBuffer) -> Sealed:
        """Start the copies of a step. Rows that find no room are given up, and said to be lost."""
        sealed = Sealed(step, wall_time, buffer.values, buffer.due, [])
        for device, pieces in _by_device(
            [*buffer.pieces, *_scalar_pieces(buffer.scalars), *_flag(buffer.void)]
        ).items():
            ticket = self._lane(device).send([piece.rows for piece in pieces])
            if ticket is None:
                sealed.lost = True
            else:
                sealed.transfers.append((ticket, pieces))
        return sealed

    def _lane(self, device: torch.device) -> Lane:
        if device not in self._lanes:
            self._lanes[device] = Lane(device, self._capacity)
        return self._lanes[device]


def _by_device(pieces: Sequence[Piece]) -> Mapping[torch.device, list[Piece]]:
    groups: defaultdict[torch.device, list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[piece.rows.device].append(piece)
    return groups


def _scalar_pieces(scalars: Mapping[str, Tensor]) -> Iterator[Piece]:
    groups: defaultdict[torch.device, list[str]] = defaultdict(list)
    for tag, value in scalars.items():
        groups[value.device].append(tag)
    for device, tags in groups.items():
        rows = torch.stack([scalars[tag].to(row_dtype(device)).reshape(1) for tag in tags])
        yield Piece(_SCALARS, tags, rows)


def _flag(void: Tensor | None) -> Iterator[Piece]:
    if void is not None:
        yield Piece(SKIPPED, ["skipped"], void.detach().to(row_dtype(void.device)).reshape(1, 1))

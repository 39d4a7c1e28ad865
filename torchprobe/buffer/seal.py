"""Closes a step: sends its device values on their way and keeps what is needed to read them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.buffer.lane import Lane, Ticket, records_graph
from torchprobe.buffer.step import Arrived, Heading, Piece, Reporter, StepBuffer
from torchprobe.records import Value
from torchprobe.statistics.dtypes import row_dtype


@dataclass(slots=True)
class Sealed:
    """A step on its way to the host."""

    step: int
    wall_time: float
    values: dict[str, Value]
    due: Sequence[Reporter] = ()
    same_data: Sequence[int] = ()
    transfers: list[tuple[Ticket, list[Heading]]] = field(default_factory=list)
    lost: bool = False  # device values that found no room

    def arrive(self) -> list[Arrived]:
        """Wait for the copies. Raises what a device raised, once all of them have given back their slots."""
        arrived: list[Arrived] = []
        failure: Exception | None = None
        for ticket, headings in self.transfers:
            try:
                arrived += map(Arrived, headings, ticket.take())
            except Exception as error:  # noqa: PERF203 - one turn a device
                failure = error
        if failure is not None:
            raise failure
        return arrived


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
    """The lanes of all devices, made when a device is first seen.

    capacity: elements under way on each device. A step that is large beside it gets a larger lane, since
    it would seldom find that much room in one run.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lanes: dict[torch.device, Lane] = {}

    @property
    def crowded(self) -> bool:
        """Whether any device's slots run short."""
        return any([lane.crowded for lane in self._lanes.values()])  # noqa: C419 - a generator costs a call a turn

    def seal(self, step: int, wall_time: float, buffer: StepBuffer) -> Sealed:
        """Start the copies of a step. Rows that find no room are given up, and said to be lost.

        So are those of a device whose work the user is recording as a graph.
        """
        sealed = Sealed(step, wall_time, buffer.values, buffer.due, buffer.same_data)
        pieces = [*buffer.pieces, *_scalar_pieces(buffer.scalars), *_flag(buffer.void)]
        for device, group in _by_device(pieces).items():
            ticket = self._send(device, [piece.rows for piece in group])
            if ticket is None:
                sealed.lost = True
            else:
                sealed.transfers.append((ticket, [piece.heading for piece in group]))
        return sealed

    def _send(self, device: torch.device, rows: Sequence[Tensor]) -> Ticket | None:
        if records_graph(device):  # even making a lane would break the graph
            return None
        size = sum(map(Tensor.numel, rows))
        lane = self._lanes.get(device)
        if lane is None or 2 * size > lane.capacity:
            # What is under way in a smaller lane arrives from there.
            lane = self._lanes[device] = Lane(device, max(self._capacity, 4 * size))
        return lane.send(rows)


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

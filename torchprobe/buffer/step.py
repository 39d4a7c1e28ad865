"""Everything that belongs to one step: on its device, on its way, and on the host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.buffer.transfer import Transfer, TransferBuffer, records_graph
from torchprobe.messages import log as _log
from torchprobe.records import Value
from torchprobe.statistics.dtypes import row_dtype


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


class Stage(NamedTuple):  # place and stages, since a tuple has an `index` and a `count` of its own
    """What this rank runs of a pipeline: the stage at a `place`, of so many `stages`, which the `ranks` share.

    names: of modules and parameters, as this rank has them: what they are called in the whole model, as far as this
    rank knows.
    """

    place: int
    stages: int
    ranks: Sequence[int]
    names: Mapping[str, str]
    parameters: Sequence[str]  # as in the whole model


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

    def unscaled(self, scale: float | Tensor) -> Piece:
        """For the loss divided by what it was multiplied with; what is of no gradients on the way there, as it is."""
        reporter: Any = self.reporter
        if getattr(reporter, "source", "") not in ("output_gradients", "micro_gradients"):
            return self
        scale = torch.as_tensor(scale, dtype=self.rows.dtype, device=self.rows.device)
        return replace(self, rows=reporter.unscale(self.rows, scale))


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


@dataclass(slots=True)
class StepInFlight:
    """A step whose device values are being copied to the host."""

    step: int
    wall_time: float
    values: dict[str, Value]
    due: Sequence[Reporter] = ()
    same_data: Sequence[int] = ()
    transfers: list[tuple[Transfer, list[Heading]]] = field(default_factory=list)
    lost: bool = False  # device values that found no room

    def lose(self) -> None:
        """Device values found no room."""
        self.lost = True

    def arrive(self) -> list[Arrived]:
        """Wait for the copies. Raises what a device raised, once all of them have given back their slots."""
        arrived: list[Arrived] = []
        failure: Exception | None = None
        for transfer, headings in self.transfers:
            try:
                arrived += map(Arrived, headings, transfer.take())
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
    """Marks the row that says whether the step was skipped, or how many were before it."""

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Nothing to show: the reader of the record acts on it."""
        return iter(())


_SCALARS = Scalars()
SKIPPED = SkippedFlag()
"""A fused optimizer skipped the step: nothing of it counts."""
SKIPPED_BEFORE = SkippedFlag()
"""Steps whose gradients nobody used, since they were not finite."""


class TransferBuffers:
    """The transfer buffers of all devices, made when a device is first seen.

    capacity: elements under way on each device. A step that is large beside it gets a larger buffer, since
    it would seldom find that much room in one run.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffers: dict[torch.device, TransferBuffer] = {}
        self._odd: set[str] = set()  # what could not be copied and was said

    @property
    def crowded(self) -> bool:
        """Whether any device's slots run short."""
        return any([one.crowded for one in self._buffers.values()])  # noqa: C419 - a generator costs a call a turn

    def send(self, step: int, wall_time: float, content: StepBuffer) -> StepInFlight:
        """Start the copies of a step. Rows that find no room are given up, and said to be lost.

        So are those of a device whose work the user is recording as a graph. Rows that torch cannot copy (complex
        ones, say) are left out alone, with one line in the log. A step of host values alone costs about 1 us.
        """
        sent = StepInFlight(step, wall_time, content.values, content.due, content.same_data)
        if content.pieces or content.scalars or content.void is not None:
            groups: defaultdict[torch.device, list[Piece]] = defaultdict(list)
            for piece in (*content.pieces, *self._scalar_pieces(content.scalars)):
                groups[piece.rows.device].append(piece)
            if (void := content.void) is not None:
                flag = void.detach().to(row_dtype(void.device)).reshape(1, 1)
                groups[void.device].append(Piece(SKIPPED, ["skipped"], flag))
            for device, group in groups.items():
                self._send_group(device, group, sent)
        return sent

    def _send_group(self, device: torch.device, group: Sequence[Piece], sent: StepInFlight) -> None:
        try:
            transfer = self._transfer(device, [piece.rows for piece in group])
        except Exception:
            if len(group) == 1:
                self._say_odd(f"the rows of {type(group[0].reporter).__name__}")
            else:  # one of them is odd: the others go by themselves
                for piece in group:
                    self._send_group(device, [piece], sent)
            return
        if transfer is None:
            sent.lose()
        else:
            sent.transfers.append((transfer, [piece.heading for piece in group]))

    def _transfer(self, device: torch.device, rows: Sequence[Tensor]) -> Transfer | None:
        if device.type == "meta":
            raise TypeError("meta tensors hold no numbers")
        if records_graph(device):  # even making a buffer would break the graph
            return None
        size = sum(map(Tensor.numel, rows))
        buffer = self._buffers.get(device)
        if buffer is None or 2 * size > buffer.capacity:
            # What is under way in a smaller buffer arrives from there.
            buffer = self._buffers[device] = TransferBuffer(device, max(self._capacity, 4 * size))
        return buffer.send(rows)

    def _scalar_pieces(self, scalars: Mapping[str, Tensor]) -> Iterator[Piece]:
        groups: defaultdict[torch.device, dict[str, Tensor]] = defaultdict(dict)
        for tag, value in scalars.items():
            if (row := self._scalar_row(tag, value)) is not None:
                groups[value.device][tag] = row
        for rows in groups.values():
            yield Piece(_SCALARS, list(rows), torch.stack(list(rows.values())))

    def _scalar_row(self, tag: str, value: Tensor) -> Tensor | None:
        try:
            row = value.to(row_dtype(value.device)).reshape(1)
            return row.cpu() if row.is_meta else row  # which raises
        except Exception:
            self._say_odd(tag)
            return None

    def _say_odd(self, what: str) -> None:
        if what not in self._odd:
            self._odd.add(what)
            _log.warning("%s cannot be copied to the host and stays out of the run", what, exc_info=True)

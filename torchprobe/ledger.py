"""Which step a value belongs to: the steps that still take values."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from torchprobe.buffer.outlet import Outlet
from torchprobe.buffer.step import Piece, StepBuffer
from torchprobe.probes.base import Reporter
from torchprobe.records import Value


@dataclass(slots=True)
class Open:
    """A step that takes values: the one that runs now, and the one before it until the next training pass."""

    step: int
    due: tuple[Reporter, ...] = ()
    buffer: StepBuffer = field(default_factory=StepBuffer)

    def put(self, tag: str, value: Value | Tensor) -> None:
        """A value under a tag; of two the later counts."""
        buffer = self.buffer
        if isinstance(value, Tensor):
            buffer.scalars[tag] = value
            buffer.values.pop(tag, None)
        else:
            buffer.values[tag] = value
            buffer.scalars.pop(tag, None)

    def add(self, piece: Piece) -> None:
        """Rows of a probe; those of the same names as the last ones add up, so that memory stays bounded."""
        pieces = self.buffer.pieces
        last = pieces[-1] if pieces else None
        if last is not None and last.heading == piece.heading and last.rows.device == piece.rows.device:
            pieces[-1] = Piece(last.reporter, last.names, last.rows + piece.rows, last.prefix, last.counted)
        else:
            pieces.append(piece)


class Ledger:
    """The running step and the one that has just ended, which takes what is logged after `optimizer.step()`."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self.current = Open(1)
        self._last: Open | None = None

    def last(self, completed: int) -> Open:
        """The step that ended last, opened again when it was handed over already."""
        if self._last is None:
            self._last = Open(completed)
        return self._last

    def resume(self, completed: int) -> None:
        """The next step follows on `completed`; what was put already is its own."""
        self.current.step = completed + 1

    def turn(self) -> None:
        """The running step has ended; the next one begins."""
        self.seal_last()
        self._last, self.current = self.current, Open(self.current.step + 1)

    def reopen_last(self, completed: int) -> None:
        """The step counted last goes on: what came since belongs to it."""
        last, since = self.last(completed), self.current.buffer
        last.buffer.values.update(since.values)
        last.buffer.scalars.update(since.scalars)
        last.buffer.pieces += since.pieces
        self.current, self._last = last, None

    def seal_last(self) -> None:
        """Hand the step that ended last over, as it is."""
        if self._last is not None:
            last, self._last = self._last, None
            self._outlet.hand_over(last.step, last.buffer)

    def seal_all(self) -> None:
        """The end: values of an unfinished step too, but no half statistics."""
        self.seal_last()
        self.current.buffer.pieces.clear()
        self._last = self.current
        self.seal_last()

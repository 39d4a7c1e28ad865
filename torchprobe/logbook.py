"""Steps that the caller counts: what is logged by explicit calls, and its way to the writer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.drain import Drain
from torchprobe.buffer.outlet import Outlet
from torchprobe.buffer.step import Piece, Reporter, TransferBuffers
from torchprobe.capture.gate import no_autocast
from torchprobe.records import Value
from torchprobe.steps.open_step import OpenStep as Open
from torchprobe.writers.protocol import Writer

_SLOTS = 2**18
_FLUSH_EVERY = 100  # steps
_FLUSH_SECONDS = 30.0
VALIDATION = "val"

_log = logging.getLogger("torchprobe")

Combine = Callable[[Tensor, Tensor], Tensor]


@dataclass(slots=True)
class Page(Open):
    """A step that takes values. Rows of one reporter, name and prefix add up, so that memory stays bounded."""

    sums: dict[tuple[Reporter, str, str], tuple[Sequence[str], Tensor]] = field(default_factory=dict)

    def accumulate(
        self, reporter: Reporter, name: str, rows: Tensor, prefix: str, combine: Combine = torch.add
    ) -> None:
        """Rows of shape (several, fields), all under one name, to be added to those of earlier calls."""
        key = (reporter, name, f"{prefix}/" if prefix else "")
        if key in self.sums:
            rows = combine(self.sums[key][1], rows)
        self.sums[key] = ([name] * len(rows), rows)

    def put_all(self, values: Iterable[tuple[str, Value | Tensor]]) -> None:
        """Values under their tags; of two for one tag the later counts."""
        for tag, value in values:
            self.put(tag, value)

    def extend(self, pieces: Iterable[Piece]) -> None:
        """Rows; of one reporter the later ones count."""
        new = list(pieces)
        reporters = {piece.reporter for piece in new}
        self.buffer.pieces = [piece for piece in self.buffer.pieces if piece.reporter not in reporters] + new

    def completed(self) -> Page:
        """With the sums among the pieces."""
        for (reporter, _, prefix), (names, rows) in self.sums.items():
            self.buffer.pieces.append(Piece(reporter, names, rows, prefix))
        self.sums.clear()
        return self


class Logbook:
    """Takes values of the running step, and those of validation for the step that has just ended.

    Nothing here reaches the caller as an exception; what goes wrong is logged once for each kind of call.
    """

    def __init__(self, sink: Writer, descriptions: Mapping[str, str]) -> None:
        decoder = Decoder(descriptions)
        self._outlet = Outlet(TransferBuffers(_SLOTS), Drain(sink, decoder, _FLUSH_SECONDS), decoder, _FLUSH_EVERY)
        self._pid = os.getpid()
        self._closed = False
        self._failed: set[str] = set()
        self._running = Page(1)
        self._ended: Page | None = None

    @property
    def completed(self) -> int:
        """How many steps have ended."""
        return self._running.step - 1

    @property
    def dropped(self) -> int:
        """Steps and records lost so far."""
        return self._outlet.drain.dropped

    def write(self, what: str, fill: Callable[[Page], None], prefix: str = "") -> None:
        """Let `fill` put values into the page of the step that they belong to. Ignored once closed, or in a fork."""
        if os.getpid() != self._pid:
            return
        if self._closed:
            self._complain(what, f"{what} after close() is ignored")
            return
        try:
            with torch.no_grad(), ExitStack() as stack:
                for kind in ("cpu", "cuda"):
                    stack.enter_context(no_autocast(torch.device(kind)))
                fill(self._page(prefix))
        except Exception:
            self._complain(what, f"{what} failed and its values are left out; training goes on", exception=True)

    def turn(self) -> None:
        """The running step has ended; the next one begins."""
        if not self._closed:
            self._hand_over(self._ended)
            self._ended = self._running
        self._running = Page(self._running.step + 1)

    def flush(self, timeout: float | None) -> bool:
        """Write everything, also of the running step. True when it is on disk."""
        if self._closed or os.getpid() != self._pid:
            return False
        running = self._running
        self._hand_over(self._ended)
        self._hand_over(running)
        self._ended, self._running = None, Page(running.step)
        return self._outlet.drain.flush(timeout)

    def close(self, timeout: float | None) -> bool:
        """Write everything and end the thread. Safe to call twice. False when something was left unwritten."""
        if self._closed or os.getpid() != self._pid:
            return True
        self._hand_over(self._ended)
        self._hand_over(self._running)
        self._closed = True
        return self._outlet.drain.close(timeout)

    def _page(self, prefix: str) -> Page:
        """Validation between two steps belongs to the one that has just ended."""
        running = self._running
        if prefix.split("/", 1)[0] != VALIDATION or running.buffer or running.sums:
            return running
        if self._ended is None:
            self._ended = Page(self.completed)
        return self._ended

    def _hand_over(self, page: Page | None) -> None:
        if page is not None:
            self._outlet.hand_over(page.step, page.completed().buffer)

    def _complain(self, what: str, message: str, exception: bool = False) -> None:
        if what not in self._failed:
            self._failed.add(what)
            _log.warning(message, exc_info=exception)

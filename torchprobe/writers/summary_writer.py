"""Records into a SummaryWriter that the user already has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from torchprobe.messages import log as _log
from torchprobe.records import Histogram, HParams, Image, Layout, Outcome, Record, Text, Value
from torchprobe.writers.event_file import encode, trim

_open: WeakValueDictionary[int, SummaryWriterAdapter] = WeakValueDictionary()  # by the identity of the user's writer


class SummaryWriterAdapter:
    """Hands records to the user's `SummaryWriter`, which goes on being the user's.

    Torch's takes a record as one Event; others (tensorboardX, or anything with `add_scalar`) get a
    call per value, and what they have no method for is reported once. The writer is flushed after
    every batch and never closed, and never made to open another file.

    Raises TypeError when `writer` has no `add_scalar`, ValueError, here and in `write`, when it is closed.
    """

    def __init__(self, writer: Any) -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                f"writer={writer!r} has no add_scalar: pass a torch.utils.tensorboard.SummaryWriter "
                "or something that works like it"
            )
        _require_open(writer)
        if id(writer) in _open:
            words = "its tags, such as overview/loss, mix with this one's: pass each a writer or a log_dir of its own"
            _log.warning("writer= is that of another session, too, and %s", words)
        _open[id(writer)] = self
        self._writer = writer
        self._file_writer: Any = None
        self._described: set[str] = set()
        self._takes_events = _takes_events(writer)
        self._missing: set[str] = set()

    def write(self, records: Sequence[Record]) -> None:
        """Pass a batch on and flush it. Raises ValueError when the writer is closed, or what it raises."""
        if not records:
            return
        _require_open(self._writer)
        for record in records:
            if self._takes_events:
                self._add_event(record)
            else:
                self._add_values(record)
        self._flush()

    def close(self) -> None:
        """Flush; closing is the owner's business."""
        _open.pop(id(self._writer), None)
        self._flush()

    def _add_event(self, record: Record) -> None:
        file_writer = self._writer.file_writer
        if file_writer is not self._file_writer:  # its owner closed it and went on in a new file
            self._file_writer, self._described = file_writer, set()
        file_writer.add_event(encode(record, self._described), record.step, record.wall_time)
        self._described.update(record.values)

    def _add_values(self, record: Record) -> None:
        for tag, value in record.values.items():
            name, arguments = _call_for(value)
            method = getattr(self._writer, name, None)
            if method is not None:
                method(tag, *arguments, record.step, record.wall_time)
            elif name not in self._missing:
                self._missing.add(name)
                _log.warning("writer= has no %s: %s and its like are not written", name, tag)

    def _flush(self) -> None:
        flush = getattr(self._writer, "flush", None)
        if flush is not None:
            flush()


def _require_open(writer: Any) -> None:
    # Any add_ method would reopen it: a second file that nobody closes.
    if getattr(writer, "file_writer", writer) is None:
        raise ValueError("the SummaryWriter given as writer= is closed: close it after session.detach()")


def _takes_events(writer: Any) -> bool:
    """Whether TensorBoard's own file writer is inside; tensorboardX's dies of another package's Event."""
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    file_writer = getattr(writer, "file_writer", None)
    return isinstance(getattr(file_writer, "event_writer", None), EventFileWriter)


def _call_for(value: Value) -> tuple[str, tuple[Any, ...]]:
    """The SummaryWriter method for a value, and its arguments between the tag and the step."""
    if isinstance(value, Histogram):
        return "add_histogram_raw", _raw_histogram(trim(value))
    if isinstance(value, Text):
        return "add_text", (value.markdown,)
    if isinstance(value, Image):
        return "add_image", (value.pixels.transpose(2, 0, 1),)
    if isinstance(value, HParams | Outcome | Layout):
        return "add_session_info", ()  # add_hparams would open a second run
    if isinstance(value, np.ndarray):
        return "add_tensor", (torch.from_numpy(value),)
    return "add_scalar", (float(value),)


def _raw_histogram(histogram: Histogram) -> tuple[Any, ...]:
    """Min, max, number, sum, sum of squares (from bucket middles), right edges, counts."""
    edges, counts = histogram.edges, histogram.counts
    middles = (edges[:-1] + edges[1:]) / 2
    sums = (int(counts.sum()), float(middles @ counts), float(middles**2 @ counts))
    return (float(edges[0]), float(edges[-1]), *sums, edges[1:].tolist(), counts.tolist())

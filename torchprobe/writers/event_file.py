"""TensorBoard event files, one Event a record."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_SCALAR,
    DATA_CLASS_TENSOR,
    Summary,
    SummaryMetadata,
)
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_FLOAT, DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_plugin
from tensorboard.plugins.histogram import metadata as histogram_plugin
from tensorboard.plugins.image import metadata as image_plugin
from tensorboard.plugins.scalar import metadata as scalar_plugin
from tensorboard.plugins.text import metadata as text_plugin

from torchprobe.messages import log as _log
from torchprobe.records import Histogram, HParams, Image, Layout, Lines, Outcome, Record, Text, Value, group_of, of_tags
from torchprobe.writers.files import LONGEST, NO_NAME, FaultLog, GrowingFile, bytes_of, place_of
from torchprobe.writers.folding import MOST_TAGS, Folding, Names
from torchprobe.writers.hparams import plugin_data
from torchprobe.writers.tfrecord import frame

_OTHERS = (
    "%s: another writer began %s here, and TensorBoard may show what comes after in one of both alone: give it a "
    "directory of its own, or pass it as writer="
)
ARRAY_PLUGIN = "torchprobe"
"""The plugin name under which arrays are stored; no stock TensorBoard page claims it."""

_NOTHING = np.empty(0, np.float32)
_SCALAR = (scalar_plugin.PLUGIN_NAME, DATA_CLASS_SCALAR)
_PLUGINS: Mapping[type, tuple[str, int]] = {
    Histogram: (histogram_plugin.PLUGIN_NAME, DATA_CLASS_TENSOR),
    Text: (text_plugin.PLUGIN_NAME, DATA_CLASS_TENSOR),
    Image: (image_plugin.PLUGIN_NAME, DATA_CLASS_BLOB_SEQUENCE),
    np.ndarray: (ARRAY_PLUGIN, DATA_CLASS_TENSOR),
    Names: (ARRAY_PLUGIN, DATA_CLASS_TENSOR),
    HParams: ("hparams", DATA_CLASS_TENSOR),  # tensorboard's own constant brings its TensorFlow stub, and boto3
    Outcome: ("hparams", DATA_CLASS_TENSOR),
    Layout: (layout_plugin.PLUGIN_NAME, DATA_CLASS_TENSOR),
}
_NO_SUFFIX = re.compile(rf"[/\\]|{NO_NAME.pattern}")
_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.")


class EventFileWriter:
    """Writes event files in `log_dir`, the first made at once so that a bad directory is reported at once.

    log_dir: a directory, or the URL of one that fsspec can write to (`s3://bucket/run`). A remote file is sent whole
    with every batch, and followed by another one at 4 MiB.

    most_tags: with more, the scalars of layers are written as one tensor a statistic, `per_layer/<statistic>`, since
    TensorBoard holds and shows each tag by itself; None for never. The report and the Probe tab show them all the same.

    An existing file is never appended to: this one's name sorts after all others, whatever the clock says, and a file
    that is deleted, moved away, replaced or cut short by others is followed by a new one, with a line in the log. Every
    file starts its session at the step of its first record, or at `restart_step` (the first step that a resumed run can
    write) for the first file: in TensorBoard that hides what an earlier run left from this step on. `restart` says the
    same later.

    A batch is on disk (in the page cache, not synced), or in the store, when `write` returns. One that does not
    fit leaves the file as it was and raises OSError: write the same batch again later.

    Raises TypeError or ValueError for an argument that does not fit, ImportError for a URL whose package is missing,
    OSError for a directory that cannot be made or written to.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        *,
        filename_suffix: str = "",
        restart_step: int | None = None,
        most_tags: int | None = MOST_TAGS,
    ) -> None:
        self._folding = Folding(_checked("most_tags", most_tags, "a number of tags"))
        self._place = place_of(log_dir)
        _check_suffix(filename_suffix)
        self._suffix = filename_suffix
        self._start_step = _checked("restart_step", restart_step, "a step")
        self._restart: int | None = None
        self._started = False
        self._described: set[str] = set()
        self._scalars = of_tags(Scalars)
        self._files = 0
        self._faults = FaultLog()
        self._alone = True
        self._file = self._create()

    @property
    def path(self) -> Path | str:
        """The file that is being written."""
        return self._file.path

    def write(self, records: Sequence[Record]) -> None:
        """Append a batch, in step order. Raises OSError when it does not fit; then nothing is changed."""
        if not records:
            return
        fault = self._file.fault()
        if fault is not None or self._file.full or (self._restart is not None and self._started):
            self._reopen(fault)
        self._look_for_others()
        if self._restart is not None:
            self._start_step, self._restart = self._restart, None
        described, folding = self._described.copy(), self._folding
        events = [] if self._started else [self._session_start(records[0]).SerializeToString()]
        for record in records:
            folded, folding = folding.fold(record)
            if folded.values.keys() <= described and {*map(type, folded.values.values())} == {float}:
                events.append(self._scalars(tuple(folded.values)).event(folded))
            else:
                events.append(encode(folded, described).SerializeToString())
                described.update(folded.values)
        self._file.append(b"".join(map(frame, events)))
        self._started, self._described, self._folding = True, described, folding
        self._start_step = records[-1].step + 1

    def restart(self, step: int) -> None:
        """What is written from now on belongs to a run that was resumed, and begins at this step."""
        self._restart = step

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        self._file.close()

    def _session_start(self, first: Record) -> Event:
        # The record's time, not the clock's: a retried batch must have the bytes of the first
        # try, part of which a loader that follows the file may have read.
        step = first.step if self._start_step is None else self._start_step
        return Event(wall_time=first.wall_time, step=step, session_log=SessionLog(status=SessionLog.START))

    def _look_for_others(self) -> None:
        """Say once that another writer came to this directory: TensorBoard follows one file, the last by name."""
        mine = self._file.path
        if self._alone and isinstance(mine, Path):
            later = [name for name in self._place.names() if _NAME.match(name) and name not in self._known]
            if later:
                self._alone = False
                _log.warning(_OTHERS, mine.parent, later[0])

    def _reopen(self, fault: str | None) -> None:
        before, self._file = self._file, self._create()
        before.close()
        if fault is not None:
            self._faults.tell(before.path, fault, self._file.path)
        self._started, self._described, self._folding = False, set(), self._folding.reopened()

    def _create(self) -> GrowingFile:
        names = [*self._place.names()]
        newest = max((int(match[1]) for match in map(_NAME.match, names) if match), default=0)
        seconds = max(int(time.time()), newest + 1)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{self._files}{self._suffix}"
        file = self._place.begin(name, frame(_version().SerializeToString()))
        self._files, self._known = self._files + 1, {*names, name}
        return file


def encode(record: Record, described: Collection[str] = ()) -> Event:
    """All values of a record as one Event.

    Tags in `described` go without metadata: TensorBoard reads only a tag's first, and that is most
    of the bytes. Scalars are stored as float32, TensorBoard's only type for them.
    Raises TypeError for a value of a kind that a record cannot hold.
    """
    event = Event(wall_time=record.wall_time, step=record.step)
    entries = event.summary.value
    for tag, value in record.values.items():
        stored = {"simple_value": value} if type(value) is float else _stored(tag, value)
        if tag not in described:
            stored["metadata"] = _metadata(value, record.descriptions.get(group_of(tag), ""))
        entries.add(tag=tag, **stored)
    return event


def _checked(argument: str, value: int | None, takes: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{argument}={value!r}: takes {takes} or None, not {type(value).__name__}")
    return value


def _check_suffix(suffix: str) -> None:
    if not isinstance(suffix, str):
        raise TypeError(f"filename_suffix={suffix!r}: takes a string, not {type(suffix).__name__}")
    if _NO_SUFFIX.search(suffix) or bytes_of(suffix) > LONGEST // 2:
        raise ValueError(f"filename_suffix={suffix!r}: takes a short part of a file's name, without a path separator")


class Scalars:
    """What `encode` makes of floats under tags that are described already, without a call for each: 30 us for 1,000.

    Each number is the last four bytes of its entry, little-endian, as protocol buffers have it.
    """

    def __init__(self, tags: Sequence[str]) -> None:
        entries = [Summary.Value(tag=tag, simple_value=0.0) for tag in tags]
        self._bytes = np.frombuffer(Event(summary=Summary(value=entries)).SerializeToString(), np.uint8).copy()
        ends = np.cumsum([Summary(value=[entry]).ByteSize() for entry in entries])
        self._places = (len(self._bytes) - ends[-1] + ends)[:, None] + np.arange(-4, 0)

    def event(self, record: Record) -> bytes:
        """The Event of a record with these tags and no other."""
        with np.errstate(over="ignore"):  # beyond float32 it is inf there, too
            values = np.fromiter(record.values.values(), "<f4", len(record.values))
        self._bytes[self._places] = values.view(np.uint8).reshape(-1, 4)
        return bytes(Event(wall_time=record.wall_time, step=record.step).SerializeToString() + self._bytes.tobytes())


def trim(histogram: Histogram) -> Histogram:
    """The histogram without its empty outer buckets; with no bucket at all when all are empty."""
    (filled,) = histogram.counts.nonzero()
    first, end = (filled[0], filled[-1] + 1) if filled.size else (0, 0)
    return Histogram(edges=histogram.edges[first : end + 1], counts=histogram.counts[first:end])


def serialized(layout: Layout) -> bytes:
    """The layout's protocol buffer."""
    categories = [
        layout_pb2.Category(title=title, chart=map(_chart, charts)) for title, charts in layout.categories.items()
    ]
    return bytes(layout_pb2.Layout(category=categories).SerializeToString())


def _stored(tag: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Histogram):
        left = trim(value)
        return _tensor(np.array((left.edges[:-1], left.edges[1:], left.counts), np.float64).T, DT_DOUBLE)
    if isinstance(value, Text):
        return _tensor([value.markdown.encode(errors="replace")], DT_STRING, ())
    if isinstance(value, Image):
        height, width, _ = value.pixels.shape
        return _tensor([b"%d" % width, b"%d" % height, value.png()], DT_STRING, (3,))
    if isinstance(value, np.ndarray):
        return _tensor(value.astype(np.float32, copy=False), DT_FLOAT)
    if isinstance(value, Layout):
        return _tensor([serialized(value)], DT_STRING, ())
    if isinstance(value, Names):
        return _tensor([b"%d" % value.start, *(n.encode() for n in value.names)], DT_STRING, (1 + len(value.names),))
    if isinstance(value, HParams | Outcome):
        return _tensor(_NOTHING, DT_FLOAT)  # the page reads the metadata alone
    if not hasattr(value, "__float__"):
        raise TypeError(
            f"record.values[{tag!r}] is a {type(value).__name__}: pass a float, Histogram, Text, Image or float32 array"
        )
    return {"simple_value": float(value)}


def _tensor(values: NDArray[Any] | Sequence[bytes], dtype: int, shape: tuple[int, ...] = ()) -> dict[str, Any]:
    content: dict[str, Any] = {"string_val": values}
    if isinstance(values, np.ndarray):
        shape, content = values.shape, {"tensor_content": values.tobytes()}
    dims = [{"size": size} for size in shape]  # a dict takes a third of the time of a message, which is copied
    return {"tensor": {"dtype": dtype, "tensor_shape": {"dim": dims}, **content}}


def _chart(chart: Any) -> Any:
    if isinstance(chart, Lines):
        return layout_pb2.Chart(title=chart.title, multiline=layout_pb2.MultilineChartContent(tag=chart.patterns))
    series = [
        layout_pb2.MarginChartContent.Series(value=line, lower=lower, upper=upper)
        for line, lower, upper in chart.series
    ]
    return layout_pb2.Chart(title=chart.title, margin=layout_pb2.MarginChartContent(series=series))


def _metadata(value: Value, description: str) -> Any:
    """The data class is explicit: TensorBoard's Rust loader else drops arrays and scalars' descriptions."""
    plugin_name, data_class = next((row for kind, row in _PLUGINS.items() if isinstance(value, kind)), _SCALAR)
    content = plugin_data(value) if isinstance(value, HParams | Outcome) else b""
    return SummaryMetadata(
        summary_description=description,
        plugin_data=SummaryMetadata.PluginData(plugin_name=plugin_name, content=content),
        data_class=data_class,
    )


def _version() -> Event:
    source = SourceMetadata(writer="torchprobe")
    return Event(wall_time=time.time(), file_version="brain.Event:2", source_metadata=source)

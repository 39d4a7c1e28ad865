"""Records to TensorBoard's Event protocol buffers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_SCALAR,
    DATA_CLASS_TENSOR,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_FLOAT, DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_plugin
from tensorboard.plugins.histogram import metadata as histogram_plugin
from tensorboard.plugins.hparams import metadata as hparams_plugin
from tensorboard.plugins.image import metadata as image_plugin
from tensorboard.plugins.scalar import metadata as scalar_plugin
from tensorboard.plugins.text import metadata as text_plugin

from torchprobe.records import Histogram, HParams, Image, Layout, Lines, Margin, Outcome, Record, Text, Value, group_of
from torchprobe.writers.hparams import plugin_data

ARRAY_PLUGIN = "torchprobe"
"""The plugin name under which arrays are stored; no stock TensorBoard page claims it."""

_NOTHING = np.empty(0, np.float32)
_SCALAR = (scalar_plugin.PLUGIN_NAME, DATA_CLASS_SCALAR)
_PLUGINS: Mapping[type, tuple[str, int]] = {
    Histogram: (histogram_plugin.PLUGIN_NAME, DATA_CLASS_TENSOR),
    Text: (text_plugin.PLUGIN_NAME, DATA_CLASS_TENSOR),
    Image: (image_plugin.PLUGIN_NAME, DATA_CLASS_BLOB_SEQUENCE),
    np.ndarray: (ARRAY_PLUGIN, DATA_CLASS_TENSOR),
    HParams: (hparams_plugin.PLUGIN_NAME, DATA_CLASS_TENSOR),
    Outcome: (hparams_plugin.PLUGIN_NAME, DATA_CLASS_TENSOR),
    Layout: (layout_plugin.PLUGIN_NAME, DATA_CLASS_TENSOR),
}


def encode(record: Record, described: Collection[str] = ()) -> Event:
    """All values of a record as one Event.

    Tags in `described` go without metadata: TensorBoard reads only a tag's first, and that is most
    of the bytes. Scalars are stored as float32, TensorBoard's only type for them.
    Raises TypeError for a value of a kind that a record cannot hold.
    """
    event = Event(wall_time=record.wall_time, step=record.step)
    entries = event.summary.value
    for tag, value in record.values.items():
        entry = entries.add()
        entry.tag = tag
        if type(value) is float:
            entry.simple_value = value
        else:
            _store(entry, value)
        if tag not in described:
            entry.metadata.CopyFrom(_metadata(value, record.descriptions.get(group_of(tag), "")))
    return event


def trim(histogram: Histogram) -> Histogram:
    """The histogram without its empty outer buckets; with no bucket at all when all are empty."""
    (filled,) = histogram.counts.nonzero()
    if not filled.size:
        return Histogram(edges=histogram.edges[:1], counts=histogram.counts[:0])
    first, end = filled[0], filled[-1] + 1
    return Histogram(edges=histogram.edges[first : end + 1], counts=histogram.counts[first:end])


def serialized(layout: Layout) -> bytes:
    """The layout's protocol buffer."""
    categories = [
        layout_pb2.Category(title=title, chart=[_chart(chart) for chart in charts])
        for title, charts in layout.categories.items()
    ]
    return bytes(layout_pb2.Layout(category=categories).SerializeToString())


def _store(entry: Any, value: Value) -> None:
    if isinstance(value, Histogram):
        entry.tensor.CopyFrom(_numeric(_rows(trim(value)), DT_DOUBLE))
    elif isinstance(value, Text):
        entry.tensor.CopyFrom(_strings([value.markdown.encode(errors="replace")], shape=()))
    elif isinstance(value, Image):
        height, width, _ = value.pixels.shape
        parts = [b"%d" % width, b"%d" % height, value.png()]
        entry.tensor.CopyFrom(_strings(parts, shape=(3,)))
    elif isinstance(value, np.ndarray):
        entry.tensor.CopyFrom(_numeric(value.astype(np.float32, copy=False), DT_FLOAT))
    elif isinstance(value, Layout):
        entry.tensor.CopyFrom(_strings([serialized(value)], shape=()))
    elif isinstance(value, HParams | Outcome):
        entry.tensor.CopyFrom(_numeric(_NOTHING, DT_FLOAT))  # the page reads the metadata alone
    else:
        entry.simple_value = _scalar(entry.tag, value)


def _scalar(tag: str, value: Any) -> float:
    if not hasattr(value, "__float__"):
        raise TypeError(
            f"record.values[{tag!r}] is a {type(value).__name__}: pass a float, Histogram, Text, Image or float32 array"
        )
    return float(value)


def _rows(histogram: Histogram) -> NDArray[np.float64]:
    """TensorBoard's form, float64 of shape (buckets, 3): left edge, right edge, count."""
    rows = np.empty((len(histogram.counts), 3))
    rows[:, 0], rows[:, 1], rows[:, 2] = histogram.edges[:-1], histogram.edges[1:], histogram.counts
    return rows


def _numeric(array: NDArray[Any], dtype: int) -> Any:
    return TensorProto(dtype=dtype, tensor_shape=_shape(array.shape), tensor_content=array.tobytes())


def _strings(parts: Sequence[bytes], shape: tuple[int, ...]) -> Any:
    return TensorProto(dtype=DT_STRING, tensor_shape=_shape(shape), string_val=parts)


def _shape(sizes: tuple[int, ...]) -> Any:
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in sizes])


def _chart(chart: Lines | Margin) -> Any:
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

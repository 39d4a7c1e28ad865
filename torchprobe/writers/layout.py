"""A layout of charts in the form that TensorBoard's Custom Scalars page reads."""

from __future__ import annotations

from typing import Any

from tensorboard.plugins.custom_scalar import layout_pb2

from torchprobe.records import Layout, Lines, Margin


def serialized(layout: Layout) -> bytes:
    """The layout's protocol buffer."""
    categories = [
        layout_pb2.Category(title=title, chart=[_chart(chart) for chart in charts])
        for title, charts in layout.categories.items()
    ]
    return bytes(layout_pb2.Layout(category=categories).SerializeToString())


def _chart(chart: Lines | Margin) -> Any:
    if isinstance(chart, Lines):
        return layout_pb2.Chart(title=chart.title, multiline=layout_pb2.MultilineChartContent(tag=chart.patterns))
    series = [
        layout_pb2.MarginChartContent.Series(value=line, lower=lower, upper=upper)
        for line, lower, upper in chart.series
    ]
    return layout_pb2.Chart(title=chart.title, margin=layout_pb2.MarginChartContent(series=series))

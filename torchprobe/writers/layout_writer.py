"""Adds to a run what makes the Custom Scalars page useful: bands over the layers, and the layout of its charts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from numbers import Real

from torchprobe.records import Layout, Record, Value
from torchprobe.writers import bands
from torchprobe.writers.charts import CHARTED, layout_of
from torchprobe.writers.protocol import Writer

LAYOUT_TAG = "custom_scalars__config__"


class LayoutWriter:
    """Wraps a writer of event files.

    The page shows a run's latest layout, so one goes out with the first step and again with each step that brings
    a new kind of chart, such as the first validation. What is added to a record depends on the records before it
    alone: a batch that is written again has the same bytes.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._seen: frozenset[str] = frozenset()  # tags of all records that were written
        self._charted: frozenset[str] = frozenset()  # those of them that belong to a chart
        self._layout = Layout({})

    def write(self, records: Sequence[Record]) -> None:
        """Pass a batch on, with bands and layouts. What the wrapped writer raises, with nothing changed."""
        before = self._seen, self._charted, self._layout
        try:
            self._writer.write([self._completed(record) for record in records])
        except BaseException:
            self._seen, self._charted, self._layout = before
            raise

    def close(self) -> None:
        """Close the wrapped writer."""
        self._writer.close()

    def _completed(self, record: Record) -> Record:
        extra: dict[str, Value] = dict(bands.bands(record))
        values = {**record.values, **extra}
        new = values.keys() - self._seen
        if new:
            self._seen = self._seen.union(new)
            charted = {tag for tag in new if isinstance(values[tag], Real) and CHARTED.match(tag)}
            extra |= self._new_layout(charted)
        if not extra:
            return record
        descriptions = {**record.descriptions, bands.GROUP: bands.DESCRIPTION}
        return dataclasses.replace(record, values={**record.values, **extra}, descriptions=descriptions)

    def _new_layout(self, tags: set[str]) -> dict[str, Value]:
        """The layout with these tags too, if it is another one."""
        self._charted = self._charted.union(tags)
        layout = layout_of(self._charted) if tags else self._layout
        if layout == self._layout:
            return {}
        self._layout = layout
        return {LAYOUT_TAG: layout}

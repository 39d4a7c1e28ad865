"""Scalars of many layers as one tensor a statistic: TensorBoard holds each tag by itself, and drowns in thousands."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from torchprobe.messages import log as _log
from torchprobe.records import Record, Value, group_of

FOLDED = "per_layer"
"""The first part of the tags of such tensors."""
NAMES = f"{FOLDED}/names"
DESCRIPTION = "All layers' values of a statistic in one tensor: the places of their names, and the values."
MOST_TAGS = 5_000
_MANY = 32  # layers of a statistic: of fewer TensorBoard shows each


class Names(NamedTuple):
    """Names of layers, the first of which has the place `start` in the list that a file's tensors point into."""

    start: int
    names: tuple[str, ...]


class Folding(NamedTuple):
    """What a file has so far. Nothing here changes in place: a batch that is written again is folded as before.

    most: tags above which the scalars of layers are folded, None for never. seen: tags until then. places: of layers in
    the list of names, which grows. told: names that the file has.
    """

    most: int | None = MOST_TAGS
    seen: frozenset[str] = frozenset()
    places: Mapping[str, int] = {}
    told: int = 0
    on: bool = False

    def reopened(self) -> Folding:
        """For a new file."""
        return self._replace(told=0)

    def fold(self, record: Record) -> tuple[Record, Folding]:
        """The record as it is to be written, and what comes after it."""
        after = self if self.on or self.most is None else self._counted(record)
        return after._folded(record) if after.on else (record, after)

    def _counted(self, record: Record) -> Folding:
        if record.values.keys() <= self.seen:
            return self
        seen = self.seen.union(record.values)
        if self.most is None or len(seen) <= self.most:
            return self._replace(seen=seen)
        _say(len(seen), record.step)
        return self._replace(seen=frozenset(), on=True)

    def _folded(self, record: Record) -> tuple[Record, Folding]:
        layers: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for tag, value in record.values.items():
            statistic = _statistic(tag)
            if statistic and type(value) is float and group_of(tag) in record.descriptions:
                layers[statistic][tag[len(statistic) + 1 :]] = value
        many = {statistic: found for statistic, found in layers.items() if len(found) >= _MANY}
        if not many:
            return record, self
        new = dict.fromkeys(name for found in many.values() for name in found if name not in self.places)
        places = {**self.places, **dict(zip(new, range(len(self.places), len(self.places) + len(new)), strict=True))}
        values: dict[str, Value] = {tag: v for tag, v in record.values.items() if _statistic(tag) not in many}
        if len(places) > self.told:
            values[NAMES] = cast("Value", Names(self.told, tuple(places)[self.told :]))  # for event files alone
        values.update((f"{FOLDED}/{statistic}", _tensor(places, found)) for statistic, found in many.items())
        descriptions = {**record.descriptions, FOLDED: DESCRIPTION}
        folded = dataclasses.replace(record, values=values, descriptions=descriptions)
        return folded, self._replace(places=places, told=len(places))


def unfolded(tag: str, names: list[str], tensor: NDArray[np.float32]) -> list[tuple[str, float]]:
    """The tags and values that a tensor holds; none where it is not one of these."""
    statistic = tag.removeprefix(f"{FOLDED}/")
    if statistic == tag or tensor.ndim != 2 or len(tensor) != 2:
        return []
    return [(f"{statistic}/{names[int(place)]}", float(value)) for place, value in tensor.T]


def _statistic(tag: str) -> str:
    """`val/grad_norm` of `val/grad_norm/fc.weight`; nothing where no layer follows."""
    start = len("val/") if tag.startswith("val/") else 0
    end = tag.find("/", start)
    return tag[:end] if end > 0 else ""


def _tensor(places: Mapping[str, int], found: Mapping[str, float]) -> NDArray[np.float32]:
    return np.array([[places[name] for name in found], list(found.values())], np.float32)


def _say(tags: int, step: int) -> None:
    _log.warning(
        "the run has %d tags: from step %d on the scalars of layers are written as one tensor a statistic, which "
        "`torchprobe report` and the Probe tab show, and TensorBoard's page of scalars does not. "
        "writer=torchprobe.EventFileWriter(log_dir, most_tags=None) writes each by itself",
        tags,
        step,
    )

"""The event files of a run, read as they grow: scalars, texts, pictures, matrices of our own, hyperparameters."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unicodedata import bidirectional, category

import numpy as np
from numpy.typing import NDArray

from torchprobe.writers.folding import NAMES, unfolded
from torchprobe.writers.hparams import FINAL, START_TAG, read_hparams
from torchprobe.writers.tfrecord import records_of

EVENTS = "*tfevents*"
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # categories of Unicode
_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # what comes after, or up to there
_MOST_PICTURES = 40  # of a tag: of more every second one is left out
_PLUGIN = "torchprobe"  # what our own matrices are marked with


def visible(text: str) -> str:
    """Text from a file in one line: what a terminal would obey, ends of lines, and halves of pairs as escapes."""
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _is_obeyed(c) else c for c in text)


def _is_obeyed(character: str) -> bool:
    return category(character) in _UNSEEN or bidirectional(character) in _TURNING


@dataclass(frozen=True, slots=True)
class Series:
    """One scalar tag. steps: int64, not decreasing; values and wall_times (seconds since the epoch): float64."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    wall_times: NDArray[np.float64]

    def until(self, step: int) -> Series:
        """The points up to a step; the first one where all come later."""
        count = max(int(np.searchsorted(self.steps, step, side="right")), 1)
        return Series(self.steps[:count], self.values[:count], self.wall_times[:count])

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])

    @property
    def finite(self) -> NDArray[np.float64]:
        """The values that are neither NaN nor inf."""
        return _finite(self.values)

    @property
    def settled(self) -> float:
        """Median of the last tenth, which one outlier does not move; NaN when no value is finite."""
        finite = _finite(self.values[-max(1, len(self.values) // 10) :])
        return float(np.median(finite)) if finite.size else float("nan")

    @property
    def spread(self) -> float:
        """Standard deviation of the second half: what is noise rather than a level."""
        finite = _finite(self.values[len(self.values) // 2 :])
        return float(finite.std()) if finite.size else 0.0


class EventFiles:
    """The event files of one folder: each `update` reads what was written since the last one.

    contents: all that was read, without what is damaged; read anew when a file is gone or shorter than it was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.contents = Contents()
        self._read: dict[Path, int] = {}
        self._rest: dict[Path, int] = {}

    def update(self) -> bool:
        """Whether there was anything new."""
        files = event_files(self.path)
        sizes = {file: file.stat().st_size for file in files}
        if any(sizes.get(file, -1) < offset for file, offset in self._read.items()):
            self.contents, self._read = Contents(), {}
        before = self.contents.events
        for file in files:
            self._take(file, sizes[file])
        return self.contents.events != before

    @property
    def unread(self) -> list[str]:
        """What is there and could not be read."""
        torn = [f"the last {left} bytes of {visible(file.name)}" for file, left in self._rest.items() if left]
        return [*self.contents.unread, *torn]

    def _take(self, file: Path, size: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        offset = self._read.get(file, 0)
        with file.open("rb") as opened:
            opened.seek(offset)
            for record in records_of(opened):
                offset = opened.tell()
                try:
                    self.contents.take(Event.FromString(record))
                except Exception:  # damaged, or of another program: it is named, and all else is read
                    self.contents.unread[visible(f"a record of {file.name}")] = None
        self._read[file], self._rest[file] = offset, max(size - offset, 0)


class Contents:
    """What event files hold, in the order of writing; events: how many there were."""

    def __init__(self) -> None:
        self.events = 0
        self.scalars: dict[str, list[tuple[int, float, float]]] = {}
        self.texts: dict[str, list[tuple[int, str]]] = {}
        self.images: dict[str, list[tuple[int, bytes]]] = {}
        self.tensors: dict[str, list[tuple[int, NDArray[np.float32]]]] = {}
        self.hparams: dict[str, Any] = {}
        self.unread: dict[str, None] = {}
        self._kinds: dict[str, tuple[str, str]] = {}  # a tag's first value says which page shows it
        self._series: dict[str, tuple[int, Series]] = {}
        self._layers: list[str] = []

    def series(self, tag: str) -> Series:
        """The points of a scalar; of two values for one step the later counts."""
        points = self.scalars[tag]
        count, series = self._series.get(tag, (0, None))
        if series is None or count != len(points):
            series = _series(points)
            self._series[tag] = len(points), series
        return series

    def take(self, event: Any) -> None:
        """Add an event's values. A program that goes on from an earlier step takes back what came after that."""
        self.events += 1
        if event.session_log.status == event.session_log.START:
            self._take_back(event.step)
        for value in event.summary.value:
            try:
                self._take(event, value)
            except Exception:  # noqa: PERF203 - damaged, or of another program: it is named, and all else is read
                self.unread[visible(f"a value of {value.tag}")] = None

    def _take_back(self, step: int) -> None:
        self._series.clear()
        kinds: tuple[dict[str, list[Any]], ...] = (self.scalars, self.texts, self.images, self.tensors)
        for kept in kinds:
            for tag in list(kept):
                before = [point for point in kept[tag] if point[0] < step]
                kept[tag][:] = before
                if not before:
                    del kept[tag]

    def _take(self, event: Any, value: Any) -> None:
        if value.tag not in self._kinds:
            self._kinds[value.tag] = visible(value.tag), value.metadata.plugin_data.plugin_name
        tag, plugin = self._kinds[value.tag]
        if tag == START_TAG:
            self.hparams = _seen_hparams(value.metadata.plugin_data.content)
        elif plugin == "text":
            self._text(tag, event.step, value)
        elif plugin == "images":
            self._image(tag, event.step, value)
        elif plugin == _PLUGIN and tag == NAMES:
            start, *names = [part.decode(errors="replace") for part in value.tensor.string_val]
            self._layers[int(start) :] = map(visible, names)
        elif plugin == _PLUGIN:
            self._tensor(tag, event, value)
        elif (plugin == "scalars" or value.HasField("simple_value")) and not tag.startswith(f"{FINAL}/"):
            point = event.step, _number(value), event.wall_time
            self.scalars.setdefault(tag, []).append(point)

    def _text(self, tag: str, step: int, value: Any) -> None:
        lines = [
            visible(line) for part in value.tensor.string_val for line in part.decode(errors="replace").split("\n")
        ]
        if lines:
            self.texts.setdefault(tag, []).append((step, "\n".join(lines)))

    def _tensor(self, tag: str, event: Any, value: Any) -> None:
        """Raises for what is no array of numbers."""
        from tensorboard.util.tensor_util import make_ndarray

        matrix = np.asarray(make_ndarray(value.tensor), np.float32)
        layers = unfolded(tag, self._layers, matrix)
        for scalar, number in layers:
            self.scalars.setdefault(scalar, []).append((event.step, number, event.wall_time))
        if not layers:
            self.tensors.setdefault(tag, []).append((event.step, matrix))

    def _image(self, tag: str, step: int, value: Any) -> None:
        picture = step, bytes(value.tensor.string_val[2])  # after its width and height
        pictures = self.images.setdefault(tag, [])
        pictures.append(picture)
        if len(pictures) > _MOST_PICTURES:
            del pictures[1:-1:2]


def _seen_hparams(content: bytes) -> dict[str, Any]:
    found = read_hparams(content)
    return {visible(name): visible(value) if isinstance(value, str) else value for name, value in found.items()}


def _number(value: Any) -> float:
    """Raises for what is no single number."""
    from tensorboard.util.tensor_util import make_ndarray

    if value.HasField("simple_value"):
        return float(value.simple_value)
    if len(value.tensor.float_val) == 1 and not value.tensor.tensor_shape.dim:
        return float(value.tensor.float_val[0])
    if any(dimension.size != 1 for dimension in value.tensor.tensor_shape.dim):
        raise ValueError("of another shape")
    array = make_ndarray(value.tensor)
    if array.dtype.kind == "O":
        raise TypeError("a text")
    return float(array.item())


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def _series(points: list[tuple[int, float, float]]) -> Series:
    latest = {step: (value, time) for step, value, time in points}
    steps = sorted(latest)
    values, times = zip(*(latest[step] for step in steps), strict=True)
    return Series(np.array(steps, np.int64), np.array(values, np.float64), np.array(times, np.float64))


def regular(files: Iterable[Path]) -> list[Path]:
    """Sorted; no pipe, at which a reader would wait for ever, and no link to nothing."""
    return sorted(filter(Path.is_file, files))


def event_files_below(folder: Path | str) -> list[Path]:
    """At or below a folder, through links as TensorBoard goes; a folder that two ways lead to counts once."""
    found: dict[str, list[Path]] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in found:
            folders.clear()
        found.setdefault(real, [Path(place, name) for name in names if fnmatch(name, EVENTS)])
        folders.sort(key=lambda name: Path(place, name).is_symlink())
    return regular(file for files in found.values() for file in files)


def event_files(folder: Path) -> list[Path]:
    """Those of one run, in the order of their names, which hold the time."""
    return regular(folder.glob(EVENTS))

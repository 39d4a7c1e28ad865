"""A recorded run, read back from its event files, also from a remote store."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from posixpath import basename, dirname
from typing import Any, TypeVar
from unicodedata import category

import numpy as np
from numpy.typing import NDArray

from torchprobe.writers.files import located
from torchprobe.writers.hparams import FINAL, START_TAG, read_hparams
from torchprobe.writers.remote import filesystem_of

_T = TypeVar("_T", tuple[int, str], tuple[int, float, float])
_EVENTS = "*tfevents*"
_FRAME = 16  # bytes around a record of an event file
_FLIGHT = {"step": int, "reason": str, "alert": dict, "alerts": list, "exception": str}  # what is shown of a recording
_UNSEEN = ("Cc", "Cs")  # categories of Unicode
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")  # as stores call it


def visible(text: str) -> str:
    """Text from a file in one line: control characters, which a terminal would obey, and halves of pairs as escapes."""
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if category(c) in _UNSEEN else c for c in text)


class NoRunError(ValueError):
    """There is no run where one was looked for; the message says what is there, and what to do."""


@dataclass(frozen=True, slots=True)
class Series:
    """One scalar tag. steps: int64, not decreasing; values and wall_times (seconds since the epoch): float64."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    wall_times: NDArray[np.float64]

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])

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


@dataclass(frozen=True, slots=True)
class Run:
    """All scalars by tag, all texts by tag as (step, Markdown), the flight recorder's files, and hyperparameters.

    path is a str for a URL. The final metrics of the HParams page, which repeat others, are left out. unread: what is
    there and could not be read, each of which costs itself alone.
    """

    path: Path | str
    scalars: dict[str, Series]
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    flights: list[dict[str, Any]] = field(default_factory=list)
    hparams: dict[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def group(self, name: str) -> dict[str, Series]:
        """The series of a tag group, by what follows it: `grad_norm` gives {"fc.weight": ...}."""
        start = f"{name}/"
        return {tag.removeprefix(start): series for tag, series in self.scalars.items() if tag.startswith(start)}

    @property
    def steps(self) -> int:
        """The last step of which anything is known."""
        return max((int(series.steps[-1]) for series in self.scalars.values()), default=0)

    @property
    def times(self) -> tuple[float, float]:
        """When the first and the last value were written, in seconds since the epoch; 0 when nobody knows."""
        ends = [time for series in self.scalars.values() for time in (series.wall_times[0], series.wall_times[-1])]
        known = _finite(np.array(ends, np.float64))
        return (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)

    @property
    def seconds(self) -> float:
        """Wall time between the first and the last value."""
        first, last = self.times
        return last - first


def newest_run(folder: Path) -> Path:
    """The folder itself when it holds event files, else the one below it that was written last.

    Raises NoRunError when there is none.
    """
    if not folder.is_dir():
        raise NoRunError(f"'{folder}' is not a folder; name a run, such as runs/exp1, or a folder of runs")
    files = _event_files(folder) or sorted(_regular(folder.rglob(_EVENTS)), key=lambda f: f.stat().st_mtime)
    if not files:
        raise NoRunError(f"no run is recorded in '{folder}' (it holds no TensorBoard event file)")
    return files[-1].parent


def read_run(where: Path | str) -> Run:
    """Read the event files of a run, all points of them, with TensorBoard's own reader; what is damaged is left out.

    where: the run's folder or URL, or one above it, of which the newest run is taken. Raises NoRunError; for a URL also
    what `copied` raises.
    """
    place = located(where)
    if isinstance(place, Path):
        return _read(newest_run(place))
    with copied(place) as (folder, url):
        if not _event_files(folder):
            raise NoRunError(f"no run is recorded in '{url}' (it holds no TensorBoard event file)")
        run = _read(folder)
    flights = [{**flight, "file": f"{url}/flight/{Path(flight['file']).name}"} for flight in run.flights]
    return replace(run, path=url, flights=flights)


def _regular(files: Iterable[Path]) -> list[Path]:
    """Sorted; no pipe, at which a reader would wait for ever, and no link to nothing."""
    return sorted(filter(Path.is_file, files))


def _event_files(folder: Path) -> list[Path]:
    return _regular(folder.glob(_EVENTS))


def _read(path: Path) -> Run:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    contents = _Contents()
    for file in _event_files(path):
        left = file.stat().st_size
        for record in RawEventFileLoader(str(file)).Load():
            left -= len(record) + _FRAME
            with contents.naming(f"a record of {file.name}"):
                contents.take(Event.FromString(record))
        if left > 0:
            contents.unread[f"the last {left} bytes of {visible(file.name)}"] = None
    flights = []
    for file in _regular((path / "flight").glob("*.json")):
        with contents.naming(f"flight/{file.name}"):
            flights.append(_flight(file))
    series = {tag: _series(points) for tag, points in contents.scalars.items()}
    return Run(path, series, contents.texts, flights, contents.hparams, list(contents.unread))


class _Contents:
    """What event files hold, in the order of writing."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float, float]]] = {}
        self.texts: dict[str, list[tuple[int, str]]] = {}
        self.hparams: dict[str, Any] = {}
        self.unread: dict[str, None] = {}
        self._plugins: dict[str, str] = {}  # a tag's first value says which page shows it

    @contextmanager
    def naming(self, what: str) -> Iterator[None]:
        """What raises inside is damaged, or of another program: it is named, and all else is read."""
        try:
            yield
        except Exception:
            self.unread[visible(what)] = None

    def take(self, event: Any) -> None:
        """Add an event's values. A program that goes on from an earlier step takes back what came after that."""
        if event.session_log.status == event.session_log.START:
            self.scalars = _before(event.step, self.scalars)
            self.texts = _before(event.step, self.texts)
        for value in event.summary.value:
            with self.naming(f"a value of {value.tag}"):
                self._take(event, value)

    def _take(self, event: Any, value: Any) -> None:
        tag, data = visible(value.tag), value.metadata.plugin_data
        plugin = self._plugins.setdefault(tag, data.plugin_name)
        if tag == START_TAG:
            self.hparams = {
                visible(name): visible(hparam) if isinstance(hparam, str) else hparam
                for name, hparam in read_hparams(data.content).items()
            }
        elif plugin == "text":
            lines = [
                visible(line) for part in value.tensor.string_val for line in part.decode(errors="replace").split("\n")
            ]
            if lines:
                self.texts.setdefault(tag, []).append((event.step, "\n".join(lines)))
        elif (plugin == "scalars" or value.HasField("simple_value")) and not tag.startswith(f"{FINAL}/"):
            point = (event.step, _number(value), event.wall_time)
            self.scalars.setdefault(tag, []).append(point)


def _before(step: int, points: dict[str, list[_T]]) -> dict[str, list[_T]]:
    kept = {tag: [point for point in of_tag if point[0] < step] for tag, of_tag in points.items()}
    return {tag: of_tag for tag, of_tag in kept.items() if of_tag}


def _number(value: Any) -> float:
    """Raises for what is no single number."""
    from tensorboard.util.tensor_util import make_ndarray

    if value.HasField("simple_value"):
        return float(value.simple_value)
    if any(dimension.size != 1 for dimension in value.tensor.tensor_shape.dim):
        raise ValueError("of another shape")
    array = make_ndarray(value.tensor)
    if array.dtype.kind == "O":
        raise TypeError("a text")
    return float(array.item())


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def _series(points: list[tuple[int, float, float]]) -> Series:
    """Of two values for one step the later counts."""
    latest = {step: (value, time) for step, value, time in points}
    steps = sorted(latest)
    values, times = zip(*(latest[step] for step in steps), strict=True)
    return Series(np.array(steps, np.int64), np.array(values, np.float64), np.array(times, np.float64))


def _flight(file: Path) -> dict[str, Any]:
    """What is known of a recording, with its file's name. Raises for one that is half written or foreign."""
    content = json.loads(
        file.read_text(encoding="utf-8"),
        parse_float=lambda text: number if math.isfinite(number := float(text)) else None,
        parse_constant=lambda text: None,
    )
    if not isinstance(content, dict):
        raise TypeError("no recording")
    known = {key: content[key] for key, kind in _FLIGHT.items() if isinstance(content.get(key), kind)}
    if "alerts" in known:
        known["alerts"] = [alert for alert in known["alerts"] if isinstance(alert, dict)]
    return {"file": str(file), **known}


@contextmanager
def copied(url: str) -> Iterator[tuple[Path, str]]:
    """A local folder with the files of the newest run at or below a URL, and that run's own URL.

    The folder is empty when there is no run, and gone afterwards. Raises OSError for a store that cannot be read,
    ImportError or ValueError for a URL that fsspec cannot open.
    """
    store = filesystem_of(url, "")
    with tempfile.TemporaryDirectory(prefix="torchprobe-") as folder:
        try:
            run = _fetch(store, url, Path(folder))
        except Exception as error:  # stores have exceptions of their own
            raise OSError(f"{url!r} cannot be read: {str(error) or type(error).__name__}") from error
        yield Path(folder), run


def _fetch(store: Any, url: str, folder: Path) -> str:
    root = store._strip_protocol(url).rstrip("/")
    paths: dict[str, Any] = store.find(url, detail=True)
    run = _newest(root, {path: details for path, details in paths.items() if "tfevents" in basename(path)})
    (folder / "flight").mkdir()
    for path in paths:
        if dirname(path) == run and "tfevents" in basename(path):
            store.get_file(path, str(folder / basename(path)))
        elif dirname(path) == f"{run}/flight":
            store.get_file(path, str(folder / "flight" / basename(path)))
    return url + run[len(root) :]


def _newest(root: str, event_files: Mapping[str, Mapping[str, Any]]) -> str:
    """The root itself when it holds event files, else the folder of the one that was written last."""
    if any(dirname(path) == root for path in event_files):
        return root
    return dirname(max(event_files, key=lambda path: (_written(event_files[path]), basename(path)), default=f"{root}/"))


def _written(details: Mapping[str, Any]) -> str:
    """When, in a form that sorts; empty where a store does not say: then names decide, which hold a time too."""
    return next((str(details[key]) for key in _TIMES if details.get(key)), "")

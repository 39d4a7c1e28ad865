"""A recorded run, read back from its event files, also from a remote store."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from posixpath import basename, dirname
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchprobe.reports.events import EventFiles, Series, event_files, event_files_below, regular, visible
from torchprobe.writers.files import located
from torchprobe.writers.remote import filesystem_of

_FLIGHT = {"step": int, "reason": str, "alert": dict, "alerts": list, "exception": str}  # what is shown of a recording
_LATEST = 2.0**38  # seconds since the epoch: the year 10680
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")  # as stores call it


class NoRunError(ValueError):
    """There is no run where one was looked for; the message says what is there, and what to do."""


@dataclass(frozen=True, slots=True)
class Run:
    """All scalars by tag, all texts by tag as (step, Markdown), the flight recorder's files, and hyperparameters.

    path is a str for a URL. The final metrics of the HParams page, which repeat others, are left out. tensors and
    images: matrices of our own, and PNG files, by tag as (step, value). unread: what is there and could not be read,
    each of which costs itself alone.
    """

    path: Path | str
    scalars: dict[str, Series]
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    flights: list[dict[str, Any]] = field(default_factory=list)
    hparams: dict[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    tensors: dict[str, list[tuple[int, NDArray[np.float32]]]] = field(default_factory=dict)
    images: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)

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
        times = np.array(ends, np.float64)
        known = times[np.abs(times) < _LATEST]  # NaN is not
        return (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)

    @property
    def seconds(self) -> float:
        """Wall time between the first and the last value."""
        first, last = self.times
        return last - first


def runs_in(folder: Path) -> list[Path]:
    """Every run at or below a folder, the one written last at the end. Raises NoRunError when there is none."""
    if not folder.is_dir():
        raise NoRunError(f"'{folder}' is not a folder; name a run, such as runs/exp1, or a folder of runs")
    files = sorted(event_files_below(folder), key=lambda file: file.stat().st_mtime, reverse=True)
    if not files:
        raise NoRunError(f"no run is recorded in '{folder}' (it holds no TensorBoard event file)")
    return list(dict.fromkeys(file.parent for file in files))[::-1]


def read_run(where: Path | str) -> Run:
    """Read the event files of a run, all points of them; what is damaged is left out.

    where: the run's folder or URL, or one above it, of which the newest run is taken. Raises NoRunError; for a URL also
    what `copied` raises.
    """
    place = located(where)
    if isinstance(place, Path):
        return _read(place if event_files(place) else runs_in(place)[-1])
    with copied(place) as (folder, url):
        if not event_files(folder):
            raise NoRunError(f"no run is recorded in '{url}' (it holds no TensorBoard event file)")
        run = _read(folder)
    flights = [{**flight, "file": f"{url}/flight/{Path(flight['file']).name}"} for flight in run.flights]
    return replace(run, path=url, flights=flights)


def _read(path: Path) -> Run:
    files = EventFiles(path)
    files.update()
    return run_of(files)


def run_of(files: EventFiles) -> Run:
    """What has been read so far, with the flight recordings that lie beside it."""
    flights: list[dict[str, Any]] = []
    unread = list(files.unread)
    for file in regular((files.path / "flight").glob("*.json")):
        try:
            flights.append(_flight(file))
        except Exception:  # noqa: PERF203 - half written, or foreign: it costs itself alone
            unread.append(visible(f"flight/{file.name}"))
    events = files.contents
    scalars = {tag: events.series(tag) for tag in events.scalars}
    return Run(
        files.path, scalars, dict(events.texts), flights, events.hparams, unread,
        tensors=dict(events.tensors), images=dict(events.images),
    )  # fmt: skip


def _flight(file: Path) -> dict[str, Any]:
    """What is known of a recording, with its file's name. Raises for one that is half written or foreign."""
    content = json_of(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError("no recording")
    known = {key: content[key] for key, kind in _FLIGHT.items() if isinstance(content.get(key), kind)}
    if "alerts" in known:
        known["alerts"] = [alert for alert in known["alerts"] if isinstance(alert, dict)]
    return {"file": str(file), **known}


def json_of(text: str) -> Any:
    """What a text of others says, where numbers that JSON lacks are None. Raises ValueError for what is no JSON."""
    try:
        return json.loads(
            text,
            parse_float=lambda text: number if math.isfinite(number := float(text)) else None,
            parse_constant=lambda text: None,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


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

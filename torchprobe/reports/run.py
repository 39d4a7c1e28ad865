"""A recorded run, read back from its event files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchprobe.reports.remote import copied
from torchprobe.writers.hparams import FINAL, START_TAG, read_hparams
from torchprobe.writers.places import as_url, is_url, local_path


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

    path is a str for a URL. The final metrics of the HParams page, which repeat others, are left out.
    """

    path: Path | str
    scalars: dict[str, Series]
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    flights: list[dict[str, Any]] = field(default_factory=list)
    hparams: dict[str, Any] = field(default_factory=dict)

    def group(self, name: str) -> dict[str, Series]:
        """The series of a tag group, by what follows it: `grad_norm` gives {"fc.weight": ...}."""
        start = f"{name}/"
        return {tag.removeprefix(start): series for tag, series in self.scalars.items() if tag.startswith(start)}

    @property
    def steps(self) -> int:
        """The last step of which anything is known."""
        return max((int(series.steps[-1]) for series in self.scalars.values()), default=0)

    @property
    def seconds(self) -> float:
        """Wall time between the first and the last value."""
        times = [time for series in self.scalars.values() for time in (series.wall_times[0], series.wall_times[-1])]
        return float(max(times) - min(times)) if times else 0.0


def newest_run(folder: Path) -> Path:
    """The folder itself when it holds event files, else the one below it that was written last.

    Raises NoRunError when there is none.
    """
    if not folder.is_dir():
        raise NoRunError(f"'{folder}' is not a folder; name a run, such as runs/exp1, or a folder of runs")
    files = sorted(folder.glob("*tfevents*")) or sorted(folder.rglob("*tfevents*"), key=lambda f: f.stat().st_mtime)
    if not files:
        raise NoRunError(f"no run is recorded in '{folder}' (it holds no TensorBoard event file)")
    return files[-1].parent


def read_run(where: Path | str) -> Run:
    """Read the event files of a run, all points of them, with TensorBoard's own reader.

    where: the run's folder or URL, or one above it, of which the newest run is taken. Raises NoRunError; for a URL also
    what `remote.copied` raises.
    """
    if not is_url(str(where)):
        return _read(newest_run(local_path(str(where))))
    with copied(as_url(str(where))) as (folder, url):
        if next(folder.glob("*tfevents*"), None) is None:
            raise NoRunError(f"no run is recorded in '{url}' (it holds no TensorBoard event file)")
        run = _read(folder)
    flights = [{**flight, "file": f"{url}/flight/{Path(flight['file']).name}"} for flight in run.flights]
    return replace(run, path=url, flights=flights)


def _read(path: Path) -> Run:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(path), size_guidance={SCALARS: 0, TENSORS: 0})
    events.Reload()
    found: dict[str, list[tuple[int, float, float]]] = {}
    texts: dict[str, list[tuple[int, str]]] = {}
    hparams: dict[str, Any] = {}
    for tag in events.Tags()["scalars"]:
        found[tag] = [(event.step, event.value, event.wall_time) for event in events.Scalars(tag)]
    for tag in events.Tags()["tensors"]:
        plugin = events.SummaryMetadata(tag).plugin_data
        if tag == START_TAG:
            hparams = read_hparams(plugin.content)
            continue
        arrays = [(event.step, make_ndarray(event.tensor_proto), event.wall_time) for event in events.Tensors(tag)]
        if plugin.plugin_name == "text":
            texts[tag] = [(step, _text(array)) for step, array, _ in arrays]
        elif plugin.plugin_name == "scalars":
            found[tag] = [(step, float(array), time) for step, array, time in arrays]
    series = {tag: _series(points) for tag, points in found.items() if points and not tag.startswith(f"{FINAL}/")}
    return Run(path, series, texts, _flights(path), hparams)


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def _series(points: list[tuple[int, float, float]]) -> Series:
    """Of two values for one step the later counts."""
    latest = {step: (value, time) for step, value, time in points}
    steps = sorted(latest)
    values, times = zip(*(latest[step] for step in steps), strict=True)
    return Series(np.array(steps, np.int64), np.array(values, np.float64), np.array(times, np.float64))


def _text(array: NDArray[Any]) -> str:
    return "\n".join(part.decode(errors="replace") for part in array.reshape(-1).tolist())


def _flights(path: Path) -> list[dict[str, Any]]:
    return [read for file in sorted((path / "flight").glob("*.json")) if (read := _flight(file)) is not None]


def _flight(file: Path) -> dict[str, Any] | None:
    """A recording, with its file's name; None for a file that a killed process left half written."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return {"file": str(file), **content} if isinstance(content, dict) else None

"""JSON lines: one object a record, for pandas, jq or a script."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchprobe.records import Histogram, HParams, Image, Layout, Outcome, Record, Text, Value
from torchprobe.writers.files import AppendFile, FaultLog, check_path


class JsonLinesWriter:
    """Appends `{"step": 3, "wall_time": 1.7e9, "values": {tag: value}}` to the file at `path`.

    A value is a number for a scalar, else an object: `{"edges", "counts"}` for a histogram,
    `{"text"}`, `{"shape", "png"}` for an image (base64), `{"array"}` for nested lists, `{"hparams"}`,
    `{"success"}`, `{"charts"}`. Numbers that JSON lacks are the strings "NaN", "Infinity" and "-Infinity".

    What the file already holds is kept. One that others delete, move away, replace or cut short is opened again under
    its name, with a line in the log. A batch is on disk when `write` returns, or not at all. Raises TypeError at
    the call for what is no path, OSError when the file cannot be opened, and from `write` when a batch does not fit.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path={path!r} is a {type(path).__name__}: pass the path of a file, such as 'run.jsonl'")
        check_path("path", path)
        self._path = Path(path).absolute()  # wherever the program goes
        self._faults = FaultLog()
        self._file = self._open()

    def write(self, records: Sequence[Record]) -> None:
        """Append a batch, a line each. Raises OSError when it does not fit; then nothing is changed."""
        if not records:
            return
        fault = self._file.fault()
        if fault is not None:
            self._reopen(fault)
        lines = (json.dumps(json_record(one), allow_nan=False, separators=(",", ":")) for one in records)
        self._file.append("".join(f"{line}\n" for line in lines).encode())

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        self._file.close()

    def _reopen(self, fault: str) -> None:
        before, self._file = self._file, self._open()
        before.close()
        self._faults.tell(self._path, fault, self._path)

    def _open(self) -> AppendFile:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = AppendFile(self._path, "ab")
            if file.size:
                with self._path.open("rb") as written:
                    written.seek(-1, os.SEEK_END)
                    if written.read() != b"\n":  # a killed process left half a line, which would spoil the next one
                        file.append(b"\n")
        except OSError as error:
            fix = "pass the path of a file that you may write to"
            raise OSError(error.errno, f"path={str(self._path)!r}: {error.strerror}: {fix}") from error
        return file


def json_record(record: Record, without: tuple[type, ...] = ()) -> dict[str, Any]:
    """A record as JSON has it, without values of some kinds: see `JsonLinesWriter`."""
    values = {tag: json_value(value) for tag, value in record.values.items() if not isinstance(value, without)}
    return {"step": record.step, "wall_time": record.wall_time, "values": values}


def json_value(value: Value) -> Any:
    """A value as JSON has it: see `JsonLinesWriter`."""
    if isinstance(value, Histogram):
        return {"edges": _plain(value.edges.tolist()), "counts": value.counts.tolist()}
    if isinstance(value, Text):
        return {"text": value.markdown}
    if isinstance(value, Image):
        return {"shape": value.pixels.shape, "png": base64.b64encode(value.png()).decode()}
    if isinstance(value, HParams):
        return {"hparams": {name: _plain(hparam) for name, hparam in value.values.items()}}
    if isinstance(value, Outcome):
        return {"success": value.success}
    if isinstance(value, Layout):
        return {"charts": {title: list(map(dataclasses.asdict, made)) for title, made in value.categories.items()}}
    if isinstance(value, np.ndarray):
        return {"array": _plain(value.tolist())}
    return _plain(float(value))


def _plain(value: Any) -> Any:
    """A value, or nested lists of such, with names for the numbers that JSON lacks."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"

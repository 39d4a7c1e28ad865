"""What TensorBoard's HParams page reads, in the run itself: hyperparameters at the start, the outcome at the end.

No Experiment record is written: the page then makes its columns from the hyperparameters and scalars of all runs,
whatever each of them has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from numbers import Real
from time import time
from typing import Any

import numpy as np

from torchprobe.messages import log as _log
from torchprobe.records import HParam, HParams, Outcome, Record, Value, group_of
from torchprobe.writers.protocol import Writer, restart

START_TAG = "_hparams_/session_start_info"
END_TAG = "_hparams_/session_end_info"
FINAL = "Final"
"""The group of final metrics. The page shows the first five of all scalar tags, by the alphabet: these sort first."""

_OURS = frozenset({"overview", "alerts", "nonfinite"})  # groups of ours that no probe describes
_LOSS = "overview/loss"
DESCRIPTION = "Last value of the run's metrics, for the HParams page."
_EXACT_INTEGERS = 2**53  # the page knows numbers as float64


class HParamsWriter:
    """Wraps a writer. Without hyperparameters it passes everything on as it is.

    The final metrics are the last values of what the user logged, or of `overview/loss` when that has no loss, under
    `Final/<tag>` at the last step. Created on the training thread, used by the drain thread; `failed` is set
    before the last `close`.
    """

    def __init__(self, writer: Writer, hparams: Mapping[str, Any] | None = None) -> None:
        self.failed = False
        self._writer = writer
        self._start: HParams | None = None
        self._begun = False
        self._step = 0
        self._last: dict[str, float] = {}
        if hparams is not None:
            self.begin(hparams)

    def begin(self, hparams: Mapping[str, Any]) -> None:
        """Hyperparameters, for the next batch; they add to earlier ones until these are written.

        TensorBoard keeps a run's first: later ones are ignored, with a warning. Raises TypeError for a value that
        is no bool, number or string.
        """
        values = checked_hparams(hparams)
        if self._begun:
            _log.warning("hparams are written already, with the run's first steps: %s are ignored", sorted(values))
            return
        before = self._start
        self._start = HParams({**(before.values if before else {}), **values}, before.started if before else time())

    def write(self, records: Sequence[Record]) -> None:
        """Pass a batch on; the first one carries the hyperparameters."""
        start = self._start
        if start is None or not records:
            self._writer.write(records)
            return
        batch = list(records)
        if not self._begun:
            batch[0] = dataclasses.replace(batch[0], values={START_TAG: start, **batch[0].values})
        self._writer.write(batch)
        self._begun = True
        for record in records:
            self._step = max(self._step, record.step)
            self._last.update(_metrics(record))

    def restart(self, step: int) -> None:
        """The wrapped writer's."""
        restart(self._writer, step)

    def close(self) -> None:
        """Write the final metrics and the outcome, unless nothing was written before them; close the writer."""
        try:
            if self._begun:
                self._writer.write([self._end()])
        finally:
            self._writer.close()

    def _end(self) -> Record:
        now = time()
        own_loss = any(tag.endswith("loss") for tag in self._last if tag != _LOSS)
        final = {f"{FINAL}/{tag}": value for tag, value in self._last.items() if tag != _LOSS or not own_loss}
        values: dict[str, Value] = {**final, END_TAG: Outcome(success=not self.failed, ended=now)}
        return Record(self._step, now, values, {FINAL: DESCRIPTION})


def checked_hparams(hparams: Mapping[str, Any]) -> dict[str, HParam]:
    """A copy with plain values. numpy's scalars become Python's; what else is no bool, number or string raises.

    Raises TypeError that names the key.
    """
    if not isinstance(hparams, Mapping):
        raise TypeError(f"hparams={hparams!r}: takes a mapping of names to values, such as {{'lr': 1e-3}}")
    return {name: _checked(name, value) for name, value in hparams.items()}


def plugin_data(value: HParams | Outcome) -> bytes:
    """The record that the HParams page reads, serialized."""
    from google.protobuf import struct_pb2
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    part: dict[str, Any]
    if isinstance(value, HParams):
        stored = {name: struct_pb2.Value(**_stored(hparam)) for name, hparam in value.values.items()}
        part = {"session_start_info": {"start_time_secs": value.started, "hparams": stored}}
    else:
        status = api_pb2.STATUS_SUCCESS if value.success else api_pb2.STATUS_FAILURE
        part = {"session_end_info": {"end_time_secs": value.ended, "status": status}}
    return bytes(plugin_data_pb2.HParamsPluginData(**part).SerializeToString())


def read_hparams(plugin_content: bytes) -> dict[str, HParam]:
    """The hyperparameters of a record that `plugin_data` has made of them, sorted by name."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    stored = plugin_data_pb2.HParamsPluginData.FromString(plugin_content).session_start_info.hparams
    return {name: getattr(stored[name], stored[name].WhichOneof("kind")) for name in sorted(stored)}


def _checked(name: object, value: Any) -> HParam:
    if not isinstance(name, str):
        raise TypeError(f"hparams key {name!r}: takes a string, not {type(name).__name__}")
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, bool | int | float | str):
        return plain
    fix = "flatten it, such as {'optimizer.lr': 1e-3}" if isinstance(value, Mapping) else "pass str(value)"
    raise TypeError(
        f"hparams[{name!r}]={value!r}: takes a bool, an int, a float or a string, not {type(value).__name__}; {fix}"
    )


def _stored(value: HParam) -> dict[str, HParam]:
    """As a number, if the page can show it so: it drops NaN and inf, and rounds a long integer, such as a seed."""
    if isinstance(value, bool):  # first: a bool is an int too
        return {"bool_value": value}
    exact = abs(value) <= _EXACT_INTEGERS if isinstance(value, int) else not isinstance(value, str) and isfinite(value)
    return {"number_value": value} if exact else {"string_value": str(value)}


def _metrics(record: Record) -> Iterator[tuple[str, float]]:
    """Scalars of the user's, whose group no probe describes, and the loss of the overview."""
    for tag, value in record.values.items():
        own = group_of(tag) not in record.descriptions and group_of(tag) not in _OURS
        if isinstance(value, Real) and (own or tag == _LOSS):
            yield tag, float(value)

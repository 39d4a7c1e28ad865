"""Puts a run's hyperparameters before its records, and its final metrics and outcome behind them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from time import time
from typing import Any

from torchprobe.records import HParams, Outcome, Record, Value, group_of
from torchprobe.writers.hparams import END_TAG, FINAL, START_TAG, checked_hparams
from torchprobe.writers.protocol import Writer, restart

_log = logging.getLogger("torchprobe")

_OURS = frozenset({"overview", "alerts", "nonfinite"})  # groups of ours that no probe describes
_LOSS = "overview/loss"
DESCRIPTION = "Last value of the run's metrics, for the HParams page."


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
        self._remember(records)

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

    def _remember(self, records: Sequence[Record]) -> None:
        for record in records:
            self._step = max(self._step, record.step)
            self._last.update(_metrics(record))

    def _end(self) -> Record:
        now = time()
        has_loss = any(tag.endswith("loss") for tag in self._last if tag != _LOSS)
        final = {tag: value for tag, value in self._last.items() if not (has_loss and tag == _LOSS)}
        values: dict[str, Value] = {f"{FINAL}/{tag}": value for tag, value in final.items()}
        values[END_TAG] = Outcome(success=not self.failed, ended=now)
        return Record(self._step, now, values, {FINAL: DESCRIPTION})


def _metrics(record: Record) -> Iterator[tuple[str, float]]:
    """Scalars of the user's, whose group no probe describes, and the loss of the overview."""
    for tag, value in record.values.items():
        own = group_of(tag) not in record.descriptions and group_of(tag) not in _OURS
        if isinstance(value, Real) and (own or tag == _LOSS):
            yield tag, float(value)

"""What records pass through between the decoder and the writer."""

from __future__ import annotations

import logging
from typing import Protocol

from torchprobe.records import Record

_log = logging.getLogger("torchprobe")


class Stage(Protocol):
    """Sees every record in the drain thread, in order, and may add to it. Takes no lock and must not block for long."""

    def __call__(self, record: Record) -> Record:
        """The record to write."""

    def at_rest(self) -> Record | None:
        """All records so far have passed: one more to write, or None. Called at least every `flush_seconds`."""

    def close(self) -> None:
        """Nothing more will come."""


class Guarded:
    """A stage that cannot stop the drain: one that raises is taken out, with one traceback in the log."""

    def __init__(self, stage: Stage | None) -> None:
        self._stage = stage

    def __call__(self, record: Record) -> Record:
        """The record to write: as it is when there is no stage, or it fails."""
        try:
            return record if self._stage is None else self._stage(record)
        except Exception:
            self._give_up()
            return record

    def at_rest(self) -> Record | None:
        """One more record, if the stage has one."""
        try:
            return None if self._stage is None else self._stage.at_rest()
        except Exception:
            self._give_up()
            return None

    def close(self) -> None:
        """Let the stage release what it holds."""
        try:
            if self._stage is not None:
                self._stage.close()
        except Exception:
            self._give_up()

    def _give_up(self) -> None:
        self._stage = None
        _log.exception("alerts failed and are switched off; recording and training go on")

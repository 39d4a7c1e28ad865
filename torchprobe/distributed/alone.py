"""The drain thread's work where there is no other rank, or none was known of when the session began."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.step import StepInFlight
from torchprobe.distributed.world import is_connected, world
from torchprobe.records import Record

_log = logging.getLogger("torchprobe")


class Alone:
    """Makes records of one process's steps; warns once on a rank that turns out to be one of several."""

    patience: float | None = None
    dropped = 0
    stopping = None

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._warned = False

    def read(self, sealed: StepInFlight) -> Record | None:
        """The record of a step. Raises what a device raised."""
        return self._decoder(sealed)

    def summary(self) -> str:
        """Nothing to say of other ranks."""
        return ""

    def pause(self) -> float | None:
        """Nothing to look for."""
        return None

    def release(self, urgent: bool) -> Iterable[Record]:
        """No step was kept back."""
        self._look_around()
        return ()

    def close(self) -> None:
        """Nobody to take leave of."""

    def _look_around(self) -> None:
        if self._warned or not is_connected() or world().rank == 0:
            return
        self._warned = True
        _log.warning(
            "torchprobe.instrument was called before init_process_group and without torchrun's RANK and WORLD_SIZE, "
            "so that each rank writes a run of its own, rank %d too: call it after init_process_group for one run",
            world().rank,
        )

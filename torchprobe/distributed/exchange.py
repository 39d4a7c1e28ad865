"""What the drain thread does with other ranks, and who writes: what `instrument` needs to know of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.step import Reporter, StepInFlight
from torchprobe.distributed.gatherer import Gatherer
from torchprobe.distributed.sender import Sender
from torchprobe.distributed.world import World, is_connected, world
from torchprobe.records import Record

_log = logging.getLogger("torchprobe")


def open_exchange(world: World, reporters: Iterable[Any], decoder: Decoder) -> Gatherer | Sender | SingleProcess:
    """The exchange of a session.

    reporters: what ranks combine, in the same order on every rank: each has `combine_rows`.
    """
    if world.is_single:
        return SingleProcess(decoder)
    keys: dict[Reporter, str] = {reporter: f"{i}:{type(reporter).__name__}" for i, reporter in enumerate(reporters)}
    return Gatherer(world, keys, decoder) if world.writes else Sender(world, keys)


class SingleProcess:
    """The exchange where there is no other rank, or none was known of when the session began.

    Makes records of one process's steps; warns once on a rank that turns out to be one of several.
    """

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
        if not self._warned and is_connected() and world().rank:
            self._warned = True
            _log.warning(
                "torchprobe.instrument was called before init_process_group and without torchrun's RANK and "
                "WORLD_SIZE, so that each rank writes a run of its own, rank %d too: call it after init_process_group "
                "for one run",
                world().rank,
            )
        return ()

    def close(self) -> None:
        """Nobody to take leave of."""


class NoWriter:
    """The writer of a rank that writes nothing."""

    def write(self, records: Sequence[Record]) -> None:
        """Nothing: the records are rank 0's."""

    def close(self) -> None:
        """Nothing is open."""

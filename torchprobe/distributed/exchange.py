"""What `instrument` needs to know: who writes, and what the drain thread does with other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.step import Reporter
from torchprobe.distributed.alone import Alone
from torchprobe.distributed.gatherer import Gatherer
from torchprobe.distributed.sender import Sender
from torchprobe.distributed.world import World
from torchprobe.records import Record


class NoWriter:
    """The writer of a rank that writes nothing."""

    def write(self, records: Sequence[Record]) -> None:
        """Nothing: the records are rank 0's."""

    def close(self) -> None:
        """Nothing is open."""


def open_exchange(world: World, reporters: Iterable[Any], decoder: Decoder) -> Gatherer | Sender | Alone:
    """The exchange of a session.

    reporters: what ranks combine, in the same order on every rank: each has `combine_rows`.
    """
    if world.is_alone:
        return Alone(decoder)
    keys: dict[Reporter, str] = {reporter: f"{i}:{type(reporter).__name__}" for i, reporter in enumerate(reporters)}
    return Gatherer(world, keys, decoder) if world.writes else Sender(world, keys)

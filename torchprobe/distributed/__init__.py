"""One run over several ranks: each sends what it has seen to rank 0, which combines and writes it.

Read in the order in which values flow: `world` (who writes, and how all stop at the same step), `sender`, `mailbox`
(their bytes, and how they travel), `gatherer`, `merge` (one row from many, and names in a pipeline).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.step import Reporter
from torchprobe.distributed.gatherer import Gatherer
from torchprobe.distributed.merge import FindStages
from torchprobe.distributed.sender import Sender
from torchprobe.distributed.world import SingleProcess, World


def open_exchange(
    world: World, reporters: Iterable[Any], decoder: Decoder, stages: FindStages
) -> Gatherer | Sender | SingleProcess:
    """The exchange of a session.

    reporters: what ranks combine, in the same order on every rank: each has `combine_rows`. stages: finds those of a
    pipeline that this rank runs.
    """
    if world.size < 2:
        return SingleProcess(decoder)
    keys: dict[Reporter, str] = {reporter: f"{i}:{type(reporter).__name__}" for i, reporter in enumerate(reporters)}
    return Gatherer(world, keys, decoder, stages) if world.writes else Sender(world, keys, stages)

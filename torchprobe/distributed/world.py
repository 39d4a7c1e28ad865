"""Which rank this process is, and what takes the place of the other ranks where there are none."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import NamedTuple

import torch.distributed as dist

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.drain import Exchange
from torchprobe.buffer.step import StepInFlight
from torchprobe.records import Record

_log = logging.getLogger("torchprobe")


class World(NamedTuple):
    """The ranks of the default process group. Rank 0 writes."""

    rank: int
    size: int

    @property
    def writes(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        """Whether this is a single process."""
        return self.size < 2


def world() -> World:
    """The ranks of `torch.distributed`; before `init_process_group` what `torchrun` says in the environment."""
    if is_connected():
        return World(dist.get_rank(), dist.get_world_size())
    if dist.is_available():
        rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
        if rank.isdigit() and size.isdigit():
            return World(int(rank), int(size))
    return World(0, 1)


def is_connected() -> bool:
    """Whether the default process group is there."""
    return dist.is_available() and dist.is_initialized()


class SingleProcess(Exchange):
    """The exchange where there is no other rank, or none was known of when the session began.

    Makes records of one process's steps; warns once on a rank that turns out to be one of several.
    """

    stopping = None

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._warned = False

    def read(self, sealed: StepInFlight) -> Record | None:
        """The record of a step. Raises what a device raised."""
        return self._decoder(sealed)

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

"""Which rank this process is."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch.distributed as dist


class World(NamedTuple):
    """The ranks of the default process group. Rank 0 writes."""

    rank: int
    size: int

    @property
    def writes(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
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

"""Which rank this process is, and the wrappers under which a model cannot be watched."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch.distributed as dist
from torch import nn

from torchprobe.capture.fully_sharded import is_flat_sharded


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


def check_wrappers(model: nn.Module) -> None:
    """Raise TypeError for DataParallel, ValueError for FullyShardedDataParallel without its `use_orig_params`."""
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            raise TypeError(
                "model: got a DataParallel, which copies the model at every call, so that hooks see pieces of a batch "
                "in several threads; takes DistributedDataParallel, one process a device, or the bare model"
            )
        if is_flat_sharded(module) and not getattr(module, "_use_orig_params", True):
            raise ValueError(
                "model: got a FullyShardedDataParallel with use_orig_params=False, whose flat parameters have lost "
                "their names; takes one with use_orig_params=True, or fully_shard(model)"
            )

"""This process among others, if there are others."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


def own_rank() -> int:
    """The rank; 0 without ranks."""
    return dist.get_rank() if _are_there() else 0


def agreed(value: _T) -> _T:
    """Rank 0's value, on every rank, all together; without ranks the value itself."""
    if not _are_there():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def alone() -> bool:
    """Whether there are no other ranks to work with."""
    return not _are_there()


def _are_there() -> bool:
    return dist.is_available() and dist.is_initialized()

"""Which queries of a self-attention are padding, told from what is masked."""

from __future__ import annotations

import torch
from torch import Tensor

_MASKED = -9e3  # at or below this a float mask hides its key: the mildest custom is -10000
_PROBES = 16  # rows and columns that stand for all


def blocked(mask: Tensor) -> Tensor:
    """True where a mask (bool: True takes part; float: added), or a masked logit, hides a key."""
    return ~mask if mask.dtype is torch.bool else mask <= _MASKED


def padded_queries(mask: Tensor, batch: int, length: int) -> Tensor:
    """Padded positions: bool (batch, length). mask: broadcastable to (batch, heads, length, length).

    A padded position is a key that no query sees, and as a query it does not see itself; or it sees everything,
    as libraries let a padded query do whose whole row would be masked. Such rows do not count as seeing. Told from
    the diagonal and 16 rows and columns of the first head, so a mask is not read as a whole. A mask that hides a key
    from everybody for another reason looks the same.
    """
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    mask = mask[:, 0].expand(batch, length, length)
    probes = torch.linspace(0, length - 1, min(length, _PROBES), device=mask.device).long()
    sees_all = ~blocked(mask[:, :, probes]).any(-1)
    seen = ~blocked(mask[:, probes]) & ~sees_all[:, probes, None]
    seen_by_last = ~blocked(mask[:, -1])
    unseen = ~(seen.any(1) | seen_by_last)
    return unseen & (blocked(mask.diagonal(dim1=-2, dim2=-1)) | sees_all)

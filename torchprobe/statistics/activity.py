"""How many units are active, and how often."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RARELY = 0.01  # of its inputs


def active_units(x: Tensor) -> Tensor:
    """On how many inputs each unit of `x` is above zero: int64 of shape (units,).

    Units are channels, dimension 1, of a tensor with four or more dimensions, else the last dimension; all other
    dimensions are inputs. A 0-dim tensor is one unit. NaN counts as active: it is another illness.
    """
    x = x.detach()
    unit = 1 if x.dim() >= 4 else x.dim() - 1
    active = (x <= 0).logical_not()
    return active.sum([d for d in range(x.dim()) if d != unit]) if x.dim() > 1 else active.to(torch.int64).reshape(-1)


def inactive_share(counts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """The share of units that are active on under 1 % of inputs, from (active counts, inputs) of one device: 0-dim."""
    dead = torch.cat([active.to(torch.float32) < RARELY * inputs for active, inputs in counts])
    return dead.to(torch.float32).mean()

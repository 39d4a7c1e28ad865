"""How far the keys are from the queries of a block: abs(query index - key index)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchprobe.statistics.attention.parts import Part
from torchprobe.statistics.attention.rows import Rows
from torchprobe.statistics.attention.sources import QueryKey, Source


@dataclass(frozen=True)
class Side:
    """Keys on one side of every query of a block. Their distance is that of the query to a key between, plus that of
    this key to them: `queries` (sequences or 1, 1, rows) + `ramp` (keys,)."""

    keys: slice
    queries: Tensor
    ramp: Tensor


@dataclass(frozen=True)
class Distances:
    """Of all keys from the queries of a block: on their sides, and (sequences or 1, 1, rows, keys) of those between."""

    sides: tuple[Side, ...]
    between: slice
    of_between: Tensor | None


def distances(source: Source, rows: Rows, part: Part, position: Tensor, keys: int) -> Distances:
    """Of the first `keys` keys. position: the query indices of the part, floating, (sequences or 1, 1, rows)."""
    start, stop = min(keys, rows.start(part)), min(keys, rows.end(part))
    if isinstance(source, QueryKey) and source.causal:  # no weight after the query: one side, that reaches over it
        return Distances((_before(position, start, keys),), slice(0, 0), None)
    index = torch.arange(start, stop, dtype=position.dtype, device=position.device)
    after = torch.arange(keys - stop, dtype=position.dtype, device=position.device)
    sides = (_before(position, start, start), Side(slice(stop, keys), stop - position, after))
    nonempty = tuple(side for side in sides if side.keys.stop > side.keys.start)
    return Distances(nonempty, slice(start, stop), (index - position[..., None]).abs_())


def _before(position: Tensor, start: int, keys: int) -> Side:
    ramp = torch.arange(start, start - keys, -1, dtype=position.dtype, device=position.device)
    return Side(slice(0, keys), position - start, ramp)


def totals(weight: Tensor, of: Distances, total: Tensor, distance: Tensor) -> None:
    """Σ weight and Σ weight · distance over the keys of (sequences, heads, rows, keys), into (sequences, heads, rows);
    overwrites the weights.

    The side of causal attention reaches over the block's own positions, where its two distances cancel: an error of
    1e-7 times as many tokens as the block's queries lie apart.
    """
    if of.of_between is None:
        _of_side(weight, of.sides[0], total, distance)
        return
    between = weight[..., of.between]
    torch.sum(between, -1, out=total)
    torch.sum(between.mul_(of.of_between), -1, out=distance)
    for side in of.sides:
        more, further = torch.empty_like(total), torch.empty_like(distance)
        _of_side(weight[..., side.keys], side, more, further)
        total.add_(more)
        distance.add_(further)


def _of_side(weight: Tensor, side: Side, total: Tensor, distance: Tensor) -> None:
    torch.sum(weight, -1, out=total)
    torch.addcmul(weight.matmul(side.ramp), total, side.queries, out=distance)

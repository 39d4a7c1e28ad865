"""The keys of a query row: which ones it sees, what hides the others, and how far they are from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchprobe.statistics.attention.rows import Rows, Tile
from torchprobe.statistics.attention.sources import Logits, QueryKey, Source

HIDDEN = -1e30
"""Added to the logit of a key that is not visible: finite, so that no inf - inf makes a NaN of it."""

NEVER_A_LOGIT = -5000.0
"""At or below this a logit, or a mask that is added to it, hides its key: half of -1e4, the mildest of customs."""

WITH_A_MASK = NEVER_A_LOGIT + 100
"""The same of a logit that such a mask was added to: its own part is smaller, or it has grown far too large."""


@dataclass(frozen=True)
class Visible:
    """count: visible keys; first: index of the first one, anything where there is none. Floating, broadcastable to
    (sequences, heads, rows)."""

    count: Tensor
    first: Tensor

    def narrowed(self, rows: slice) -> Visible:
        """The same for fewer rows."""
        return Visible(_narrowed(self.count, rows), _narrowed(self.first, rows))


@dataclass(frozen=True)
class Sight:
    """What some rows see. bias: (sequences or 1, heads or 1, rows or 1, keys), hides keys when added to the logits of
    all keys from `start` on; None for nothing. visible: None where the position or the logits tell."""

    bias: Tensor | None
    visible: Visible | None
    start: int = 0

    def narrowed(self, rows: slice, keys: int) -> Sight:
        """The same for some of the rows and for the first keys."""
        bias = None if self.bias is None else _narrowed(self.bias, rows)[..., : keys - self.start]
        return Sight(bias, None if self.visible is None else self.visible.narrowed(rows), self.start)


def through_mask(source: QueryKey, rows: Rows, tile: Tile) -> Sight | None:
    """What the rows of a tile see through the mask, in one head where all are alike; None where there is no mask."""
    if source.mask is None:
        return None
    bias = _bias(source.mask, rows, tile, source.dtype)
    if source.causal:
        position = rows.positions(tile, source.device)[:, None].to(source.dtype)
        bias = bias + _future(position, 0, source.shape.keys)
    bias = bias.expand(*bias.shape[:-1], source.shape.keys)
    return Sight(bias, of_values(bias) if source.modify is None else None)


def without_mask(source: QueryKey, rows: Rows, tile: Tile, position: Tensor, keys: int) -> Sight:
    """What the rows of a tile see without one, of the first keys: all, or those up to the query's own index."""
    if not source.causal:
        return Sight(None, None)
    start = min(keys, rows.start(tile))
    return Sight(_future(position, start, keys), None, start)


def by_position(source: Source, rows: Rows) -> Tensor | None:
    """How many keys each row sees where neither a mask nor the logits have a say, else None: (sequences or 1, 1, rows).
    The first of them is key 0."""
    if not isinstance(source, QueryKey) or source.mask is not None or source.modify is not None:
        return None
    keys = source.shape.keys
    everything = Tile(slice(0, rows.count), slice(0, rows.per_sequence), slice(0, 1), slice(0, 1))

    def count() -> Tensor:
        position = rows.positions(everything, source.device)[:, None]
        return (position + 1).clamp(max=keys) if source.causal else torch.full_like(position, keys)

    return rows.remembered(("count", keys, source.causal), count)


def standing(source: Source, position: Tensor) -> Tensor:
    """Where queries of these indices stand among the keys: floating, of the same shape."""
    return position if source.places is None else source.places[position.long()].to(position.dtype)


def limit(source: Logits) -> float:
    """At or below which a logit hides its key."""
    return WITH_A_MASK if source.masked else NEVER_A_LOGIT


def sees_older_behind(source: Source) -> Tensor:
    """Whether a query sees a key behind it that is no query's own, or queries are not in order: bool, on the device.

    So it is where a cache goes round: such keys are older than all before the query.
    """
    index, row = (torch.arange(n, device=source.device) for n in (source.shape.keys, source.shape.queries))
    at = (row if source.places is None else source.places)[:, None]
    behind = (index > at) & ~(index == at).any(0)
    if isinstance(source, QueryKey) and source.causal:
        behind &= index <= row[:, None]
    shown, hidden = (source.mask, NEVER_A_LOGIT) if isinstance(source, QueryKey) else (source.logits, limit(source))
    if shown is not None:
        behind = behind & (shown if shown.dtype is torch.bool else shown > hidden)
    return behind.any() | (at.diff(dim=0) != 1).any()


def of_values(values: Tensor, hidden: float = NEVER_A_LOGIT) -> Visible:
    """From logits, or from what is added to them: (…, keys), visible above `hidden`, in part within 1 above it.

    Written in floating arithmetic, exact up to 2²⁴ keys: comparing and counting booleans costs three times as much.
    """
    keys = values.size(-1)
    seen = (values - hidden).clamp_(0, 1)
    count = seen.sum(-1)
    from_the_end = torch.arange(keys, 0, -1, dtype=values.dtype, device=values.device)
    return Visible(count, keys - seen.mul_(from_the_end).amax(-1))


def _bias(mask: Tensor, rows: Rows, tile: Tile, dtype: torch.dtype) -> Tensor:
    """The rows of a mask as something finite to add, HIDDEN for keys that are not visible."""
    mask = mask[(None,) * (4 - mask.dim())]
    bias = rows.take(mask, tile).to(dtype)
    if mask.dtype == torch.bool:
        return (bias - 1) * -HIDDEN
    return bias.masked_fill(bias <= NEVER_A_LOGIT, HIDDEN)


def _future(position: Tensor, start: int, keys: int) -> Tensor:
    """HIDDEN times the number of tokens that a key from `start` on lies after the query; 0 before and at it."""
    index = torch.arange(start, keys, dtype=position.dtype, device=position.device)
    return (index - position[..., None]).clamp_(min=0).mul_(HIDDEN)


def _narrowed(x: Tensor, rows: slice) -> Tensor:
    """Some rows, the third dimension; a single one is for all and stays."""
    return x if x.size(2) == 1 else x[:, :, rows]


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


def distances(source: Source, rows: Rows, tile: Tile, position: Tensor, keys: int) -> Distances:
    """Of the first `keys` keys. position: where the tile's queries stand, floating, (sequences or 1, 1, rows)."""
    elsewhere = source.places is not None
    start, stop = (0, keys) if elsewhere else (min(keys, rows.start(tile)), min(keys, rows.end(tile)))
    if (
        isinstance(source, QueryKey) and source.causal and not elsewhere
    ):  # no weight after the query: one side, that reaches over it
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

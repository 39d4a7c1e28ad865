"""The logits of chosen rows, block by block, with what each row sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from torchprobe.statistics.attention import keys as visibility
from torchprobe.statistics.attention.keys import Distances, Sight, Visible, distances
from torchprobe.statistics.attention.rows import Extent, Rows, Tile, budget, row_tiles, tiles
from torchprobe.statistics.attention.sources import Logits, QueryKey, Source

T = TypeVar("T")

_KEPT = 2**20
"""Where rows times keys are more, what only depends on positions is made anew for each attention: memory."""


class Workspace:
    """A block's worth of logits and one of weights, and a head's keys, each overwritten by the next."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """size: elements of a usual block; a larger one grows it."""
        self._buffers = [torch.empty(n, dtype=dtype, device=device) for n in (size, size, 0)]
        self.unread = torch.empty(1, 1, 1, dtype=dtype, device=device)

    def logits(self, shape: tuple[int, ...]) -> Tensor:
        """Room for the logits of a block."""
        return self._room(0, shape)

    def weights(self, shape: tuple[int, ...]) -> Tensor:
        """Room for the weights that are made of them."""
        return self._room(1, shape)

    def keys(self, key: Tensor) -> Tensor:
        """The keys of some heads, contiguous and in the type of the arithmetic: a copy, unless they are."""
        if key.dtype == self.unread.dtype and key.is_contiguous():
            return key
        return self._room(2, tuple(key.shape)).copy_(key)

    def _room(self, index: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self._buffers[index].numel() < size:
            self._buffers[index] = self._buffers[index].new_empty(size)
        return self._buffers[index][:size].view(shape)


@dataclass(frozen=True)
class Block:
    """logits: (sequences, heads, rows, keys), scaled and masked; the keys end where no row of the block sees more.
    scratch: whether they are in the workspace, to be overwritten. visible: None where `keys.by_position` says.
    """

    tile: Tile
    logits: Tensor
    scratch: bool
    visible: Visible | None
    distances: Distances


def workspace_for(source: Source, rows: Rows) -> Workspace:
    """Room for a block of these rows."""
    logits = rows.count * rows.per_sequence * source.shape.heads * source.shape.keys
    return Workspace(min(budget(source.device), logits), source.dtype, source.device)


def blocks(source: Source, rows: Rows, workspace: Workspace) -> Iterator[Block]:
    """The chosen rows of every head, each row once. Holds a few blocks' worth of memory, the copied keys of a tile's
    heads included; inputs are not modified."""
    shape, size = source.shape, budget(source.device)
    width, causal = (source.key.size(3), source.causal) if isinstance(source, QueryKey) else (0, False)
    extent = Extent(rows.count, rows.per_sequence, shape.heads // source.group, source.group, shape.keys, width, causal)
    for same_rows in tiles(extent, size):
        if isinstance(source, QueryKey):
            yield from _multiplied(source, rows, same_rows, size, workspace)
        else:
            yield from _given(source, rows, same_rows, size)


def _given(source: Logits, rows: Rows, same_rows: list[Tile], size: int) -> Iterator[Block]:
    first, keys = same_rows[0], source.shape.keys
    position = visibility.standing(source, _position(source, rows, first))
    hidden = visibility.limit(source)
    remembered = _memory(source, rows, first)

    def far(start: int, stop: int) -> Distances:
        return remembered(start, stop, lambda: distances(source, rows, *_of_rows(first, start, stop, position), keys))

    for tile in same_rows:
        for some in row_tiles(tile, keys, size):
            logits = rows.take(source.logits, some).to(source.dtype)
            if source.shift is not None:
                logits = logits + rows.take(source.shift, some).to(source.dtype)
            visible = visibility.of_values(logits, hidden)
            yield Block(some, logits, False, visible, far(some.rows.start, some.rows.stop))


def _multiplied(
    source: QueryKey, rows: Rows, same_rows: list[Tile], size: int, workspace: Workspace
) -> Iterator[Block]:
    first, keys = same_rows[0], source.shape.keys
    position = _position(source, rows, first)
    remembered = _memory(source, rows, first)
    per_head = source.mask is not None and source.mask.dim() > 2 and source.mask.size(-3) > 1
    shared = None if per_head else visibility.through_mask(source, rows, first)
    query = rows.take(source.query, first._replace(heads=slice(0, source.shape.heads))).to(source.dtype)

    def of_all_heads(start: int, stop: int) -> tuple[int, Distances, Sight]:
        tile, at = _of_rows(first, start, stop, position)
        reach = min(keys, rows.end(tile)) if source.causal else keys
        far = distances(source, rows, tile, visibility.standing(source, at), reach)
        return reach, far, visibility.without_mask(source, rows, tile, at, reach)

    for tile in same_rows:
        masked = visibility.through_mask(source, rows, tile) if per_head else shared
        key = rows.of_sequences(source.key[:, tile.key_heads], tile)
        several = row_tiles(tile, keys, size)
        # A head's worth is copied: products are faster then.
        key = key.to(source.dtype) if len(several) == 1 else workspace.keys(key)
        across = key.flatten(0, 1).transpose(1, 2)
        for some in several:
            start, stop = some.rows.start, some.rows.stop
            reach, far, unmasked = remembered(start, stop, partial(of_all_heads, start, stop))
            of_tile = slice(some.rows.start - tile.rows.start, some.rows.stop - tile.rows.start)
            logits = _product(query[:, tile.heads, of_tile], across[..., :reach], source.scale, workspace)
            sight = masked.narrowed(of_tile, reach) if masked else unmasked
            yield Block(some, logits, True, _to_softmax(source, rows, some, logits, sight), far)


def _position(source: Source, rows: Rows, tile: Tile) -> Tensor:
    """The query indices of a tile, floating: (sequences or 1, 1, rows)."""
    key = ("position", source.dtype, *_bounds(tile))
    return rows.remembered(key, lambda: rows.positions(tile, source.device)[:, None].to(source.dtype))


def _bounds(tile: Tile) -> tuple[int, ...]:
    return (tile.sequences.start, tile.sequences.stop, tile.rows.start, tile.rows.stop)


def _memory(source: Source, rows: Rows, tile: Tile) -> Callable[[int, int, Callable[[], T]], T]:
    """For what is the same for all heads of a tile, and where it is small for all attentions of this shape."""
    keys = source.shape.keys
    small = source.places is None and rows.count * rows.per_sequence * keys <= _KEPT
    kind = (type(source), isinstance(source, QueryKey) and source.causal, keys, source.dtype, *_bounds(tile))
    of_rows = rows if small else replace(rows, kept={})

    def remembered(start: int, stop: int, make: Callable[[], T]) -> T:
        return of_rows.remembered((*kind, start, stop), make)

    return remembered


def _of_rows(tile: Tile, start: int, stop: int, position: Tensor) -> tuple[Tile, Tensor]:
    """Some rows of a tile, and their positions out of the tile's."""
    at = slice(start - tile.rows.start, stop - tile.rows.start)
    return tile._replace(rows=slice(start, stop)), position[..., at]


def _product(query: Tensor, across: Tensor, scale: float, workspace: Workspace) -> Tensor:
    """scale · query · keyᵀ: (sequences, heads, rows, keys), in the workspace. across: (sequences · key heads, width,
    keys); heads that share a key head are rows of one product."""
    folded = query.reshape(across.size(0), -1, query.size(3))
    logits = workspace.logits((*query.shape[:3], across.size(2)))
    room = logits.view(*folded.shape[:2], across.size(2))
    torch.baddbmm(workspace.unread, folded, across, beta=0, alpha=scale, out=room)
    return logits


def _to_softmax(source: QueryKey, rows: Rows, tile: Tile, logits: Tensor, sight: Sight) -> Visible | None:
    """Makes the input of the softmax of the product; returns what is seen, None where the position says it."""
    if source.softcap is not None:
        logits.div_(source.softcap).tanh_().mul_(source.softcap)
    if source.modify is not None:
        logits.copy_(source.modify(logits, *_indices(rows, tile, logits)))  # may return a tensor of the user's
    if sight.bias is not None:
        logits[..., sight.start :].add_(sight.bias)
    return visibility.of_values(logits) if source.modify is not None else sight.visible


def _indices(rows: Rows, tile: Tile, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of batch, head, query and key, four-dimensional each."""
    device = logits.device
    batch = torch.arange(rows.count, device=device) if rows.sequences is None else rows.sequences
    head = torch.arange(tile.heads.start, tile.heads.stop, device=device)[None, :, None, None]
    query = rows.positions(tile, device)[:, None, :, None]
    key = torch.arange(logits.size(-1), device=device)[None, None, None]
    return batch[tile.sequences, None, None, None], head, query, key

"""The logits of chosen rows, block by block, with what each row sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from torchprobe.statistics.attention import visibility
from torchprobe.statistics.attention.distance import Distances, distances
from torchprobe.statistics.attention.parts import Extent, Part, budget, parts, pieces
from torchprobe.statistics.attention.rows import Rows
from torchprobe.statistics.attention.sources import Logits, QueryKey, Source
from torchprobe.statistics.attention.visibility import Sight, Visible
from torchprobe.statistics.attention.workspace import Workspace


@dataclass(frozen=True)
class Block:
    """logits: (sequences, heads, rows, keys), scaled and masked; the keys end where no row of the block sees more.
    scratch: whether they are in the workspace, to be overwritten. visible: None where `visibility.by_position` says.
    """

    part: Part
    logits: Tensor
    scratch: bool
    visible: Visible | None
    distances: Distances


def workspace_for(source: Source, rows: Rows) -> Workspace:
    """Room for a block of these rows."""
    logits = rows.count * rows.per_sequence * source.shape.heads * source.shape.keys
    return Workspace(min(budget(source.device), logits), source.dtype, source.device)


def blocks(source: Source, rows: Rows, workspace: Workspace) -> Iterator[Block]:
    """The chosen rows of every head, each row once. Holds a few blocks' worth of memory, the copied keys of a part's
    heads included; inputs are not modified."""
    shape, size = source.shape, budget(source.device)
    width, causal = (source.key.size(3), source.causal) if isinstance(source, QueryKey) else (0, False)
    extent = Extent(rows.count, rows.per_sequence, shape.heads // source.group, source.group, shape.keys, width, causal)
    for same_rows in parts(extent, size):
        if isinstance(source, QueryKey):
            yield from _multiplied(source, rows, same_rows, size, workspace)
        else:
            yield from _given(source, rows, same_rows, size)


def _given(source: Logits, rows: Rows, same_rows: list[Part], size: int) -> Iterator[Block]:
    first, keys = same_rows[0], source.shape.keys
    hidden, position = visibility.threshold(source.logits.dtype), rows.positions(first, source.device)[:, None]
    position = position.to(source.dtype)

    @cache
    def far(start: int, stop: int) -> Distances:
        return distances(source, rows, *_of_rows(first, start, stop, position), keys)

    for part in same_rows:
        for piece in pieces(part, keys, size):
            logits = rows.take(source.logits, piece).to(source.dtype)
            yield Block(
                piece, logits, False, visibility.of_values(logits, hidden), far(piece.rows.start, piece.rows.stop)
            )


def _multiplied(
    source: QueryKey, rows: Rows, same_rows: list[Part], size: int, workspace: Workspace
) -> Iterator[Block]:
    first, keys = same_rows[0], source.shape.keys
    position = rows.positions(first, source.device)[:, None].to(source.dtype)
    per_head = source.mask is not None and source.mask.dim() > 2 and source.mask.size(-3) > 1
    shared = None if per_head else visibility.through_mask(source, rows, first)
    query = rows.take(source.query, first._replace(heads=slice(0, source.shape.heads))).to(source.dtype)

    @cache
    def of_all_heads(start: int, stop: int) -> tuple[int, Distances, Sight]:
        part, at = _of_rows(first, start, stop, position)
        reach = min(keys, rows.end(part)) if source.causal else keys
        return reach, distances(source, rows, part, at, reach), visibility.without_mask(source, rows, part, at, reach)

    for part in same_rows:
        masked = visibility.through_mask(source, rows, part) if per_head else shared
        key = rows.of_sequences(source.key[:, part.key_heads], part)
        several = pieces(part, keys, size)
        # A head's worth is copied: products are faster then.
        key = key.to(source.dtype) if len(several) == 1 else workspace.keys(key)
        across = key.flatten(0, 1).transpose(1, 2)
        for piece in several:
            reach, far, unmasked = of_all_heads(piece.rows.start, piece.rows.stop)
            of_part = slice(piece.rows.start - part.rows.start, piece.rows.stop - part.rows.start)
            logits = _product(query[:, part.heads, of_part], across[..., :reach], source.scale, workspace)
            sight = masked.narrowed(of_part, reach) if masked else unmasked
            yield Block(piece, logits, True, _to_softmax(source, rows, piece, logits, sight), far)


def _of_rows(part: Part, start: int, stop: int, position: Tensor) -> tuple[Part, Tensor]:
    """Some rows of a part, and their positions out of the part's."""
    at = slice(start - part.rows.start, stop - part.rows.start)
    return part._replace(rows=slice(start, stop)), position[..., at]


def _product(query: Tensor, across: Tensor, scale: float, workspace: Workspace) -> Tensor:
    """scale · query · keyᵀ: (sequences, heads, rows, keys), in the workspace. across: (sequences · key heads, width,
    keys); heads that share a key head are rows of one product."""
    folded = query.reshape(across.size(0), -1, query.size(3))
    logits = workspace.logits((*query.shape[:3], across.size(2)))
    room = logits.view(*folded.shape[:2], across.size(2))
    torch.baddbmm(workspace.zero, folded, across, beta=0, alpha=scale, out=room)
    return logits


def _to_softmax(source: QueryKey, rows: Rows, part: Part, logits: Tensor, sight: Sight) -> Visible | None:
    """Makes the input of the softmax of the product; returns what is seen, None where the position says it."""
    if source.softcap is not None:
        logits.div_(source.softcap).tanh_().mul_(source.softcap)
    if source.modify is not None:
        logits.copy_(source.modify(logits, *_indices(rows, part, logits)))  # may return a tensor of the user's
    if sight.bias is not None:
        logits[..., sight.start :].add_(sight.bias)
    return visibility.of_values(logits) if source.modify is not None else sight.visible


def _indices(rows: Rows, part: Part, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of batch, head, query and key, four-dimensional each."""
    device = logits.device
    batch = rows.batch_indices(part, device)[:, None, None, None]
    head = torch.arange(part.heads.start, part.heads.stop, device=device)[None, :, None, None]
    query = rows.positions(part, device)[:, None, :, None]
    return batch, head, query, torch.arange(logits.size(-1), device=device)[None, None, None]

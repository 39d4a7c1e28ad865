"""The logits of chosen rows, block by block, with what each row sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprobe.statistics.attention import visibility
from torchprobe.statistics.attention.parts import Extent, Part, budget, parts, pieces
from torchprobe.statistics.attention.rows import Rows
from torchprobe.statistics.attention.sources import Logits, QueryKey, Source
from torchprobe.statistics.attention.visibility import Sight, Visible


@dataclass(frozen=True)
class Block:
    """logits: (sequences, heads, rows, keys), scaled and masked; the keys end where no row of the block sees more.
    scratch: whether they may be overwritten. distance: abs(query index - key index), (sequences or 1, 1, rows, keys).
    """

    part: Part
    logits: Tensor
    scratch: bool
    visible: Visible
    distance: Tensor


def blocks(source: Source, rows: Rows) -> Iterator[Block]:
    """The chosen rows of every head, each row once. Holds a few blocks' worth of memory, the copied keys of a part's
    heads included; inputs are not modified."""
    shape, size = source.shape, budget(source.device)
    width, causal = (source.key.size(3), source.causal) if isinstance(source, QueryKey) else (0, False)
    extent = Extent(rows.count, rows.per_sequence, shape.heads // source.group, source.group, shape.keys, width, causal)
    for same_rows in parts(extent, size):
        if isinstance(source, QueryKey):
            yield from _multiplied(source, rows, same_rows, size)
        else:
            yield from _given(source, rows, same_rows, size)


def _given(source: Logits, rows: Rows, same_rows: list[Part], size: int) -> Iterator[Block]:
    sight = visibility.from_afar(source, rows, same_rows[0])
    hidden = visibility.threshold(source.logits.dtype)
    for part in same_rows:
        for piece in pieces(part, source.shape.keys, size):
            logits = rows.take(source.logits, piece).to(source.dtype)
            visible = visibility.of_values(logits, hidden)
            yield Block(piece, logits, False, visible, sight.narrowed(piece.rows, source.shape.keys).distance)


def _multiplied(source: QueryKey, rows: Rows, same_rows: list[Part], size: int) -> Iterator[Block]:
    first, keys = same_rows[0], source.shape.keys
    per_head = source.mask is not None and source.mask.dim() > 2 and source.mask.size(-3) > 1
    shared = None if per_head else visibility.see(source, rows, first)
    query = rows.take(source.query, first._replace(heads=slice(0, source.shape.heads))).to(source.dtype)
    for part in same_rows:
        sight = shared or visibility.see(source, rows, part)
        key = rows.of_sequences(source.key[:, part.key_heads], part).to(source.dtype)
        several = pieces(part, keys, size)
        if len(several) > 1:
            key = key.contiguous()  # a head's worth; products are faster then
        for piece in several:
            reach = min(keys, rows.end(piece)) if source.causal else keys
            of_part = slice(piece.rows.start - part.rows.start, piece.rows.stop - part.rows.start)
            logits = _product(query[:, part.heads, of_part], key[:, :, :reach], source.scale)
            yield _block(source, rows, piece, logits, sight.narrowed(piece.rows, reach))


def _product(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """scale · query · keyᵀ: (sequences, heads, rows, keys). Heads that share a key head are rows of one product."""
    folded = query.reshape(len(query) * key.size(1), -1, query.size(3))
    across = key.flatten(0, 1).transpose(1, 2)
    product = torch.baddbmm(folded.new_zeros(1, 1, 1), folded, across, beta=0, alpha=scale)
    return product.view(*query.shape[:3], key.size(2))


def _block(source: QueryKey, rows: Rows, part: Part, logits: Tensor, sight: Sight) -> Block:
    """From the product, which is overwritten, to the input of the softmax."""
    if source.softcap is not None:
        logits.div_(source.softcap).tanh_().mul_(source.softcap)
    if source.modify is not None:  # which may return a tensor of the user's
        modified = source.modify(logits, *_indices(rows, part, logits)).to(logits.dtype).expand(logits.shape)
        logits = modified.clone() if sight.bias is None else modified + sight.bias
    elif sight.bias is not None:
        logits.add_(sight.bias)
    visible = sight.visible or visibility.of_values(logits)
    return Block(part, logits, True, visible, sight.distance)


def _indices(rows: Rows, part: Part, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of batch, head, query and key, four-dimensional each."""
    device = logits.device
    batch = rows.batch_indices(part, device)[:, None, None, None]
    head = torch.arange(part.heads.start, part.heads.stop, device=device)[None, :, None, None]
    query = rows.positions(part, device)[:, None, :, None]
    return batch, head, query, torch.arange(logits.size(-1), device=device)[None, None, None]

"""The logits of chosen rows, block by block, with what each row sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprobe.statistics.attention import visibility
from torchprobe.statistics.attention.parts import Extent, Part, budget, parts
from torchprobe.statistics.attention.rows import Rows
from torchprobe.statistics.attention.sources import Logits, QueryKey, Source
from torchprobe.statistics.attention.visibility import Visibility


@dataclass(frozen=True)
class Block:
    """logits: (sequences, heads, rows, keys), scaled and masked; the keys end where no row of the block sees more.
    scratch: whether they may be overwritten. distance: abs(query index - key index), (sequences or 1, 1, rows, keys).
    """

    part: Part
    logits: Tensor
    scratch: bool
    visible: Visibility
    distance: Tensor


def blocks(source: Source, rows: Rows) -> Iterator[Block]:
    """The chosen rows of every head, each row once. Holds a few blocks' worth of memory, and never a copy of all
    keys; inputs are not modified."""
    shape = source.shape
    width = source.key.size(3) if isinstance(source, QueryKey) else 0
    extent = Extent(rows.count, rows.per_sequence, shape.heads // source.group, source.group, shape.keys, width)
    for same_rows in parts(extent, budget(source.device)):
        if isinstance(source, QueryKey):
            yield from _multiplied(source, rows, same_rows)
        else:
            yield from _given(source, rows, same_rows)


def _given(source: Logits, rows: Rows, same_rows: list[Part]) -> Iterator[Block]:
    distance = visibility.offsets(rows, same_rows[0], source.shape.keys, source.dtype, source.device).abs_()
    hidden = visibility.threshold(source.logits.dtype)
    for part in same_rows:
        logits = rows.take(source.logits, part).to(source.dtype)
        yield Block(part, logits, False, visibility.of_values(logits, hidden), distance)


def _multiplied(source: QueryKey, rows: Rows, same_rows: list[Part]) -> Iterator[Block]:
    keys = source.shape.keys
    if source.causal:
        keys = min(keys, rows.end(same_rows[0]))
    offset = visibility.offsets(rows, same_rows[0], keys, source.dtype, source.device)
    distance = offset.abs()
    per_head = source.mask is not None and source.mask.dim() > 2 and source.mask.size(-3) > 1
    shared = None if per_head else _seen(source, rows, same_rows[0], offset)
    query = rows.take(source.query, _all_heads(same_rows)).to(source.dtype)
    for part in same_rows:
        bias, visible = shared or _seen(source, rows, part, offset)
        logits = _product(source, query[:, part.heads], rows.of_sequences(source.key[:, part.key_heads, :keys], part))
        if source.modify is not None:  # which may return a tensor of the user's
            modified = _modified(source, rows, part, logits)
            logits = modified.clone() if bias is None else modified + bias
        elif bias is not None:
            logits.add_(bias)
        if visible is None:
            visible = visibility.of_values(logits, visibility.threshold(logits.dtype))
        yield Block(part, logits, True, visible, distance)


def _seen(source: QueryKey, rows: Rows, part: Part, offset: Tensor) -> tuple[Tensor | None, Visibility | None]:
    """What to add to the logits, and what is visible; None where that is to be told from the logits."""
    bias = visibility.hiding(source, rows, part, offset)
    if source.modify is not None:
        return bias, None
    if source.mask is None or bias is None:
        return bias, visibility.without_mask(source, rows, part)
    floating = source.mask.dtype if source.mask.is_floating_point() else bias.dtype
    return bias, visibility.of_values(bias, visibility.threshold(floating))


def _all_heads(same_rows: list[Part]) -> Part:
    return same_rows[0]._replace(heads=slice(0, same_rows[-1].heads.stop))


def _product(source: QueryKey, query: Tensor, key: Tensor) -> Tensor:
    """scale · query · keyᵀ, capped: (sequences, heads, rows, keys). The heads of a key head are rows of one product."""
    folded = query.reshape(len(query) * key.size(1), -1, query.size(3))
    across = key.to(source.dtype).flatten(0, 1).transpose(1, 2)
    product = torch.baddbmm(folded.new_zeros(1, 1, 1), folded, across, beta=0, alpha=source.scale)
    if source.softcap is not None:
        product.div_(source.softcap).tanh_().mul_(source.softcap)
    return product.view(*query.shape[:3], key.size(2))


def _modified(source: QueryKey, rows: Rows, part: Part, logits: Tensor) -> Tensor:
    assert source.modify is not None
    device = logits.device
    batch = rows.batch_indices(part, device)[:, None, None, None]
    head = torch.arange(part.heads.start, part.heads.stop, device=device)[:, None, None]
    query = rows.positions(part, device)[:, None, :, None]
    key = torch.arange(logits.size(-1), device=device)
    return source.modify(logits, batch, head, query, key).to(logits.dtype).expand(logits.shape)

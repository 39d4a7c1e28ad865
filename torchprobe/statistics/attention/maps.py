"""The picture: attention probabilities of one sequence, pooled to an image's size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from torchprobe.statistics.attention.blocks import Block, blocks, workspace_for
from torchprobe.statistics.attention.rows import Rows, strata, unpadded
from torchprobe.statistics.attention.sources import QueryKey, Source

ROWS_PER_PIXEL = 4
"""Query rows that stand for a pixel row which pools more of them."""


@torch.no_grad()
def attention_map(
    source: Source, size: int = 128, batch_index: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """Probabilities of one sequence, pooled: (heads, ⌈queries/a⌉, ⌈keys/b⌉), at most size by size a head.

    A pixel pools a = ⌈queries/size⌉ query rows and b = ⌈keys/size⌉ keys (fewer at the lower and right edge): the
    mean over the rows of the sum over the keys, so a pixel row sums to 1 (to less with `sinks`). Where a > 4, four
    rows chosen at random out of each a stand for them; without a generator they are the same at every call. Rows
    that `compute` leaves out are left out; a pixel row without any other is 0.

    Costs about as much time and memory as `compute` with 4·size rows. Makes no host read. Raises ValueError for a
    size below 1 and for a batch_index out of range.
    """
    batch, heads, queries, keys = source.shape
    if size < 1:
        raise ValueError(f"size: got {size}, takes a positive number of pixels, such as 128")
    if not 0 <= batch_index < batch:
        raise ValueError(f"batch_index: got {batch_index}, takes 0 to {batch - 1}: the batch has {batch} sequences")
    if 0 in source.shape:
        return torch.zeros(heads, min(queries, size), min(keys, size), dtype=source.dtype, device=source.device)
    tall, wide = -(-queries // size), -(-keys // size)
    chosen, counts = _rows(source, tall, batch_index, generator)
    table = torch.empty(heads, chosen.per_sequence, -(-keys // wide) + 1, dtype=source.dtype, device=source.device)
    for block in blocks(source, chosen, workspace_for(source, chosen)):
        table[block.part.heads, block.part.rows] = _pooled(block, source, wide, table.size(-1))[0]
    table = torch.where(counts & (table[..., -1:] > 0), table, 0)
    sums = table.unflatten(1, (-1, min(tall, ROWS_PER_PIXEL))).sum(2)
    mean: Tensor = sums[..., :-1] / sums[..., -1:].clamp(min=1)
    return mean


def _rows(source: Source, tall: int, batch_index: int, generator: torch.Generator | None) -> tuple[Rows, Tensor]:
    """For every pixel row all its query rows, or some; and which of them count: (rows, 1)."""
    queries, device = source.shape.queries, source.device
    pixels, each = -(-queries // tall), min(tall, ROWS_PER_PIXEL)
    within = strata(pixels, each, tall, generator, device)
    if each < tall:
        within[-1] = within[-1] * (queries - (pixels - 1) * tall) // tall
    index = (torch.arange(pixels, device=device)[:, None] * tall + within).flatten()
    sequence = torch.full((1,), batch_index, device=device)
    chosen = Rows(1, pixels * each, pixels * tall, sequence, index.clamp(max=queries - 1)[None], together=each)
    counts = (index < queries)[:, None]
    kept = unpadded(source, chosen)
    return chosen, counts if kept is None else counts & kept[0, 0, :, None]


def _pooled(block: Block, source: Source, wide: int, columns: int) -> Tensor:
    """Probabilities of a block summed over `wide` keys, and 1 for a valid row: (sequences, heads, rows, columns)."""
    largest = block.logits.amax(-1, keepdim=True)
    valid = largest.isfinite()
    if block.visible is not None:
        valid = valid & (block.visible.count > 0)[..., None]
    sink = None
    if isinstance(source, QueryKey) and source.sinks is not None:
        sink = source.sinks[block.part.heads, None, None].to(largest.dtype)
        largest = largest.maximum(sink)
    weight = (block.logits - largest).exp_()
    total = weight.sum(-1, keepdim=True)
    weight = functional.pad(weight, (0, (columns - 1) * wide - weight.size(-1)))
    pooled = weight.unflatten(-1, (-1, wide)).sum(-1)
    if sink is not None:
        total = total + (sink - largest).exp()
    return torch.cat((torch.where(valid, pooled / total, 0), valid.expand_as(total)), dim=-1)

"""What the logits of a head's query rows say: sums over the rows, and a picture of one sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from torchprobe.statistics.attention.blocks import Block, Workspace, blocks, workspace_for
from torchprobe.statistics.attention.keys import by_position, totals
from torchprobe.statistics.attention.rows import Rows, Tile, choose, strata, unpadded
from torchprobe.statistics.attention.sources import Logits, QueryKey, Source
from torchprobe.statistics.attention.sums import FIELDS, MAX_LOGIT, ROWS, Columns, Measured
from torchprobe.statistics.dtypes import row_dtype

ROWS_PER_PIXEL = 4
"""Query rows that stand for a pixel row which pools more of them."""

FLOOR = -80.0
"""Logits further below the row's maximum count as this: exp(-80) is 2e-35, and no slow denormal number."""


@torch.no_grad()
def compute(source: Source, rows: int | Literal["all"], generator: torch.Generator | None) -> Tensor:
    """The row of every head: shape (heads, 8), `row_dtype`, on the device of the source.

    rows: how many query rows a head to read, of the whole batch; all of them where there are no more, and for
        "all". `is_sampled` says which it was. A sample is of `rows.choose`: means are unbiased, but for padding,
        which makes them ratio estimates, and max_logit is a lower bound.
    generator: a private one, on any device; without it the rows are the same at every call.

    For query i with logits s over the keys j that it sees, m = max s, e = exp(s - m), Z = Σe: entropy is
    log Z - Σe·(s - m) / Z in nats, never negative; normalized_entropy is that over the log of their number;
    max_probability 1/Z; max_logit m; sink the probability of the first of them; distance Σ e·abs(i - j) / Z in
    tokens. With `sinks`, probabilities are what is left after the sink's column is dropped from the softmax, as
    libraries return them: they do not sum to 1, and the entropy -Σ p log p is over them alone.

    A row counts if it is not padded, sees a key, and has no NaN or +inf among its logits (where the softmax is
    NaN); all others are left out of every column. Arithmetic is in float32, in float64 for float64 inputs: entropy
    is within 1e-4 of exact arithmetic on the same inputs, for logits of magnitudes up to 1000.

    Costs a matrix product of the chosen rows with the keys, and as much again: on a CPU core about 3 ns for each of
    rows times heads times keys, two thirds of it where `causal`. Memory is a few blocks of `rows.budget` logits,
    and six numbers a row: 105 MiB for 512 rows of 12 heads by 131,072 keys. Makes no host read and leaves the global
    generators alone. Call it with autocast off.
    Raises ValueError for a `rows` that is neither "all" nor a positive integer.
    """
    return measure(source, choose(source, rows, generator)).rows


@torch.no_grad()
def measure(source: Source, chosen: Rows) -> Measured:
    """The same for rows that are chosen, not added up yet: `finish` adds up several together."""
    shape = source.shape
    if 0 in shape:
        return Measured(torch.zeros(shape.heads, len(FIELDS), dtype=row_dtype(source.device), device=source.device))
    table = torch.empty(6, chosen.count, shape.heads, chosen.per_sequence, dtype=source.dtype, device=source.device)
    workspace = workspace_for(source, chosen)
    for block in blocks(source, chosen, workspace):
        _fill(table[:, block.tile.sequences, block.tile.heads, block.tile.rows], block, workspace)
    count = by_position(source, chosen)
    if count is not None:
        table[-1].copy_(count)
    table = table.transpose(1, 2)
    everything = Tile(slice(0, chosen.count), slice(0, chosen.per_sequence), *[slice(0, shape.heads)] * 2)
    as_weights = isinstance(source, Logits) and source.as_weights
    return Measured(Columns(table, _sinks(source, chosen, everything), unpadded(source, chosen), as_weights))


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
    chosen, counts = _pixel_rows(source, tall, batch_index, generator)
    table = torch.empty(heads, chosen.per_sequence, -(-keys // wide) + 1, dtype=source.dtype, device=source.device)
    for block in blocks(source, chosen, workspace_for(source, chosen)):
        table[block.tile.heads, block.tile.rows] = _pooled(
            block, source, wide, table.size(-1), _sinks(source, chosen, block.tile)
        )[0]
    table = torch.where(counts & (table[..., -1:] > 0), table, 0)
    sums = table.unflatten(1, (-1, min(tall, ROWS_PER_PIXEL))).sum(2)
    mean: Tensor = sums[..., :-1] / sums[..., -1:].clamp(min=1)
    return mean


def combine(a: Tensor, b: Tensor) -> Tensor:
    """The rows of two calls' query rows together, from the rows of each: shapes (..., 8), broadcast.

    Sums add up, so a sampled call weighs as many query rows as it has read. Rows of zeros are the identity.
    """
    both = a + b
    a_only, b_only = b[..., ROWS] == 0, a[..., ROWS] == 0
    largest = torch.maximum(a[..., MAX_LOGIT], b[..., MAX_LOGIT])
    largest = torch.where(a_only, a[..., MAX_LOGIT], torch.where(b_only, b[..., MAX_LOGIT], largest))
    both[..., MAX_LOGIT] = largest
    return both


def summarise(row: Sequence[float]) -> dict[str, float]:
    """One head's row in readable terms, on the host: means under the names of FIELDS, and the two counts.

    Means over no row are left out: normalized_entropy and sink without a row that sees two keys, and all without a
    valid row. Raises ValueError for a row of another length.
    """
    if len(row) != len(FIELDS):
        raise ValueError(f"row: got {len(row)} numbers, takes {len(FIELDS)} ({', '.join(FIELDS)}), as compute returns")
    values = dict(zip(FIELDS, row, strict=True))
    rows, with_choice = values["rows"], values["rows_with_choice"]
    means = {"rows": rows, "rows_with_choice": with_choice}
    if rows:
        means |= {name: values[name] / rows for name in ("entropy", "max_probability")}
        if not math.isnan(values["distance"]):  # else it is not known where queries stand
            means["distance"] = values["distance"] / rows
        if values["max_logit"] > -math.inf:  # else it is not known: of weights that no softmax gave
            means["max_logit"] = values["max_logit"]
    if with_choice:
        means |= {name: values[name] / with_choice for name in ("normalized_entropy", "sink")}
    return means


def _fill(columns: Tensor, block: Block, workspace: Workspace) -> None:
    """What a row's statistics are made of, into columns (6, sequences, heads, rows): m, Z, Σe·(s - m), e of the first
    visible key, Σe·distance, and the number of visible keys. Overwrites nothing that is not its own."""
    logits, (largest, total, below_sum, sink, distance, count) = block.logits, columns.unbind()
    torch.amax(logits, -1, out=largest)
    room = logits if block.scratch else workspace.logits(logits.shape)
    below = torch.sub(logits, largest[..., None], out=room).clamp_(min=FLOOR)
    weight = torch.exp(below, out=workspace.weights(logits.shape))
    torch.sum(below.mul_(weight), -1, out=below_sum)
    if block.visible is None:
        sink.copy_(weight[..., 0])
    else:
        first = block.visible.first.nan_to_num(0.0).clamp(max=weight.size(-1) - 1)  # in bounds for any row
        sink.copy_(weight.gather(-1, first.long().expand(weight.shape[:-1])[..., None])[..., 0])
        count.copy_(block.visible.count)
    totals(weight, block.distances, total, distance)


def _sinks(source: Source, rows: Rows, tile: Tile) -> Tensor | None:
    """The sink logits of a tile's rows: (sequences, heads, rows, 1), or sizes of 1 where they are the same."""
    if source.sinks is None:
        return None
    if isinstance(source, QueryKey):
        return source.sinks[None, tile.heads, None, None].to(source.dtype)
    sinks = rows.take(source.sinks, tile).to(source.dtype)
    return sinks if source.shift is None else sinks + rows.take(source.shift, tile).to(source.dtype)


def _pixel_rows(source: Source, tall: int, batch_index: int, generator: torch.Generator | None) -> tuple[Rows, Tensor]:
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


def _pooled(block: Block, source: Source, wide: int, columns: int, sink: Tensor | None) -> Tensor:
    """Probabilities of a block summed over `wide` keys, and 1 for a valid row: (sequences, heads, rows, columns)."""
    largest = block.logits.amax(-1, keepdim=True)
    valid = largest.isfinite()
    if block.visible is not None:
        valid = valid & (block.visible.count > 0)[..., None]
    if sink is not None:
        largest = largest.maximum(sink)
    weight = (block.logits - largest).exp_()
    total = weight.sum(-1, keepdim=True)
    weight = functional.pad(weight, (0, (columns - 1) * wide - weight.size(-1)))
    pooled = weight.unflatten(-1, (-1, wide)).sum(-1)
    if isinstance(source, Logits) and source.as_weights:
        pooled, total = pooled * largest.exp(), torch.ones_like(total)
    if sink is not None:
        total = total + (sink - largest).exp()
    return torch.cat((torch.where(valid, pooled / total, 0), valid.expand_as(total)), dim=-1)

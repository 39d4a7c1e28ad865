"""Which query rows are read: all, or a stratified sample over all sequences, the same for every head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchprobe.statistics.attention.parts import Part
from torchprobe.statistics.attention.sources import Source
from torchprobe.statistics.dtypes import row_dtype

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Rows:
    """`per_sequence` query rows of each of `count` sequences, one from each of as many equal strata of `span` rows.

    sequences: (count,) their indices; None stands for all, in order. queries: (count, per_sequence), ascending;
    None stands for all, in order. Both int64, on the device of the source. together: so many rows may lie anywhere
    after the first stratum of theirs.
    """

    count: int
    per_sequence: int
    span: int
    sequences: Tensor | None = None
    queries: Tensor | None = None
    together: int = 1

    def positions(self, part: Part, device: torch.device) -> Tensor:
        """The query indices of a part: (sequences, rows), or (1, rows) where all sequences have the same."""
        if self.queries is None:
            return torch.arange(part.rows.start, part.rows.stop, device=device)[None]
        return self.queries[part.sequences, part.rows]

    def start(self, part: Part) -> int:
        """A bound that no query index of a part lies below: known on the host, and one less for rounding."""
        first = int(part.rows.start) // self.together * self.together
        return max(0, first * self.span // self.per_sequence - 1)

    def end(self, part: Part) -> int:
        """A bound that all query indices of a part lie below: the end of its last stratum, known on the host."""
        return -(-int(part.rows.stop) * self.span // self.per_sequence)

    def batch_indices(self, part: Part, device: torch.device) -> Tensor:
        """The sequences of a part, as indices into the batch: (sequences,)."""
        if self.sequences is None:
            return torch.arange(part.sequences.start, part.sequences.stop, device=device)
        return self.sequences[part.sequences]

    def of_sequences(self, x: Tensor, part: Part) -> Tensor:
        """The sequences of a part: x (batch or 1, …) -> (sequences or 1, …), a view where it can be."""
        if x.size(0) == 1:
            return x
        if self.sequences is None:
            return x[part.sequences]
        return x.index_select(0, self.sequences[part.sequences])

    def take(self, x: Tensor, part: Part) -> Tensor:
        """The rows of a part: x (batch, heads, queries, …) -> (sequences, heads, rows, …); sizes of 1 stay."""
        x = self.of_sequences(x if x.size(1) == 1 else x[:, part.heads], part)
        if x.size(2) == 1:
            return x
        if self.queries is None:
            return x[:, :, part.rows]
        queries = self.queries[part.sequences, part.rows]
        if len(queries) == 1:  # six times as fast as the general way
            return x.index_select(2, queries[0])
        each = torch.arange(len(queries), device=x.device)[:, None]
        return x.expand(len(queries), *x.shape[1:])[each, :, queries].transpose(1, 2)


def is_sampled(source: Source, rows: int | Literal["all"]) -> bool:
    """Whether `compute(source, rows, …)` reads fewer rows than there are; told from shapes, on the host.

    Raises ValueError for a `rows` that is neither "all" nor a positive integer.
    """
    if rows == "all":
        return False
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f'rows: got {rows!r}, takes "all" or a positive number of query rows a head, such as 512')
    return source.shape.batch * source.shape.queries > rows


def choose(source: Source, rows: int | Literal["all"], generator: torch.Generator | None) -> Rows:
    """All rows where there are no more than `rows`, otherwise `rows` of them, or a few less.

    A sample has ⌊rows / batch⌋ rows of each sequence, or one row of each of `rows` sequences where the batch is
    larger. Every row of the batch is as likely as every other, so means over the sample are unbiased; where the
    strata are no whole number of rows, neighbours can choose the row that they share, and it then counts twice.
    """
    batch, _, queries, _ = source.shape
    if rows == "all" or not is_sampled(source, rows):
        return Rows(batch, queries, queries)
    count, each = min(batch, rows), max(1, rows // batch)
    chosen = strata(1, count, batch, generator, source.device)[0] if count < batch else None
    return Rows(count, each, queries, chosen, strata(count, each, queries, generator, source.device))


def unpadded(source: Source, rows: Rows) -> Tensor | None:
    """Which of the chosen rows are not padded: (sequences, 1, rows); None stands for all."""
    if source.padding is None:
        return None
    everything = Part(slice(0, rows.count), slice(0, rows.per_sequence), slice(0, 1), slice(0, 1))
    return ~rows.take(source.padding[:, None, :, None], everything)[..., 0]


def strata(count: int, each: int, size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """`count` ascending samples of `each` out of range(size), one from each of `each` equal strata: (count, each).

    The place within a stratum is uniformly random and moves on by the golden ratio from sample to sample: together
    they cover the stratum evenly, without a period. Without a generator it starts at the middle.
    """
    home = device if generator is None else generator.device
    dtype = row_dtype(home)
    stratum = torch.arange(each, device=home)
    start = torch.full((each,), 0.5, dtype=dtype, device=home)
    if generator is not None:
        start.uniform_(generator=generator)
    turn = torch.arange(count, device=home, dtype=dtype)[:, None] * GOLDEN
    index = ((start + turn).frac() + stratum).mul_(size / each).long()
    last = (stratum * size + (size + each - 1)) // each - 1  # rounding must not reach the next stratum
    return _moved(index.minimum(last), device)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device, without waiting for it."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)

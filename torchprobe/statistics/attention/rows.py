"""Which query rows are read, the same for every head: all, or a stratified sample over all sequences.

And in which tiles: small enough for a cache, or for a fraction of a device's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from torchprobe.statistics.attention.sources import Source
from torchprobe.statistics.dtypes import moved, row_dtype

T = TypeVar("T")

GOLDEN = (math.sqrt(5) - 1) / 2

CPU_LOGITS_PER_THREAD = 2**18
"""Logits a thread works on at a time: they and the temporaries of one operation are about the size of L2."""

DEVICE_LOGITS = 2**24
"""Logits to work on at a time elsewhere: 64 MiB in float32."""

PRODUCT_ROWS = 64
"""With fewer rows of one key head, their matrix product with the keys waits for the keys' memory."""

LONG = 2**23
"""Logits and distances that are made at a time for the sake of PRODUCT_ROWS, however many keys: 32 MiB in float32."""


class Tile(NamedTuple):
    """Some rows of some heads of some sequences; slices with a start and a stop, `heads` all of `key_heads`."""

    sequences: slice
    rows: slice
    heads: slice
    key_heads: slice


class Extent(NamedTuple):
    """What there is to do: sizes of the chosen rows, and of what they are multiplied with."""

    sequences: int
    rows: int
    key_heads: int
    group: int
    keys: int
    width: int
    causal: bool


@dataclass(frozen=True)
class Rows:
    """`per_sequence` query rows of each of `count` sequences, one from each of as many equal strata of `span` rows.

    sequences: (count,) their indices; None stands for all, in order. queries: (count, per_sequence), ascending;
    None stands for all, in order. Both int64, on the device of the source. together: so many rows may lie anywhere
    after the first stratum of theirs. kept: what was made of them before.
    """

    count: int
    per_sequence: int
    span: int
    sequences: Tensor | None = None
    queries: Tensor | None = None
    together: int = 1
    kept: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def remembered(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` returns, once for all attentions that read these rows; never changed by them."""
        if key not in self.kept:
            self.kept[key] = make()
        found: T = self.kept[key]
        return found

    def positions(self, tile: Tile, device: torch.device) -> Tensor:
        """The query indices of a tile: (sequences, rows), or (1, rows) where all sequences have the same."""
        if self.queries is None:
            return torch.arange(tile.rows.start, tile.rows.stop, device=device)[None]
        return self.queries[tile.sequences, tile.rows]

    def start(self, tile: Tile) -> int:
        """A bound that no query index of a tile lies below: known on the host, and one less for rounding."""
        first = int(tile.rows.start) // self.together * self.together
        return max(0, first * self.span // self.per_sequence - 1)

    def end(self, tile: Tile) -> int:
        """A bound that all query indices of a tile lie below: the end of its last stratum, known on the host."""
        return -(-int(tile.rows.stop) * self.span // self.per_sequence)

    def of_sequences(self, x: Tensor, tile: Tile) -> Tensor:
        """The sequences of a tile: x (batch or 1, …) -> (sequences or 1, …), a view where it can be."""
        if x.size(0) == 1:
            return x
        if self.sequences is None:
            return x[tile.sequences]
        return x.index_select(0, self.sequences[tile.sequences])

    def take(self, x: Tensor, tile: Tile) -> Tensor:
        """The rows of a tile: x (batch, heads, queries, …) -> (sequences, heads, rows, …); sizes of 1 stay."""
        x = self.of_sequences(x if x.size(1) == 1 else x[:, tile.heads], tile)
        if x.size(2) == 1:
            return x
        if self.queries is None:
            return x[:, :, tile.rows]
        queries = self.queries[tile.sequences, tile.rows]
        if len(queries) == 1:  # six times as fast as the general way
            return x.index_select(2, queries[0])
        each = self.remembered(("each", len(queries)), lambda: torch.arange(len(queries), device=x.device)[:, None])
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
    everything = Tile(slice(0, rows.count), slice(0, rows.per_sequence), slice(0, 1), slice(0, 1))
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
    return moved(index.minimum(last), device)


def budget(device: torch.device) -> int:
    """How many logits to work on at a time."""
    return CPU_LOGITS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else DEVICE_LOGITS


def tiles(extent: Extent, size: int) -> Iterator[list[Tile]]:
    """All of it, in lists of tiles that differ in their heads alone; for `row_tiles` to cut to `size` logits."""
    sequences, rows, key_heads = _steps(extent, size)
    for in_batch in _slices(0, extent.sequences, sequences):
        for in_rows in _slices(0, extent.rows, rows):
            yield [
                Tile(in_batch, in_rows, slice(s.start * extent.group, s.stop * extent.group), s)
                for s in _slices(0, extent.key_heads, key_heads)
            ]


def row_tiles(tile: Tile, keys: int, size: int) -> list[Tile]:
    """The tile in tiles of about `size` logits, that differ in their rows alone."""
    heads, key_heads = _length(tile.heads), _length(tile.key_heads)
    row = keys * heads * _length(tile.sequences)
    step = max(1, size // row, min(PRODUCT_ROWS * key_heads // heads, LONG // row))
    return [tile._replace(rows=rows) for rows in _slices(tile.rows.start, tile.rows.stop, step)]


def _steps(extent: Extent, size: int) -> tuple[int, int, int]:
    """Sequences, rows and key heads of a tile: whole sequences, or rows and heads of one."""
    _, rows, key_heads, group, keys, width, causal = extent
    row = group * keys
    sequence = key_heads * max(row * rows, keys * width)  # logits, or keys: those of several sequences are copied
    if sequence <= size:
        return size // sequence, rows, key_heads
    rows = min(rows, max(1, LONG // keys))
    product = min(rows, max(1, PRODUCT_ROWS // group)) if causal else rows  # few rows: they see fewer keys
    return 1, rows, min(key_heads, max(1, size // (row * product)))


def _length(s: slice) -> int:
    return int(s.stop) - int(s.start)


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]

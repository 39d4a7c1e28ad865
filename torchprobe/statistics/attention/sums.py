"""From what was read of query rows to the row of each head: of one attention, or of several together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.statistics.dtypes import row_dtype

FIELDS = (
    "entropy",
    "normalized_entropy",
    "max_probability",
    "max_logit",
    "sink",
    "distance",
    "rows",
    "rows_with_choice",
)
"""Columns of a head's row: sums over its `rows` valid query rows, but max_logit, which is the maximum.
normalized_entropy and sink are over the `rows_with_choice` that see at least two keys."""

MAX_LOGIT, ROWS = FIELDS.index("max_logit"), FIELDS.index("rows")

_LARGE = 2**20
"""Columns of more elements than these are added up at once: they would take more memory than waiting saves time."""


class Columns(NamedTuple):
    """Of the query rows of one attention.

    table: (6, heads, sequences, rows), see `heads`; sinks: broadcastable to (sequences, heads, rows, 1); unpadded:
    (sequences, 1, rows); as_weights: logits are logarithms of weights, which are what they are.
    """

    table: Tensor
    sinks: Tensor | None
    unpadded: Tensor | None
    as_weights: bool

    def flat(self) -> tuple[Tensor, Tensor | None]:
        """(6, heads, query rows), and which of those are not padded."""
        unpadded = None if self.unpadded is None else self.unpadded.flatten().expand(self.table.size(1), -1)
        return self.table.flatten(2), unpadded

    def statistics(self) -> Tensor:
        """Of each query row: (4, heads, query rows)."""
        return (_weights(self.table) if self.as_weights else _statistics(self.table, self.sinks)).flatten(2)

    def kind(self) -> object:
        """Those that agree in it can be added up together."""
        alone = id(self) if self.sinks is not None or self.as_weights else None
        return self.table.shape[2:], self.table.dtype, self.table.device, self.unpadded is None, alone


class Measured:
    """The row of every head of one attention, or what it will be added up of: `finish` does so for several at once."""

    def __init__(self, found: Tensor | Columns) -> None:
        self._found = found
        if isinstance(found, Columns) and found.table.numel() > _LARGE:
            finish([self])

    @property
    def columns(self) -> Columns | None:
        """What is not added up yet."""
        return self._found if isinstance(self._found, Columns) else None

    @property
    def rows(self) -> Tensor:
        """(heads, 8), `row_dtype`."""
        if isinstance(self._found, Columns):
            finish([self])
        assert isinstance(self._found, Tensor)
        return self._found

    @property
    def heads(self) -> int:
        """How many."""
        return self._found.table.size(1) if isinstance(self._found, Columns) else self._found.size(0)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._found.table.device if isinstance(self._found, Columns) else self._found.device

    def take(self, rows: Tensor) -> None:
        """It is added up."""
        self._found = rows


@torch.no_grad()
def finish(several: Iterable[Measured]) -> None:
    """Add up what was measured: what is alike together, in as many operations as one alone."""
    kinds: dict[object, list[tuple[Measured, Columns]]] = {}
    for each in several:
        columns = each.columns
        if columns is not None:
            kinds.setdefault(columns.kind(), []).append((each, columns))
    for alike in kinds.values():
        rows = _added_up([columns for _, columns in alike])
        for (each, _), of_heads in zip(alike, rows.split([each.heads for each, _ in alike]), strict=True):
            each.take(of_heads)


def _added_up(alike: list[Columns]) -> Tensor:
    if len(alike) == 1:
        table, unpadded = alike[0].flat()
        return _sums(table, alike[0].statistics(), unpadded)
    flat = [columns.flat() for columns in alike]
    table = torch.cat([table for table, _ in flat], 1)
    masks = [mask for _, mask in flat if mask is not None]
    return _sums(table, _statistics(table, None), torch.cat(masks) if masks else None)


def _sums(table: Tensor, statistics: Tensor, unpadded: Tensor | None) -> Tensor:
    """The row of every head from the columns of its query rows, (6, heads, rows), their statistics, (4, …), and which
    of them are not padded."""
    largest, count = table[0], table[-1]
    valid = (count > 0) & largest.isfinite()
    if unpadded is not None:
        valid &= unpadded
    choice = valid & (count > 1)
    entropy, max_probability, sink, distance = statistics.unbind()
    normalized = (entropy / count.clamp(min=2).log()).clamp(max=1)
    values = torch.stack((entropy, normalized, max_probability, sink, distance))
    sums = torch.where(torch.stack((valid, choice, valid, choice, valid)), values, 0)
    sums = sums.sum(-1, dtype=row_dtype(table.device))
    rows = torch.stack((valid, choice)).sum(-1)
    highest = torch.where(valid, largest, -torch.inf).amax(-1)
    highest = torch.where(rows[0] > 0, highest, 0)
    return torch.cat((sums[:MAX_LOGIT], highest[None], sums[MAX_LOGIT:], rows)).T.contiguous()


def _weights(table: Tensor) -> Tensor:
    """As `_statistics`, of weights p = exp(s) that are taken as they are."""
    largest, total, below, first, distance, _ = table
    entropy, scale = (-below - largest * total).clamp(min=0), largest.exp()
    return torch.stack((entropy * scale, scale, first * scale, distance * scale))


def _statistics(table: Tensor, sinks: Tensor | None) -> Tensor:
    """Entropy, largest probability, sink and distance of every query row: (4, heads, sequences, rows).

    table: (6, heads, sequences, rows); sinks: broadcastable to (sequences, heads, rows, 1). A sink logit above m is the
    maximum that everything is relative to: the columns then shrink by exp(m - sink).
    """
    largest, total, below, first, distance, _ = table
    if sinks is None:
        entropy = (total.log() - below / total).clamp(min=0)
        return torch.stack((entropy, 1 / total, first / total, distance / total))
    sink = sinks[..., 0].transpose(0, 1)
    excess = (sink - largest).clamp(min=0)
    shrink = (-excess).exp()
    whole = shrink * total + (sink - largest - excess).exp()
    entropy = shrink * (total * (whole.log() + excess) - below) / whole
    return torch.stack((entropy.clamp(min=0), shrink / whole, shrink * first / whole, shrink * distance / whole))

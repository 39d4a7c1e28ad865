"""Hand-written logits as a source of statistics, with what was taken off their rows and with sink logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from torchprobe.statistics.attention import Logits, QueryKey, Source
from torchprobe.statistics.attention.keys import threshold


@dataclass(frozen=True)
class Given:
    """Looks logits up instead of computing them, so that only the rows that are read are changed.

    logits: (batch, heads, queries, keys); shift: (batch, heads, queries, 1), to be put on again.
    """

    logits: Tensor
    shift: Tensor | None

    def __call__(self, logits: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The logits of these indices."""
        found = self.logits[batch, head, query, key].to(logits.dtype)
        found = found.masked_fill(found <= threshold(self.logits.dtype), -math.inf)
        if self.shift is None:
            return found
        return found + self.shift[batch, head, query, 0].to(logits.dtype)


def source_of(logits: Tensor, padding: Tensor | None, shift: Tensor | None, sinks: Tensor | None) -> Source:
    """logits: (batch, heads, queries, keys), shift: (batch, heads, queries, 1), sinks: (batch, heads, queries, 1), the
    same of each head everywhere once the shift is put on again."""
    if shift is None and sinks is None:
        return Logits(logits, padding)
    batch, heads, queries, keys = logits.shape
    nothing = logits.new_zeros(1, 1, 1, 1)
    given = Given(logits, shift)
    if sinks is not None:
        sinks = sinks[0, :, 0, 0] if shift is None else (sinks + shift)[0, :, 0, 0]
    return QueryKey(
        nothing.expand(batch, heads, queries, 1),
        nothing.expand(batch, heads, keys, 1),
        scale=1.0,
        padding=padding,
        modify=given,
        sinks=sinks,
    )

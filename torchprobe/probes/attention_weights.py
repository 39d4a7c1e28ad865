"""Attention probabilities that are handed in: the statistics of `Attention`, and whether a head has collapsed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.probes.attention import Attention
from torchprobe.records import Value
from torchprobe.statistics import attention

COLLAPSE = 0.1  # nats: a head whose mean entropy is below this attends to one key

_MEANING = f"1 when the mean entropy of a head is below {COLLAPSE} nats, else 0."
_MAX_LOGIT = "max_logit"  # which probabilities do not tell


class AttentionWeights(Attention):
    """Statistics of the probabilities of an attention: as `Attention` has them, but for its logits.

    An entry of 0 is a key that is not visible. Rows are taken relative to their sum, which dropout changes.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def compute(self, tensor: Tensor) -> Tensor:
        """tensor: (batch, heads, queries, keys), floating. Returns (heads, len(fields)). Takes a log of every entry."""
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        source = attention.Logits(wide.log())
        rows = attention.compute(source, self.rows, None)
        sampled = rows.new_full((len(rows), 1), float(attention.is_sampled(source, self.rows)))
        return torch.cat((rows, sampled), dim=1)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Names repeat: a row for each head."""
        for tag, value in super().report_all(names, rows):
            if _MAX_LOGIT not in tag:
                yield tag, value
            if tag.startswith("attention_entropy_min/") and isinstance(value, float):
                yield tag.replace("entropy_min", "collapse", 1), float(value < COLLAPSE)
        self.descriptions = {**self.descriptions, "attention_collapse": _MEANING}

"""Uncertainty of many examples as a row of bounded length that merges by addition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.statistics.buckets import MAGNITUDES, magnitude_edges, magnitude_index, tally
from torchprobe.statistics.dtypes import row_dtype
from torchprobe.statistics.uncertainty.decomposition import Decomposition

KINDS = Decomposition._fields
"""total, aleatoric, epistemic."""

_HEADER = ("sum", "count", "nonfinite", "not_positive")
_WIDTH = len(_HEADER) + MAGNITUDES

FIELDS = tuple(f"{kind}_{name}" for kind in KINDS for name in (*_HEADER, *(f"bucket_{i}" for i in range(MAGNITUDES))))
"""Columns of a row, for each kind: the sum over its `count` finite examples, the number of the others, how many are 0
or less (where a differential entropy can be), and how many of the positive ones are in each bucket of `edges`."""


@torch.no_grad()
def compute(decomposition: Decomposition) -> Tensor:
    """The row: shape (len(FIELDS),), `row_dtype`, on the device; zeros for a kind that is None. Makes no host read.

    Rows merge by addition. Raises ValueError when every kind is None, which has no device.
    """
    known = next((x for x in decomposition if x is not None), None)
    if known is None:
        raise ValueError("decomposition: got None for total, aleatoric and epistemic, takes at least one tensor")
    nothing = torch.zeros(_WIDTH, dtype=row_dtype(known.device), device=known.device)
    return torch.cat([nothing if values is None else _row(values) for values in decomposition])


def combine(a: Tensor, b: Tensor) -> Tensor:
    """The row of the examples of both."""
    return a + b


def summarise(row: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """Means by kind, and `<kind>_nonfinite`, on the host; a kind without an example is left out."""
    means: dict[str, float] = {}
    for kind, (total, count, nonfinite, *_) in zip(KINDS, _split(row), strict=True):
        if count:
            means[kind] = float(total / count)
        if count or nonfinite:
            means[f"{kind}_nonfinite"] = float(nonfinite)
    return means


def histograms(row: Sequence[float] | NDArray[np.float64]) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """By kind, edges and counts of the positive examples on a log10 axis; a kind without such is left out."""
    counts = {kind: part[len(_HEADER) :].astype(np.int64) for kind, part in zip(KINDS, _split(row), strict=True)}
    return {kind: (edges(), of_kind) for kind, of_kind in counts.items() if of_kind.any()}


def edges() -> NDArray[np.float64]:
    """log10 of the histograms' edges, four buckets for each power of two."""
    return magnitude_edges()


def _row(values: Tensor) -> Tensor:
    wide = values.detach().flatten().to(row_dtype(values.device))
    finite = wide.isfinite()
    known = wide.where(finite, 0.0)
    positive = known > 0
    counts = tally(magnitude_index(known), MAGNITUDES, positive)[0]
    header = torch.stack((known.sum(), finite.sum(), (~finite).sum(), (finite & ~positive).sum()))
    return torch.cat((header.to(counts.dtype), counts))


def _split(row: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """The columns of each kind: (kinds, columns)."""
    values = np.asarray(row, dtype=np.float64)
    if values.shape != (len(FIELDS),):
        raise ValueError(f"row: got shape {values.shape}, takes ({len(FIELDS)},), as compute returns")
    return values.reshape(len(KINDS), _WIDTH)

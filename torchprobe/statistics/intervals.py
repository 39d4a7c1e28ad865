"""Whether a regression's predicted variances are right: coverage of its intervals, and where targets fall in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.statistics.buckets import tally
from torchprobe.statistics.dtypes import arithmetic, row_dtype

PIT_BINS = 20
_HALF_WIDTHS = {"50": 0.6744897501960817, "90": 1.6448536269514722}  # of the central intervals, in std

FIELDS = ("count", "inside_50", "inside_90", "invalid", *(f"pit_{i}" for i in range(PIT_BINS)))
"""Columns of a row; those before `invalid` and the PIT bins are over `count` examples."""


@torch.no_grad()
def compute(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """The row of Gaussian predictions: shape (len(FIELDS),), `row_dtype`, on the device. Rows merge by addition.

    All of shapes that broadcast. PIT is the probability integral transform, Φ((target - mean) / std), in 20 equal
    bins [a, b), the last one closed: even when the predictions are right (Dawid 1984), heaped in the middle when
    variances are too large and at the ends when too small. An example with a NaN or inf, or a variance that is not
    above 0, is `invalid`. Makes no host read. Raises ValueError for shapes that do not broadcast and TypeError for
    predictions of integers.
    """
    for name, x in (("mean", mean), ("variance", variance)):
        arithmetic(x, name)
    try:
        same = torch.broadcast_tensors(mean, variance, target)
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in (mean, variance, target))
        raise ValueError(f"mean, variance, target: got shapes {shapes}, takes shapes that broadcast") from error
    mean, variance, target = (x.detach().to(row_dtype(x.device)).flatten() for x in same)
    score = (target - mean) / variance.sqrt()
    valid = score.isfinite() & variance.isfinite() & (variance > 0)
    inside = [(valid & (score.abs() <= width)).sum() for width in _HALF_WIDTHS.values()]
    header = torch.stack([valid.sum(), *inside, (~valid).sum()]).to(score.dtype)
    place = torch.special.ndtr(score).mul(PIT_BINS).nan_to_num(0.0).long().clamp(0, PIT_BINS - 1)
    return torch.cat((header, tally(place, PIT_BINS, valid)[0]))


def combine(a: Tensor, b: Tensor) -> Tensor:
    """The row of the examples of both."""
    return a + b


def summarise(row: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """coverage_50 and coverage_90 (right are 0.5 and 0.9), count and invalid; without an example the counts alone."""
    values = dict(zip(FIELDS, np.asarray(row, dtype=np.float64).tolist(), strict=True))  # on the host
    counts = {name: values[name] for name in ("count", "invalid")}
    if not values["count"]:
        return counts
    return counts | {f"coverage_{level}": values[f"inside_{level}"] / values["count"] for level in _HALF_WIDTHS}


def pit_histogram(row: Sequence[float] | NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Edges and counts of the PIT."""
    counts = np.asarray(row, dtype=np.float64)[-PIT_BINS:].astype(np.int64)
    return np.arange(PIT_BINS + 1) / PIT_BINS, counts

"""Buckets with fixed edges, so that histograms merge by addition, and how to count small integers fast."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.statistics import dense
from torchprobe.statistics.dtypes import row_dtype

LOW, HIGH, PER_OCTAVE = -40, 24, 4
"""Magnitudes: bucket i holds 2**(LOW + i / PER_OCTAVE) <= x < 2**(LOW + (i + 1) / PER_OCTAVE), each 19 % wide; the
first one (from 9e-13) also what is smaller and positive, the last one (up to 1.7e7) also what is larger."""

MAGNITUDES = (HIGH - LOW) * PER_OCTAVE

SHARES = 512
"""Shares in [0, 1]: buckets of equal width in the log-odds, from -12 to 12, the outer ones open. They are 0.012 wide at
0.5, and 5 % of the distance to the nearer end towards 0 and 1, where predictions crowd."""

_LOG_ODDS = 12.0

LANES = 64
"""Copies of every counter off the CPU, so that equal codes side by side do not queue for one address."""

SMALL = 2**12
"""Tensors of fewer elements in host memory are counted together, at the cost of a few operations for all."""

PACK = 64
"""So many of them at a time."""


def magnitude_index(x: Tensor) -> Tensor:
    """The bucket of each positive element, int64; that of another one is meaningless but in range."""
    octaves = x.log2().sub(LOW).mul(PER_OCTAVE).nan_to_num(0.0)
    return octaves.floor().clamp(0, MAGNITUDES - 1).long()


def magnitude_edges() -> NDArray[np.float64]:
    """log10 of the edges: MAGNITUDES + 1 of them."""
    return math.log10(2.0) * (LOW + np.arange(MAGNITUDES + 1) / PER_OCTAVE)


def share_index(x: Tensor) -> Tensor:
    """The bucket of each share, int64; that of what is no share is meaningless but in range."""
    odds = x.log().sub(torch.log1p(-x)).add(_LOG_ODDS).mul(SHARES / (2 * _LOG_ODDS))
    return odds.nan_to_num(0.0).floor().clamp(0, SHARES - 1).long()


def share_edges() -> NDArray[np.float64]:
    """The SHARES + 1 edges, from 0 to 1."""
    inner = 1 / (1 + np.exp(-np.linspace(-_LOG_ODDS, _LOG_ODDS, SHARES + 1)[1:-1]))
    return np.concatenate(([0.0], inner, [1.0]))


def tally(index: Tensor, buckets: int, *weights: Tensor) -> Tensor:
    """Sums of each of the weights in each bucket: (len(weights), buckets), `row_dtype`, exact for whole numbers.

    index: int64 of 0 to buckets - 1, (n,). weights: (n,) each, of real numbers or booleans; 0 leaves an element out.
    """
    columns = torch.stack([weight.to(row_dtype(index.device)) for weight in weights], dim=-1)
    return columns.new_zeros(buckets, len(weights)).index_add_(0, index, columns).T


def small_packs(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Which of real tensors are counted together: their indices, `PACK` at a time."""
    small = [i for i, x in enumerate(tensors) if x.numel() < SMALL and x.dtype == torch.float32 and dense.applies_to(x)]
    return [small[start : start + PACK] for start in range(0, len(small), PACK)]


def count_codes(codes: Tensor, size: int) -> Tensor:
    """Occurrences of 0 ... size - 1 in 1-D integer `codes`, which holds nothing else: int64 of shape (size,)."""
    return torch.bincount(codes, minlength=size) if codes.is_cpu else scattered(codes, size)


def scattered(codes: Tensor, size: int) -> Tensor:
    """The same from atomic additions: bincount would wait for the device to learn the largest code."""
    lane = torch.arange(codes.numel(), device=codes.device) % LANES
    counters = torch.zeros(size * LANES, dtype=torch.int64, device=codes.device)
    counters.scatter_add_(0, codes.long() * LANES + lane, torch.ones_like(lane))
    return counters.view(size, LANES).sum(1)

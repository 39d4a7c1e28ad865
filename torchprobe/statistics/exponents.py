"""Magnitudes by power of two, from the exponent bits: a logarithmic histogram without a logarithm."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.statistics.counts import count_codes
from torchprobe.statistics.dtypes import piece_size, pieces, real, row_dtype

LOW, HIGH = -100, 27
"""The first and the last bucket hold 2**LOW <= |x| < 2**(LOW + 1) and 2**HIGH <= |x| < 2**(HIGH + 1), and all that
lies beyond: smaller but not zero, or larger but finite."""

BUCKETS = HIGH - LOW + 1


class _Layout(NamedTuple):
    """Where a floating type keeps its exponent."""

    bits: torch.dtype
    """The integer type of its size."""
    shift: int
    """Mantissa bits, below the exponent."""
    codes: int
    """Exponent codes; the first is for zero and subnormals, the last for inf and NaN."""
    bias: int
    """The code of 2**0."""


_LAYOUTS = {
    torch.bfloat16: _Layout(torch.int16, 7, 2**8, 127),
    torch.float32: _Layout(torch.int32, 23, 2**8, 127),
    torch.float64: _Layout(torch.int64, 52, 2**11, 1023),
}


def log_histogram(x: Tensor) -> Tensor:
    """Counts of the elements of `x`: [zeros, nonfinite, one for each bucket], shape (2 + BUCKETS,), `row_dtype`.

    `x` is any strided floating or complex tensor. Counts are exact, and zeros and buckets add up to the number of
    finite elements. Histograms of two tensors merge by addition. Makes no host read, keeps temporaries below about
    2**22 elements, and costs 1.0 ns an element on two CPU cores. Raises TypeError for integers.
    """
    x = real(x)
    layout = _LAYOUTS.get(x.dtype, _LAYOUTS[torch.float32])
    codes = torch.zeros(layout.codes, dtype=torch.int64, device=x.device)
    nonzero = torch.zeros((), dtype=torch.int64, device=x.device)
    for piece in pieces(x, piece_size(x.device, x.numel())):
        codes += count_codes(_codes(piece, layout), layout.codes)
        nonzero += piece.count_nonzero()
    return _buckets(codes, nonzero, layout).to(row_dtype(x.device))


def edges() -> list[float]:
    """log10 of the edges of the buckets: BUCKETS + 1 of them."""
    return [math.log10(2.0) * exponent for exponent in range(LOW, HIGH + 2)]


def _codes(x: Tensor, layout: _Layout) -> Tensor:
    """The exponent code of each element; conversion to 8 bits drops the sign that is above them."""
    bits = x if x.dtype in _LAYOUTS else x.float()
    shifted = bits.view(layout.bits) >> layout.shift
    return shifted.to(torch.uint8) if layout.codes == 2**8 else shifted & (layout.codes - 1)


def _buckets(codes: Tensor, nonzero: Tensor, layout: _Layout) -> Tensor:
    zeros = codes.sum() - nonzero
    first, end = LOW + layout.bias, HIGH + layout.bias + 1
    buckets = codes[first:end].clone()
    buckets[0] += codes[:first].sum() - zeros
    buckets[-1] += codes[end:-1].sum()
    return torch.cat((zeros[None], codes[-1:], buckets))

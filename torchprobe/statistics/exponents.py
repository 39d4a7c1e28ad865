"""Magnitudes by power of two, from the exponent bits: a logarithmic histogram without a logarithm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchprobe.statistics import buckets, dense, fused
from torchprobe.statistics.dtypes import chunk_size, chunks, on_host, owners, reals, row_dtype

LOW, HIGH = -100, 27
"""The first and the last bucket hold 2**LOW <= |x| < 2**(LOW + 1) and 2**HIGH <= |x| < 2**(HIGH + 1), and all that
lies beyond: smaller but not zero, or larger but finite."""

BUCKETS = HIGH - LOW + 1

_CODES, _BIAS = 2**8, 127
"""Exponent codes of float32: the first is for zero and subnormals, the last for inf and NaN, `_BIAS` for 2**0."""


def log_histogram(x: Tensor) -> Tensor:
    """Counts of the elements of `x`: [zeros, nonfinite, one for each bucket], shape (2 + BUCKETS,), `row_dtype`.

    `x` is any strided floating or complex tensor. Counts are exact, and zeros and buckets add up to the number of
    finite elements. Histograms of two tensors merge by addition. Makes no host read, keeps temporaries below about
    2**22 elements, and costs 2 ns an element of a million of float32 on one CPU core. Raises TypeError for integers.
    """
    return log_histograms([x])[0]


def log_histograms(tensors: Sequence[Tensor]) -> Tensor:
    """The row of each of many tensors of one device: shape (n, 2 + BUCKETS). Small ones are counted together."""
    tensors = reals(tensors)
    if not tensors:
        return torch.zeros(0, 2 + BUCKETS, dtype=torch.float64)
    if fused.applies_to(*tensors):
        counts = fused.codes(tensors)
        return _buckets(counts[:, :_CODES], counts[:, _CODES])
    packs = buckets.small_packs(tensors)
    packed = {i for pack in packs for i in pack}
    rest = [i for i in range(len(tensors)) if i not in packed]
    found = [_buckets(*_counted_together([tensors[i] for i in pack])) for pack in packs]
    if rest:
        codes, nonzero = zip(*(_counted(tensors[i]) for i in rest), strict=True)
        found.append(_buckets(torch.stack(codes), torch.stack(nonzero)))
    places = [i for pack in (*packs, rest) for i in pack]
    rows = dict(zip(places, torch.cat(found).unbind(), strict=True))
    return torch.stack([rows[i] for i in range(len(tensors))])


def edges() -> list[float]:
    """log10 of the edges of the buckets: BUCKETS + 1 of them."""
    return [math.log10(2.0) * exponent for exponent in range(LOW, HIGH + 2)]


def _counted_together(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Exponent codes and non-zero elements of small float32 tensors: shapes (n, 256) and (n,)."""
    packed = torch.cat([x.reshape(-1) for x in tensors])
    owner = owners(tensors)
    codes = _codes(packed).long().add_(owner, alpha=_CODES)
    found = torch.bincount(codes, minlength=len(tensors) * _CODES).view(-1, _CODES)
    return found, torch.bincount(owner[packed != 0], minlength=len(tensors))


def _counted(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of one tensor: shapes (256,) and ()."""
    codes = torch.zeros(_CODES, dtype=torch.int64, device=x.device)
    nonzero = torch.zeros((), dtype=torch.int64, device=x.device)
    for chunk in chunks(x, chunk_size(x.device, x.numel())):
        found = buckets.count_codes(_codes(chunk), _CODES)
        codes += found
        none = dense.is_plain(x) and not on_host(found[0])  # neither zeros nor subnormals: no pass over it for them
        nonzero += chunk.shape[0] if none else chunk.count_nonzero()
    return codes, nonzero


def _codes(x: Tensor) -> Tensor:
    """The exponent code of each element, uint8: float64 beyond float32's range has that of its ends."""
    if x.dtype == torch.float64:
        codes = torch.frexp(x).exponent.add_(_BIAS - 1).clamp_(1, _CODES - 2)
        return codes.masked_fill_(x == 0, 0).masked_fill_(~x.isfinite(), _CODES - 1).to(torch.uint8)
    return (x.float().view(torch.int32) >> 23).to(torch.uint8)  # which drops the sign above the exponent


def _buckets(codes: Tensor, nonzero: Tensor) -> Tensor:
    """Rows, (n, 2 + BUCKETS), from float32's codes, (n, 256), and non-zero elements, (n,)."""
    zeros = codes.sum(1) - nonzero
    first, end = LOW + _BIAS, HIGH + _BIAS + 1
    inner = codes[:, first:end].clone()
    inner[:, 0] += codes[:, :first].sum(1) - zeros
    inner[:, -1] += codes[:, end:-1].sum(1)
    return torch.cat((zeros[:, None], codes[:, -1:], inner), dim=1).to(row_dtype(codes.device))

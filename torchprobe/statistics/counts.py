"""How often each small integer occurs: the inner loop of both histograms."""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 64
"""Copies of every counter off the CPU, so that equal codes side by side do not queue for one address."""

SMALL = 2**12
"""Tensors of fewer elements in host memory are counted together, at the cost of a few operations for all."""


PORTION = 2**22
"""Elements in host memory that are counted at a time: a table has its price, and codes are small."""


def count_codes(codes: Tensor, size: int) -> Tensor:
    """Occurrences of 0 ... size - 1 in 1-D integer `codes`, which holds nothing else: int64 of shape (size,)."""
    if codes.is_cpu:
        return torch.bincount(codes, minlength=size)
    return scattered(codes, size)


def count_in_pairs(codes: Tensor, size: int) -> Tensor:
    """The same for 8-bit codes in host memory, with half the increments: of two neighbours as one 16-bit code.

    A processor adds to a counter about every 0.7 ns, whatever is counted: 0.4 ns an element.
    """
    if size > 128 or codes.numel() < 256 * size:  # 16 bits have a sign; a table has its price
        return torch.bincount(codes, minlength=size)
    even = codes.numel() // 2 * 2
    table = torch.bincount(codes[:even].view(torch.int16), minlength=256 * size).view(size, 256)
    counts = table.sum(1) + table[:, :size].sum(0)
    return counts if even == codes.numel() else counts + torch.bincount(codes[even:], minlength=size)


def count_halves(codes: Tensor, size: int) -> Tensor:
    """The same for 16-bit codes below 181: of two elements, half the codes apart, as one code.

    Its table is dense, which matters where many codes are frequent: counters 2 KiB apart share cache sets.
    """
    half = codes.numel() // 2
    if size > 181 or half < size**2:
        return torch.bincount(codes, minlength=size)
    pairs = torch.add(codes[:half], codes[half : 2 * half], alpha=size)
    table = torch.bincount(pairs, minlength=size**2).view(size, size)
    counts = table.sum(0) + table.sum(1)
    return counts if 2 * half == codes.numel() else counts + torch.bincount(codes[2 * half :], minlength=size)


def scattered(codes: Tensor, size: int) -> Tensor:
    """The same from atomic additions: bincount would wait for the device to learn the largest code."""
    lane = torch.arange(codes.numel(), device=codes.device) % LANES
    counters = torch.zeros(size * LANES, dtype=torch.int64, device=codes.device)
    counters.scatter_add_(0, codes.long() * LANES + lane, torch.ones_like(lane))
    return counters.view(size, LANES).sum(1)

"""How often each small integer occurs: the inner loop of both histograms."""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 64
"""Copies of every counter off the CPU, so that equal codes side by side do not queue for one address."""


def count_codes(codes: Tensor, size: int) -> Tensor:
    """Occurrences of 0 ... size - 1 in 1-D integer `codes`, which holds nothing else: int64 of shape (size,)."""
    if codes.is_cpu:
        return torch.bincount(codes, minlength=size)
    return scattered(codes, size)


def scattered(codes: Tensor, size: int) -> Tensor:
    """The same from atomic additions: bincount would wait for the device to learn the largest code."""
    lane = torch.arange(codes.numel(), device=codes.device) % LANES
    counters = torch.zeros(size * LANES, dtype=torch.int64, device=codes.device)
    counters.scatter_add_(0, codes.long() * LANES + lane, torch.ones_like(lane))
    return counters.view(size, LANES).sum(1)

"""Small data that can be learnt: images of ten classes, numbers, text of the standard library."""

from __future__ import annotations

import argparse
import inspect
from functools import cache

import torch
from torch import Tensor


def batches(x: Tensor, y: Tensor, size: int = 32, steps: int = 200):
    """Shuffled anew in each epoch."""
    done = 0
    while True:
        for index in torch.randperm(len(x)).split(size):
            if done == steps:
                return
            if len(index) == size:
                done += 1
                yield x[index], y[index]


@cache
def _digits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = torch.nn.functional.interpolate(torch.randn(10, 1, 3, 3, generator=generator), 8, mode="bicubic")[:, 0]
    y = torch.randint(0, 10, (800,), generator=generator)
    x = shapes[y] + 0.5 * torch.randn(800, 8, 8, generator=generator)
    return (x - x.mean()) / x.std(), y


def digits(flat: bool = True) -> tuple[Tensor, Tensor]:
    """Images of 8 by 8, mean 0 and standard deviation 1, and their classes."""
    x, y = _digits()
    return (x.flatten(1), y) if flat else (x[:, None], y)


def numbers() -> tuple[Tensor, Tensor]:
    """Eight features, and a smooth function of them, (n, 1)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, 8, generator=generator)
    y = x[:, :1] * 2 + x[:, 1:2].sin() * 3 + 0.1 * torch.randn(512, 1, generator=generator)
    return x, y


def two_classes() -> tuple[Tensor, Tensor]:
    """Features, and whether their sum is above 0, as float (n,)."""
    x, _ = numbers()
    return x, (x.sum(1) > 0).float()


@cache
def text() -> Tensor:
    """Characters as numbers from 0 to 63."""
    source = inspect.getsource(argparse)[:40_000].lower()
    known = {c: i for i, c in enumerate(sorted(set(source)))}
    return torch.tensor([known[c] for c in source]).clamp(max=63)


def sentences(size: int = 16, length: int = 24, steps: int = 200):
    """Windows of text, (size, length)."""
    ids = text()
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - length, (size,))
        yield ids[starts[:, None] + torch.arange(length)]

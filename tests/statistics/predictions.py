"""Predictions as models make them on good and bad days."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SPECIAL = (float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 0.0, 1e4)


@st.composite
def logits(draw: st.DrawFn, *, samples: bool = False, special: bool = True) -> Tensor:
    """(..., classes), or (samples, ..., classes): up to 60 examples of up to 7 classes, of any type and strides."""
    seed, classes = draw(st.integers(0, 2**20)), draw(st.integers(1, 7))
    shape = draw(st.sampled_from([(), (0,), (1,), (5,), (60,), (3, 4), (2, 0), (2, 3, 4)]))
    if samples:
        shape = (draw(st.integers(1, 4)), *shape)
    generator = torch.Generator().manual_seed(seed)
    scale = draw(st.sampled_from([0.0, 1e-4, 1.0, 8.0, 100.0, 1e4]))
    x = scale * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)
    if special and draw(st.booleans()):
        at = torch.rand(x.shape, generator=generator) < 0.1
        which = torch.randint(len(SPECIAL), x.shape, generator=generator)
        x = torch.where(at, torch.tensor(SPECIAL, dtype=torch.float64)[which], x)
    return strided(draw, x.to(draw(st.sampled_from(DTYPES))))


@st.composite
def probabilities(draw: st.DrawFn, *, samples: bool = False) -> Tensor:
    """The same after a softmax, with rows that are one-hot, hold a NaN, or are no distribution."""
    x = draw(logits(samples=samples, special=False))
    p = x.double().softmax(dim=-1)
    flat = p.reshape(-1, p.size(-1)).clone()
    for row in range(0, len(flat), 3):
        kind = draw(st.sampled_from(["as it is", "one-hot", "nan", "inf"]))
        if kind == "one-hot":
            flat[row] = torch.eye(p.size(-1), dtype=torch.float64)[row % p.size(-1)]
        elif kind != "as it is":
            flat[row, row % p.size(-1)] = float(kind)
    return strided(draw, flat.reshape(p.shape).to(x.dtype))


def strided(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same numbers, in another order of memory."""
    kind = draw(st.sampled_from(["plain", "classes first", "every other", "odd"]))
    if kind == "classes first" and x.dim() > 1:
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if kind == "every other":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if kind == "odd" and x.dim() > 2:
        return x.movedim(0, -2).contiguous().movedim(-2, 0)
    return x

"""Tensors as training makes them on bad days: every type, layout and kind of value that has broken a statistic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

NARROW = (torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
WIDE = (torch.float64, torch.complex128)

SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), -float("inf"))
HUGE = (1e38, -1e38, 3.4e38, 65504.0, -1e30, 1e19)
TINY = (1e-45, -1e-40, 6e-8, 1e-38, 2.0**-126, 1e-30)


def values() -> st.SearchStrategy[list[float]]:
    """Up to 40 numbers, mixed or all of one kind."""
    ordinary = st.floats(-100, 100, width=32)
    anything = st.one_of(st.sampled_from(SPECIAL + HUGE + TINY), ordinary)
    far_from_zero = st.builds(
        lambda offset, deviations: [offset + d for d in deviations],
        st.sampled_from((1e7, -1e7, 16384.0, 1e20)),
        st.lists(st.floats(-8, 8, width=32) | st.just(float("nan")), max_size=40),
    )
    constant = st.builds(lambda value, n: [value] * n, anything, st.integers(0, 40))
    return st.one_of(st.lists(anything, max_size=40), st.lists(ordinary, max_size=40), far_from_zero, constant)


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    lambda x: x[:1].reshape(()) if len(x) else x,
    lambda x: x[::2],
    lambda x: x[1:],
    lambda x: x.reshape(1, -1, 1).expand(3, -1, 2),
    lambda x: x[: len(x) // 2 * 2].reshape(2, -1).t(),
    lambda x: x[: len(x) // 6 * 6].reshape(1, 2, 3, -1).transpose(1, 3),
    lambda x: x[: len(x) // 4 * 4].reshape(-1, 2, 2)[:, 0, ::2],
)


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = NARROW + WIDE) -> Tensor:
    dtype = draw(st.sampled_from(dtypes))
    numbers = torch.tensor(draw(values()), dtype=torch.float64)
    if dtype.is_complex:
        numbers = torch.complex(numbers, numbers.roll(1))
    x = draw(st.sampled_from(LAYOUTS))(numbers.to(dtype))
    return x.conj() if dtype.is_complex and draw(st.booleans()) else x


def piece_sizes() -> st.SearchStrategy[int]:
    """How many elements are worked on at a time: from far fewer than there are, to all."""
    return st.sampled_from((1, 3, 16, 2**18))

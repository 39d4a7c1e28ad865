"""Every example once, in order, and without a copy where strides allow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.statistics.portions import arithmetic, portions


@st.composite
def permuted(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), min_size=2, max_size=4))
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    x = x.permute(draw(st.permutations(range(len(shape)))))
    return x.expand(3, *x.shape) if draw(st.booleans()) else x


@given(x=permuted(), trailing=st.sampled_from((1, 2)), piece=st.sampled_from((1, 5, 2**18)))
@settings(max_examples=200, deadline=None)
def test_portions_are_the_examples_in_order(x, trailing, piece, in_pieces_of):
    own = x.shape[x.dim() - trailing :]
    with in_pieces_of(piece):
        parts = list(portions(x, trailing))
    assert all(part.numel() <= max(piece, own.numel()) for part in parts)
    joined = torch.cat(parts) if parts else torch.zeros(0, *own)
    if x.numel():
        assert torch.equal(joined, x.reshape(-1, *own))
    else:
        assert not parts


@pytest.mark.parametrize("x", [torch.ones(50), torch.ones(4, 30, 50), torch.ones(4, 50, 30).transpose(1, 2)])
def test_a_dense_tensor_is_not_copied(x, in_pieces_of):
    with in_pieces_of(100):
        parts = list(portions(x, 1))
    inside = [part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in parts]
    assert all(inside)


def test_arithmetic_is_float32_or_wider():
    assert arithmetic(torch.ones(1, dtype=torch.bfloat16), "x") == torch.float32
    assert arithmetic(torch.ones(1, dtype=torch.float64), "x") == torch.float64
    with pytest.raises(TypeError, match=r"x: got a tensor of torch.bool, takes a floating one"):
        arithmetic(torch.ones(1).bool(), "x")

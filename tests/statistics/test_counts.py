"""Counting two elements at a time counts what counting them one by one does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.statistics import exponents, linear
from torchprobe.statistics.counts import count_halves, count_in_pairs

WAYS = {"neighbours": (count_in_pairs, torch.uint8), "halves": (count_halves, torch.int16)}


@pytest.mark.parametrize(("count", "dtype"), WAYS.values(), ids=WAYS.keys())
@given(size=st.sampled_from((1, 2, 19, 65, 128, 129, 181, 182, 250)), n=st.integers(0, 80_001), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_pairs_count_every_element_once(count, dtype, size, n, seed):
    codes = torch.randint(0, size, (n,), generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = codes.clone()
    assert torch.equal(count(codes, size), torch.bincount(before, minlength=size))
    assert torch.equal(codes, before)


@pytest.mark.parametrize("scale", [1e-40, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("n", [300_001, 2**18])
def test_exponents_of_a_large_tensor_are_those_of_its_float64_copy(n, scale):
    x = torch.randn(n) * scale
    x[:7] = torch.tensor([0.0, -0.0, 1e-42, float("nan"), float("inf"), 1e38, -1.5])
    row, wide = exponents.log_histograms([x, x.double()])
    assert torch.equal(row, wide)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("n", [300_001, 2**18])
def test_buckets_of_a_large_tensor_are_those_of_its_float64_copy(n, offset):
    x = torch.randn(n) + offset
    row, wide = linear.linear_histograms([x, x.double()])
    assert torch.equal(row, wide)


def test_small_and_large_tensors_keep_their_places():
    many = [torch.randn(5), torch.randn(70_000), torch.tensor([1.0, float("nan")]), torch.zeros(0), torch.ones(3)]
    for of_all, of_one in (
        (exponents.log_histograms, exponents.log_histogram),
        (linear.linear_histograms, linear.linear_histogram),
    ):
        assert torch.equal(of_all(many), torch.stack([of_one(x) for x in many]))

"""Each element lies between the edges that are shown for its bucket, and is counted once, however fast."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.statistics import buckets, histograms


@given(x=st.floats(1e-300, 1e300, allow_subnormal=False))
def test_a_magnitude_is_between_its_edges(x):
    at = int(buckets.magnitude_index(torch.tensor([x], dtype=torch.float64)))
    edges = buckets.magnitude_edges()
    inner = np.clip(math.log10(x), edges[0], edges[-1])
    assert edges[at] - 1e-9 <= inner <= edges[at + 1] + 1e-9


@given(x=st.floats(0, 1))
def test_a_share_is_between_its_edges(x):
    at = int(buckets.share_index(torch.tensor([x], dtype=torch.float64)))
    edges = buckets.share_edges()
    assert edges[at] - 1e-12 <= x <= edges[at + 1] + 1e-12


def test_edges_rise_and_enclose():
    assert (np.diff(buckets.share_edges()) > 0).all()
    assert (buckets.share_edges()[[0, -1]] == (0, 1)).all()
    assert (np.diff(buckets.magnitude_edges()) > 0).all()


@pytest.mark.parametrize("index", [buckets.magnitude_index, buckets.share_index])
def test_whatever_has_no_bucket_has_an_index_in_range(index):
    at = index(torch.tensor([math.nan, math.inf, -math.inf, -1.0, 0.0, 2.0]))
    assert at.min() >= 0
    assert at.max() < max(buckets.MAGNITUDES, buckets.SHARES)


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.floats(-1e6, 1e6) | st.sampled_from((0.0, 1e-310)))))
@settings(max_examples=50, deadline=None)
def test_a_tally_is_a_sum_over_each_bucket(elements):
    index = torch.tensor([at for at, _, _ in elements], dtype=torch.int64)
    weights = (
        torch.tensor([kept for _, kept, _ in elements], dtype=torch.bool),
        torch.tensor([weight for *_, weight in elements], dtype=torch.float64),
    )
    kept, sums = buckets.tally(index, 7, *weights).tolist()
    assert kept == [sum(k for at, k, _ in elements if at == bucket) for bucket in range(7)]
    expected = [math.fsum(weight for at, _, weight in elements if at == bucket) for bucket in range(7)]
    assert sums == pytest.approx(expected, rel=1e-12, abs=1e-8)


def test_a_tally_adds_up_weights_and_counts_exactly():
    index = torch.tensor([0, 2, 2, 1])
    weights = (torch.tensor([True, True, False, True]), torch.tensor([0.5, 1e-9, 1.0, 2.0], dtype=torch.float64))
    rows = buckets.tally(index, 4, *weights)
    assert rows.tolist() == [[1, 1, 1, 0], [0.5, 2.0, 1.0 + 1e-9, 0]]


@given(size=st.sampled_from((1, 65, 250)), n=st.integers(0, 3000), dtype=st.sampled_from((torch.uint8, torch.int32)))
@settings(deadline=None)
def test_every_code_is_counted_once(size, n, dtype):
    codes = (torch.arange(n) * 7919 % size).to(dtype)
    before = codes.clone()
    expected = [before.tolist().count(code) for code in range(size)]
    assert buckets.count_codes(codes, size).tolist() == expected
    assert buckets.scattered(codes, size).tolist() == expected
    assert torch.equal(codes, before)


@pytest.mark.parametrize("scale", [1e-40, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("n", [300_001, 2**18])
def test_exponents_of_a_large_tensor_are_those_of_its_float64_copy(n, scale):
    x = torch.randn(n) * scale
    x[:7] = torch.tensor([0.0, -0.0, 1e-42, float("nan"), float("inf"), 1e38, -1.5])
    row, wide = histograms.log_histograms([x, x.double()])
    assert torch.equal(row, wide)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("n", [300_001, 2**18])
def test_buckets_of_a_large_tensor_are_those_of_its_float64_copy(n, offset):
    x = torch.randn(n) + offset
    row, wide = histograms.linear_histograms([x, x.double()])
    assert torch.equal(row, wide)


def test_small_and_large_tensors_keep_their_places():
    many = [torch.randn(5), torch.randn(70_000), torch.tensor([1.0, float("nan")]), torch.zeros(0), torch.ones(3)]
    for of_all, of_one in (
        (histograms.log_histograms, histograms.log_histogram),
        (histograms.linear_histograms, histograms.linear_histogram),
    ):
        assert torch.equal(of_all(many), torch.stack([of_one(x) for x in many]))

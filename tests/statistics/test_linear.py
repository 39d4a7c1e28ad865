"""Every finite element is counted between the edges that are shown for its bucket."""

from __future__ import annotations

import functools
import math
from bisect import bisect_left

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.statistics import reference
from tests.statistics.strategies import piece_sizes, tensors
from torchprobe.statistics import buckets as counting
from torchprobe.statistics import histograms


def assert_between_edges(x: torch.Tensor, row: list[float], buckets: int) -> None:
    """As many elements below each edge as there are."""
    low, high, nonfinite, *counts = row
    values = sorted(reference.finite(x))
    assert (low, high) == ((values[0], values[-1]) if values else (0, 0))
    assert nonfinite == reference.nonfinite(x)
    assert len(counts) == buckets
    assert sum(counts) == len(values)
    below = 0
    for edge, count in zip(histograms.linear_edges(low, high, buckets)[1:-1], counts, strict=False):
        below += count
        assert below == bisect_left(values, edge) or low == high


@given(x=tensors(), buckets=st.sampled_from((4, 7, 64, 300)), piece=piece_sizes())
@settings(max_examples=200, deadline=None)
def test_elements_are_between_the_edges_of_their_bucket(x, buckets, piece, in_chunks_of):
    with in_chunks_of(piece):
        row = histograms.linear_histogram(x, buckets)
    assert row.dtype == torch.float64
    assert_between_edges(x, row.tolist(), buckets)


def test_buckets_are_as_narrow_as_a_power_of_two_can_be():
    row = histograms.linear_histogram(torch.arange(11.0), 11)
    assert row.tolist() == [0, 10, 0, *11 * [1]]
    assert histograms.linear_edges(0.0, 10.0, 11).tolist() == list(range(12))
    row = histograms.linear_histogram(torch.arange(11.0), 10)
    assert row.tolist() == [0, 10, 0, 2, 2, 2, 2, 2, 1, 0, 0, 0, 0]
    assert histograms.linear_edges(0.0, 10.0, 10).tolist() == list(range(0, 22, 2))


def test_edges_of_the_narrowest_buckets_are_where_elements_were_counted():
    x = 2.0**-100 * torch.tensor([0.9, 30, 64.5], dtype=torch.float64)  # 64 buckets of 2**-100 just miss the last one
    assert_between_edges(x, histograms.linear_histogram(x).tolist(), 64)


def test_edges_of_many_histograms_are_those_of_each():
    low, high = np.array([-1.0, 3.0, 0.0, -1.7e308]), np.array([2.9, 3.0, 0.0, 1.7e308])
    each = [histograms.linear_edges(*ends, 7).tolist() for ends in zip(low, high, strict=True)]
    assert histograms.linear_edges(low, high, 7).tolist() == each


def test_edges_are_multiples_of_the_width_so_zero_is_one_of_them():
    row = histograms.linear_histogram(torch.tensor([-1.0, -1e-30, 0.0, 0.1, 2.9]), 4)
    assert row.tolist() == [-1, torch.tensor(2.9).item(), 0, 2, 2, 0, 1]
    assert histograms.linear_edges(-1.0, 2.9, 4).tolist() == [-1, 0, 1, 2, 3]


@given(x=tensors(), cut=st.floats(0, 1), buckets=st.sampled_from((4, 7, 64)))
@settings(max_examples=300, deadline=None)
def test_the_histograms_of_two_parts_merge_to_that_of_the_whole_exactly(x, cut, buckets):
    flat = x.reshape(-1)
    at = int(cut * flat.numel())
    parts = [histograms.linear_histogram(part, buckets).numpy() for part in (flat[:at], flat[at:])]
    whole = histograms.linear_histogram(flat, buckets)
    assert histograms.combine(*parts).tolist() == whole.tolist()
    assert histograms.combine(*parts[::-1]).tolist() == whole.tolist()


@given(
    values=st.lists(st.sampled_from((0.0, 1.0, -1.0)) | st.floats(-1, 1, width=32), min_size=1, max_size=20),
    tiny=st.lists(st.sampled_from((0.0, 1e-45, -1e-45, -1e-40, -1e-38)), max_size=3),
    scale=st.sampled_from([2.0**k for k in (-120, -60, -7, 0, 1, 5, 90)]),
    offset=st.sampled_from((0.0, 1e-3, 3.0, -1e7)),
    buckets=st.sampled_from((4, 7, 64)),
)
@settings(max_examples=200, deadline=None)
def test_float32_arithmetic_puts_no_element_elsewhere_than_float64_does(values, tiny, scale, offset, buckets):
    x = torch.cat((torch.tensor(values) * scale + offset, torch.tensor(tiny)))
    repeated = x.repeat(1 + counting.SMALL // len(x))  # too many to be counted together with others
    row = histograms.linear_histogram(repeated, buckets)
    assert row.tolist() == histograms.linear_histogram(repeated.double(), buckets).tolist()


def test_many_parts_merge_in_any_order():
    parts = [torch.randn(50) * 10.0**k + k for k in range(-5, 5)]
    rows = [histograms.linear_histogram(part).numpy() for part in parts]
    whole = histograms.linear_histogram(torch.cat(parts)).tolist()
    assert functools.reduce(histograms.combine, rows).tolist() == whole
    assert functools.reduce(histograms.combine, rows[::-1]).tolist() == whole


@pytest.mark.parametrize("value", [0.0, 3.0, -1e20, 1e38])
@pytest.mark.parametrize("buckets", [4, 5, 64])
def test_equal_elements_are_in_one_bucket_around_them(value, buckets):
    x = torch.tensor([value, math.nan, value])
    low, high, nonfinite, *counts = histograms.linear_histogram(x, buckets).tolist()
    edges = histograms.linear_edges(low, high, buckets).tolist()
    index = counts.index(2)
    assert low == high == x[0].item()
    assert nonfinite == 1
    assert edges[index] <= low <= edges[index + 1]
    assert edges == sorted(set(edges))


def test_non_finite_elements_stretch_no_bucket():
    row = histograms.linear_histogram(torch.tensor([math.inf, 5.0, math.nan, 8.0, -math.inf]), 4)
    assert row.tolist() == [5, 8, 3, 1, 0, 0, 1]


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.tensor([math.nan, math.inf])])
def test_without_a_finite_element_every_bucket_is_empty(x):
    row = histograms.linear_histogram(x, 4)
    assert row.tolist() == [0, 0, x.numel(), 0, 0, 0, 0]


def test_a_range_beyond_float64_is_still_a_range():
    x = torch.tensor([-1.7e308, 0.0, 1.7e308], dtype=torch.float64)
    low, high, nonfinite, *counts = histograms.linear_histogram(x, 4).tolist()
    assert (low, high, nonfinite, counts) == (-1.7e308, 1.7e308, 0, [1, 0, 1, 1])
    largest = torch.finfo(torch.float64).max
    assert histograms.linear_edges(low, high, 4).tolist() == [-largest, -(2.0**1023), 0, 2.0**1023, largest]


@given(low=st.floats(-1e300, 1e300), width=st.floats(0, 1e300), buckets=st.integers(4, 100))
@settings(max_examples=60, deadline=None)
def test_edges_rise_from_low_to_high(low, width, buckets):
    high = low + width
    edges = histograms.linear_edges(low, high, buckets).tolist()
    assert len(edges) == buckets + 1
    assert edges == sorted(edges)
    assert edges[0] <= low + 1e-300 * width  # what underflows beside the width of a bucket counts as 0
    assert low <= high <= edges[-1]


def test_no_bucket_is_refused():
    with pytest.raises(ValueError, match=r"buckets: got 0, takes 4 or more"):
        histograms.linear_histogram(torch.ones(2), 0)
    with pytest.raises(ValueError, match=r"buckets: got -1, takes 4 or more"):
        histograms.linear_edges(0.0, 1.0, -1).tolist()


def test_edges_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"low, high: got 2.0 and 1.0, takes low <= high"):
        histograms.linear_edges(2.0, 1.0).tolist()


class Conversions(TorchDispatchMode):
    """To which types tensors are converted."""

    def __init__(self):
        super().__init__()
        self.kinds = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.kinds.add(kwargs.get("dtype"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("buckets", "kind"), [(64, torch.int8), (127, torch.int8), (128, torch.int32)])
def test_codes_are_converted_fast(buckets, kind):
    """To uint8 torch converts floats one by one."""
    with Conversions() as conversions:
        row = histograms.linear_histogram(torch.linspace(-1, 1, 5000), buckets)
    assert row[3:].sum() == 5000
    assert conversions.kinds & {torch.uint8, torch.int8, torch.int32} == {kind}

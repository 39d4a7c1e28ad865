"""Every finite element is counted between the edges that are shown for its bucket."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.statistics import reference
from tests.statistics.strategies import piece_sizes, tensors
from torchprobe.statistics import linear


def assert_between_edges(x: torch.Tensor, row: list[float], buckets: int) -> None:
    """As many elements below each edge as there are, give or take those within rounding of the edge itself."""
    low, high, nonfinite, *counts = row
    values = sorted(reference.finite(x))
    assert (low, high) == ((values[0], values[-1]) if values else (0, 0))
    assert nonfinite == reference.nonfinite(x)
    assert len(counts) == buckets
    assert sum(counts) == len(values)
    below = 0
    for edge, count in zip(linear.edges(low, high, buckets)[1:-1], counts, strict=False):
        below += count
        slack = 1e-13 * max(high - low, math.ulp(edge))
        assert bisect_left(values, edge - slack) <= below <= bisect_right(values, edge + slack)


@given(x=tensors(), buckets=st.sampled_from((1, 2, 7, 64, 300)), piece=piece_sizes())
@settings(max_examples=200, deadline=None)
def test_elements_are_between_the_edges_of_their_bucket(x, buckets, piece, in_pieces_of):
    with in_pieces_of(piece):
        row = linear.linear_histogram(x, buckets)
    assert row.dtype == torch.float64
    assert_between_edges(x, row.tolist(), buckets)


def test_whole_numbers_fall_on_their_own_side_of_an_edge():
    row = linear.linear_histogram(torch.arange(11.0), 10)
    assert row.tolist() == [0, 10, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]


def test_the_last_bucket_holds_the_largest_element():
    row = linear.linear_histogram(torch.tensor([-1.0, 0.1, 3.0]), 4)
    assert row.tolist() == [-1, 3, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("value", [0.0, 3.0, -1e20, 1e38])
@pytest.mark.parametrize("buckets", [1, 5, 64])
def test_equal_elements_are_in_one_bucket_around_them(value, buckets):
    x = torch.tensor([value, math.nan, value])
    low, high, nonfinite, *counts = linear.linear_histogram(x, buckets).tolist()
    edges = linear.edges(low, high, buckets)
    index = counts.index(2)
    assert low == high == x[0].item()
    assert nonfinite == 1
    assert edges[index] <= low <= edges[index + 1]
    assert edges == sorted(set(edges))


def test_non_finite_elements_stretch_no_bucket():
    row = linear.linear_histogram(torch.tensor([math.inf, 5.0, math.nan, 6.0, -math.inf]), 2)
    assert row.tolist() == [5, 6, 3, 1, 1]


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.tensor([math.nan, math.inf])])
def test_without_a_finite_element_every_bucket_is_empty(x):
    row = linear.linear_histogram(x, 3)
    assert row.tolist() == [0, 0, x.numel(), 0, 0, 0]


def test_a_range_beyond_float64_is_still_a_range():
    x = torch.tensor([-1.7e308, 0.0, 1.7e308], dtype=torch.float64)
    low, high, nonfinite, *counts = linear.linear_histogram(x, 3).tolist()
    assert (low, high, nonfinite, counts) == (-1.7e308, 1.7e308, 0, [1, 1, 1])
    assert linear.edges(low, high, 3) == pytest.approx([-1.7e308, -1.7e308 / 3, 1.7e308 / 3, 1.7e308])


@given(low=st.floats(-1e300, 1e300), width=st.floats(0, 1e300), buckets=st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_edges_rise_from_low_to_high(low, width, buckets):
    high = low + width
    edges = linear.edges(low, high, buckets)
    assert len(edges) == buckets + 1
    assert edges == sorted(edges)
    assert edges[0] <= low <= high <= edges[-1]


def test_no_bucket_is_refused():
    with pytest.raises(ValueError, match=r"buckets: got 0, takes 1 or more"):
        linear.linear_histogram(torch.ones(2), 0)
    with pytest.raises(ValueError, match=r"buckets: got -1, takes 1 or more"):
        linear.edges(0.0, 1.0, -1)


def test_edges_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"low, high: got 2.0 and 1.0, takes low <= high"):
        linear.edges(2.0, 1.0)

"""Fixed edges: each element lies between those that are shown for its bucket."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchprobe.statistics import buckets


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


def test_a_tally_adds_up_weights_and_counts_exactly():
    index = torch.tensor([0, 2, 2, 1])
    weights = (torch.tensor([True, True, False, True]), torch.tensor([0.5, 1e-9, 1.0, 2.0], dtype=torch.float64))
    rows = buckets.tally(index, 4, *weights)
    assert rows.tolist() == [[1, 1, 1, 0], [0.5, 2.0, 1.0 + 1e-9, 0]]

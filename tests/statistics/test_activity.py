"""Active units against a loop in plain Python."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.statistics.moments import active_units, inactive_share


def slow(x: torch.Tensor) -> list[int]:
    unit = 1 if x.dim() >= 4 else max(x.dim() - 1, 0)
    counts = [0] * (x.shape[unit] if x.dim() else 1)
    for index in itertools.product(*map(range, x.shape)):
        value = float(x[index])
        counts[index[unit] if index else 0] += not value <= 0
    return counts


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_counts_are_those_of_a_loop(data):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4).filter(lambda s: len(s) < 2 or 0 not in s))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    size = 1
    for n in shape:
        size *= n
    value = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, float("nan"), float("inf"), -float("inf")])
    x = torch.tensor(data.draw(st.lists(value, min_size=size, max_size=size)), dtype=dtype).reshape(shape)
    if data.draw(st.booleans()) and x.dim() > 1:
        x = x.transpose(0, 1)
    assert active_units(x).tolist() == slow(x)


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 9))
def test_counts_add_up_over_unequal_parts(units, first, second):
    x = torch.randn(first + second, units)
    assert torch.equal(active_units(x), active_units(x[:first]) + active_units(x[first:]))


def test_rarely_is_under_one_percent():
    assert inactive_share([(torch.tensor([0, 1, 2, 100]), 200)]).item() == pytest.approx(0.5)
    assert inactive_share([(torch.tensor([0]), 10), (torch.tensor([1, 1, 1]), 100)]).item() == pytest.approx(0.25)


@given(st.lists(st.tuples(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 300)), min_size=1))
@settings(max_examples=50, deadline=None)
def test_the_share_is_that_of_units_under_one_percent(counts):
    found = inactive_share([(torch.tensor(active), inputs) for active, inputs in counts]).item()
    inactive = [100 * n < inputs for active, inputs in counts for n in active]
    assert found == pytest.approx(sum(inactive) / len(inactive), rel=1e-6)

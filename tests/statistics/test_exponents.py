"""Every finite element is counted in the bucket of its power of two, exactly."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.statistics import reference
from tests.statistics.strategies import piece_sizes, tensors
from torchprobe.statistics import histograms

LOW, HIGH = histograms.LOW, histograms.HIGH


def bucket_of(x: torch.Tensor) -> int:
    """The only bucket with a count."""
    (index,) = [i for i, count in enumerate(histograms.log_histogram(x)[2:].tolist()) if count]
    return index


@given(x=tensors(), piece=piece_sizes())
@settings(max_examples=150, deadline=None)
def test_counts_are_those_of_one_element_after_the_other(x, piece, in_chunks_of):
    with in_chunks_of(piece):
        counts = histograms.log_histogram(x)
    assert counts.dtype == torch.float64
    assert counts.tolist() == reference.log_histogram(x, LOW, HIGH)


@given(a=tensors(), b=tensors())
@settings(max_examples=40, deadline=None)
def test_histograms_of_two_tensors_add_up(a, b):
    together = torch.cat([torch.tensor(reference.elements(x), dtype=torch.float64) for x in (a, b)])
    added = histograms.log_histogram(a) + histograms.log_histogram(b)
    assert torch.equal(added, histograms.log_histogram(together))


@given(
    value=st.floats(2.0**LOW, 2.0 ** (HIGH + 1), exclude_max=True),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_an_element_lies_between_the_edges_of_its_bucket(value, dtype):
    x = torch.tensor([value], dtype=dtype)
    index = bucket_of(x)
    if index < len(histograms.log_edges()) - 2:
        edges = histograms.log_edges()
        assert edges[index] - 1e-12 <= math.log10(x.double().item()) <= edges[index + 1] + 1e-12


def test_edges_are_powers_of_two_in_log10():
    edges = histograms.log_edges()
    assert len(edges) == len(histograms.log_histogram(torch.ones(1))) - 2 + 1
    assert 10 ** edges[0] == pytest.approx(2.0**LOW)
    assert 10 ** edges[-1] == pytest.approx(2.0 ** (HIGH + 1))
    assert edges[-LOW] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_lies_beyond_the_range_is_in_the_outermost_buckets(dtype):
    assert bucket_of(torch.tensor([1e-35, -1e-36, 1e-39], dtype=dtype)) == 0
    assert bucket_of(torch.tensor([1e9, -1e30, 3e38], dtype=dtype)) == HIGH - LOW


def test_bfloat16_keeps_what_float16_could_not_hold():
    counts = histograms.log_histogram(torch.tensor([1e5, 1e-9], dtype=torch.bfloat16))
    assert counts[:2].tolist() == [0, 0]
    assert counts[2 + 16 - LOW] == 1
    assert counts[2 - 30 - LOW] == 1


def test_subnormal_float16_is_in_its_own_bucket():
    assert bucket_of(torch.tensor([2.0**-24], dtype=torch.float16)) == -24 - LOW


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"takes a floating or complex one"):
        histograms.log_histogram(torch.arange(3))


class Operations(TorchDispatchMode):
    """How often each is called."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 1.0])
def test_zeros_are_looked_for_only_where_an_exponent_allows_them(value):
    x = torch.ones(5000)
    x[17] = value
    with Operations() as operations:
        counts = histograms.log_histogram(x)
    assert counts[0] == (value == 0)
    assert counts.sum() == 5000
    assert operations.names[torch.ops.aten.count_nonzero] == (value != 1.0)

"""Every element is seen once, whatever the type and the memory layout, and no portion is larger than asked for."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings

from tests.statistics import reference
from tests.statistics.strategies import piece_sizes, tensors
from torchprobe.statistics import counts, dtypes


def tally(values: list[float]) -> Counter[str]:
    return Counter(str(abs(value)) for value in values)  # the sign of a NaN or zero means nothing


@given(x=tensors(), size=piece_sizes())
@settings(max_examples=100, deadline=None)
def test_pieces_hold_each_element_once(x, size):
    parts = list(dtypes.pieces(dtypes.real(x), size))
    assert all(part.dim() == 1 and 0 < part.numel() <= size for part in parts)
    assert tally([value for part in parts for value in reference.elements(part)]) == tally(reference.elements(x))


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(6, 4),
        torch.ones(6, 4).t(),
        torch.ones(2, 3, 5, 7).to(memory_format=torch.channels_last),
        torch.ones(()),
    ],
)
def test_a_dense_tensor_is_not_copied(x):
    start = x.data_ptr()
    offsets = [(part.data_ptr() - start) // 4 for part in dtypes.pieces(x, 10)]
    assert offsets == list(range(0, x.numel(), 10))


def test_an_expanded_tensor_is_copied_a_piece_at_a_time():
    x = torch.zeros(1).expand(1000, 1000)
    assert max(part.untyped_storage().nbytes() for part in dtypes.pieces(x, 100)) <= 400


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_real_floats_are_taken_as_they_are(dtype):
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    real = dtypes.real(x)
    assert (real.dtype, real.data_ptr(), real.requires_grad) == (dtype, x.data_ptr(), False)


@pytest.mark.parametrize("x", [torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])])
def test_a_complex_number_is_two_elements(x):
    assert dtypes.real(x).tolist() == [[1.0, -2.0]]


def test_a_lazily_negated_tensor_is_negative():
    x = torch.tensor([1 + 2j]).conj().imag
    assert x.is_neg()
    assert dtypes.real(x).tolist() == [-2.0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_become_float32(dtype):
    real = dtypes.real(torch.tensor([0.5, math.nan], dtype=dtype))
    assert real.dtype == torch.float32
    assert real[0] == 0.5
    assert real[1].isnan()


def test_rows_are_as_wide_as_the_device_allows():
    assert dtypes.row_dtype(torch.device("cpu")) == torch.float64
    assert dtypes.row_dtype(torch.device("cuda", 1)) == torch.float64
    assert dtypes.row_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("n", [0, 1, 63, 64, 1000])
def test_counting_by_scatter_is_counting(dtype, n):
    codes = torch.randint(0, 40, (n,), dtype=dtype)
    assert torch.equal(counts.scattered(codes, 50), torch.bincount(codes, minlength=50))

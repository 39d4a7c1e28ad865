"""Every element is seen once, whatever the type and the memory layout, and no chunk is larger than asked for."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from tests.modes import NoHostRead
from tests.statistics import reference
from tests.statistics.strategies import piece_sizes, tensors
from torchprobe.statistics import buckets, dtypes, histograms, moments, norms


def tally(values: list[float]) -> Counter[str]:
    return Counter(str(abs(value)) for value in values)  # the sign of a NaN or zero means nothing


@given(x=tensors(), size=piece_sizes())
@settings(max_examples=100, deadline=None)
def test_chunks_hold_each_element_once(x, size):
    parts = list(dtypes.chunks(dtypes.real(x), size))
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
    offsets = [(part.data_ptr() - start) // 4 for part in dtypes.chunks(x, 10)]
    assert offsets == list(range(0, x.numel(), 10))


def test_an_expanded_tensor_is_copied_a_chunk_at_a_time():
    x = torch.zeros(1).expand(1000, 1000)
    assert max(part.untyped_storage().nbytes() for part in dtypes.chunks(x, 100)) <= 400


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
    assert torch.equal(buckets.scattered(codes, 50), torch.bincount(codes, minlength=50))


@st.composite
def permuted(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), min_size=2, max_size=4))
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    x = x.permute(draw(st.permutations(range(len(shape)))))
    return x.expand(3, *x.shape) if draw(st.booleans()) else x


@given(x=permuted(), trailing=st.sampled_from((1, 2)), piece=st.sampled_from((1, 5, 2**18)))
@settings(max_examples=200, deadline=None)
def test_chunks_of_examples_are_the_examples_in_order(x, trailing, piece, in_chunks_of):
    own = x.shape[x.dim() - trailing :]
    with in_chunks_of(piece):
        parts = list(dtypes.examples(x, trailing))
    assert all(part.numel() <= max(piece, own.numel()) for part in parts)
    assert torch.equal(torch.cat(parts), x.reshape(-1, *own) if x.numel() else x.new_zeros(0, *own))
    assert x.numel() or len(parts) == 1


@pytest.mark.parametrize("x", [torch.ones(50), torch.ones(4, 30, 50), torch.ones(4, 50, 30).transpose(1, 2)])
def test_examples_of_a_dense_tensor_are_not_copied(x, in_chunks_of):
    with in_chunks_of(100):
        parts = list(dtypes.examples(x, 1))
    inside = [part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in parts]
    assert all(inside)


def test_arithmetic_is_float32_or_wider():
    assert dtypes.arithmetic(torch.ones(1, dtype=torch.bfloat16), "x") == torch.float32
    assert dtypes.arithmetic(torch.ones(1, dtype=torch.float64), "x") == torch.float64
    with pytest.raises(TypeError, match=r"x: got a tensor of torch.bool, takes a floating one"):
        dtypes.arithmetic(torch.ones(1).bool(), "x")


def fake(device: str) -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3, device=device)


MEASURABLE = {
    "float32": lambda: torch.ones(3),
    "bfloat16": lambda: torch.ones(3).bfloat16(),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "an expanded view": lambda: torch.ones(1).expand(4, 4),
    "empty": lambda: torch.zeros(0),
    "0-dim": lambda: torch.tensor(1.0),
}

ODD = {
    **{str(dtype): lambda dtype=dtype: torch.ones(3).to(dtype) for dtype in (torch.int8, torch.uint8, torch.bool)},
    **{str(dtype): lambda dtype=dtype: torch.ones(3).to(dtype) for dtype in (torch.int64, torch.uint16)},
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "meta": lambda: torch.ones(3, device="meta"),
    "fake": lambda: fake("cpu"),
    "lazy": lambda: torch.nn.LazyLinear(3).weight,
}


@pytest.mark.parametrize("make", MEASURABLE.values(), ids=MEASURABLE.keys())
def test_what_is_measurable_is_taken_by_every_statistic(make):
    x = make()
    assert dtypes.measurable(x)
    for statistic in (norms.finite_sums, norms.l2_norms, histograms.log_histograms, histograms.linear_histograms):
        assert len(statistic([torch.ones(2), x])) == 2
    moments.compute(x)
    norms.sum_squares(x)


@pytest.mark.filterwarnings("ignore")  # torch's own, of formats that are young or old
@pytest.mark.parametrize("make", ODD.values(), ids=ODD.keys())
def test_what_is_odd_is_told_before_it_spoils_a_list(make):
    some = [torch.ones(2), make(), torch.full((3,), 2.0)]
    found = norms.l2_norms([x for x in some if dtypes.measurable(x)])
    assert found.tolist() == pytest.approx([math.sqrt(2), math.sqrt(12)])


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no 4-bit floats")
def test_numbers_packed_in_a_byte_are_not_measurable():
    assert not dtypes.measurable(torch.zeros(3, dtype=torch.float4_e2m1fn_x2))


def test_a_predicate_reads_nothing():
    with NoHostRead():
        assert dtypes.measurable(torch.randn(5))

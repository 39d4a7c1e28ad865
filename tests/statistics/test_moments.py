"""Mean, variance and the rest are those of the finite elements, however awkward, and merge as if concatenated."""

from __future__ import annotations

import math
import statistics
from itertools import permutations
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.statistics import reference
from tests.statistics.strategies import NARROW, piece_sizes, tensors
from torchprobe.statistics import dense, moments

COUNT, MEAN, M2, MAX_ABS, ZEROS, NONFINITE, FOURTH = range(7)
EXACT = [COUNT, MAX_ABS, ZEROS, NONFINITE]


def assert_close(row: torch.Tensor, expected: list[float], mean: float = 3e-7, deviation: float = 2e-6) -> None:
    """Counts and max_abs exactly; the mean as a part of max_abs, m2 and fourth of themselves, as float32 sums give.

    What is told apart by no float64 mean is let pass.
    """
    row = row.tolist()
    count, _, m2, max_abs, *_, fourth = expected
    assert [row[i] for i in EXACT] == [expected[i] for i in EXACT]
    assert row[MEAN] == pytest.approx(expected[MEAN], rel=0, abs=mean * max_abs)
    slack = 1e-15 * max_abs
    tolerance = deviation * m2 + 4 * slack * math.sqrt(count * m2) + 4 * count * slack**2
    assert row[M2] == pytest.approx(m2, rel=0, abs=tolerance)
    if 1e-150 < max_abs < 1e150:  # beyond, squares leave float64
        assert row[FOURTH] == pytest.approx(fourth, rel=max(deviation, 1e-12), abs=0)


@given(x=tensors(), piece=piece_sizes())
@settings(max_examples=150, deadline=None)
def test_moments_are_those_of_the_finite_elements(x, piece, in_chunks_of):
    with in_chunks_of(piece):
        assert_close(moments.compute(x), reference.moments(x))


@given(x=tensors(), piece=piece_sizes())
@settings(max_examples=150, deadline=None)
def test_the_careful_way_is_exact_to_float64(x, piece, in_chunks_of):
    with in_chunks_of(piece), mock.patch.object(dense, "applies_to", return_value=False):
        assert_close(moments.compute(x), reference.moments(x), mean=1e-14, deviation=1e-12)


@given(parts=st.lists(tensors(), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_combined_rows_are_the_row_of_the_concatenation(parts):
    row = torch.zeros(7, dtype=torch.float64)
    for part in parts:
        row = moments.combine(row, moments.compute(part))
    assert_close(row, reference.moments_of_all(parts))


@pytest.mark.parametrize("sizes", [(1, 999), (10, 20, 3), (500, 1, 1, 2)])
def test_parts_of_unequal_size_and_mean_combine_exactly(sizes):
    parts = [torch.randn(size, dtype=torch.float64) + 10.0**i for i, size in enumerate(sizes)]
    rows = [moments.compute(part) for part in parts]
    together = torch.cat(parts)
    combined = rows[0]
    for row in rows[1:]:
        combined = moments.combine(combined, row)
    assert combined[MEAN].item() == pytest.approx(together.mean().item(), rel=1e-13)
    assert (combined[M2] / combined[COUNT]).sqrt().item() == pytest.approx(together.std(correction=0).item(), rel=1e-13)


def test_the_difference_of_the_means_adds_to_the_variance():
    a, b = (moments.compute(torch.tensor(x)) for x in ([1.0, 3.0], [10.0]))
    expected = [3.0, 14 / 3, 2.0 + 128 / 3, 10.0, 0.0, 0.0, 1.0 + (1 + 81) / 1e4]
    torch.testing.assert_close(moments.combine(a, b), torch.tensor(expected, dtype=torch.float64))


@given(parts=st.lists(tensors(NARROW), min_size=3, max_size=3))
@settings(max_examples=40, deadline=None)
def test_the_order_of_combining_does_not_matter(parts):
    expected = reference.moments_of_all(parts)
    for a, b, c in permutations([moments.compute(part) for part in parts]):
        assert_close(moments.combine(moments.combine(a, b), c), expected)
        assert_close(moments.combine(a, moments.combine(b, c)), expected)


@given(x=tensors())
@settings(max_examples=40, deadline=None)
def test_the_row_of_zeros_is_the_identity(x):
    row, nothing = moments.compute(x), torch.zeros(7, dtype=torch.float64)
    assert torch.equal(moments.combine(row, nothing), row)
    assert torch.equal(moments.combine(nothing, row), row)


def test_a_row_of_enormous_numbers_survives_the_identity():
    row = moments.compute(torch.full((3,), 1e200, dtype=torch.float64))
    nothing = torch.zeros(7, dtype=torch.float64)
    assert torch.equal(moments.combine(row, nothing), row)
    assert torch.equal(moments.combine(nothing, row), row)


def test_many_rows_combine_at_once():
    a, b = torch.randn(4, 10) + 3, torch.randn(4, 7) * 2
    rows_a, rows_b = (torch.stack([moments.compute(x) for x in many]) for many in (a, b))
    expected = torch.stack([moments.combine(x, y) for x, y in zip(rows_a, rows_b, strict=True)])
    assert torch.equal(moments.combine(rows_a, rows_b), expected)
    assert torch.equal(moments.combine(rows_a[0], rows_b)[0], expected[0])


@pytest.mark.parametrize("offset", [1e6, -1e6])
def test_a_mean_a_million_times_the_deviation_keeps_the_deviation(offset, in_chunks_of):
    x = (torch.randn(10_000, dtype=torch.float64) + offset).float()
    expected = x[1:].double().std(correction=0).item()
    x[0] = math.nan
    with in_chunks_of(1000):
        summary = moments.summarise(moments.compute(x).tolist())
    assert summary["std"] == pytest.approx(expected, rel=1e-9)


def test_constant_elements_have_no_deviation_at_all():
    x = torch.full((1000,), 1e7)
    x[::3] = math.nan
    assert moments.compute(x)[M2] == 0.0


@given(value=st.floats(2**-100, 2**60, width=32), size=st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_equal_elements_have_their_own_value_as_mean_and_no_deviation(value, size):
    row = moments.compute(torch.full((size,), value))
    assert (row[MEAN].item(), row[M2].item()) == (value, 0.0)


def test_the_squares_of_huge_elements_do_not_overflow():
    summary = moments.summarise(moments.compute(torch.tensor([3e38, -3e38])).tolist())
    assert summary["std"] == pytest.approx(3e38, rel=1e-6)
    assert summary["rms"] == pytest.approx(3e38, rel=1e-6)


def test_float64_beyond_its_own_squares_has_an_infinite_deviation():
    x = torch.tensor([1.7e308, -1.7e308, 0.0], dtype=torch.float64)
    row = moments.compute(x)
    assert row.tolist()[:FOURTH] == [3, 0, math.inf, 1.7e308, 1, 0]
    assert "kurtosis" not in moments.summarise(row.tolist())


@pytest.mark.parametrize("x", [torch.zeros(0), torch.zeros(3, 0, 2, dtype=torch.complex64)])
def test_an_empty_tensor_is_a_row_of_zeros(x):
    assert torch.equal(moments.compute(x), torch.zeros(7, dtype=torch.float64))


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"x: got a tensor of torch.int64, takes a floating or complex one"):
        moments.compute(torch.arange(3))


def test_a_summary_says_what_statistics_says():
    values = [1.0, -2.0, 0.0, 4.5]
    summary = moments.summarise(moments.compute(torch.tensor([*values, math.nan])).tolist())
    assert summary == {
        "mean": pytest.approx(statistics.fmean(values)),
        "std": pytest.approx(statistics.pstdev(values)),
        "rms": pytest.approx(math.sqrt(statistics.fmean(v * v for v in values))),
        "max_abs": 4.5,
        "zero_fraction": 0.25,
        "kurtosis": pytest.approx(4 * (1 + 16 + 4.5**4) / (1 + 4 + 4.5**2) ** 2 - 3),
        "nonfinite": 1.0,
    }


def kurtosis(x: torch.Tensor) -> float | None:
    return moments.summarise(moments.compute(x).tolist()).get("kurtosis")


def test_kurtosis_tells_massive_activations_from_a_normal_distribution():
    x = torch.randn(100_000)
    assert abs(kurtosis(x)) < 0.1
    x[0] = 3000.0
    assert kurtosis(x) > 1e4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [3e37, 1e18, 1e-10, 1e-40])
def test_kurtosis_does_not_depend_on_the_scale(dtype, scale):
    x = (torch.tensor([1.0, -2.0, 0.0, 8.0], dtype=torch.float64) * scale).to(dtype)
    wide = x.double() / scale
    expected = wide.pow(4).mean() / wide.square().mean() ** 2 - 3
    assert kurtosis(x) == pytest.approx(expected.item(), rel=1e-5)
    compiled = torch.compile(moments.compute, fullgraph=True, backend="aot_eager")
    assert moments.summarise(compiled(x).tolist())["kurtosis"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("x", "expected"), [([5.0], -2.0), ([1.0, -1.0], -2.0), ([0.0, 3.0, 0.0, 0.0], 1.0)])
def test_kurtosis_of_few_elements(x, expected):
    assert kurtosis(torch.tensor(x)) == pytest.approx(expected)


@pytest.mark.parametrize("x", [torch.zeros(3), torch.full((2,), 1e-200, dtype=torch.float64)])
def test_where_squares_say_nothing_there_is_no_kurtosis(x):
    assert kurtosis(x) is None


@given(parts=st.lists(tensors(NARROW), min_size=2, max_size=4))
@settings(max_examples=60, deadline=None)
def test_kurtosis_of_unequal_parts_is_that_of_all_elements(parts):
    row = torch.zeros(7, dtype=torch.float64)
    for part in parts:
        row = moments.combine(row, moments.compute(part))
    values = [value for part in parts for value in reference.finite(part)]
    found, expected = moments.summarise(row.tolist()).get("kurtosis"), reference.kurtosis(values)
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-5, abs=1e-5))


def test_without_a_finite_element_there_is_only_their_number_to_report():
    assert moments.summarise(moments.compute(torch.tensor([math.nan, math.inf])).tolist()) == {"nonfinite": 2.0}
    assert moments.summarise([0.0] * 7) == {"nonfinite": 0.0}


def test_a_row_of_another_statistic_is_refused():
    with pytest.raises(ValueError, match=r"row: got 4 numbers, takes 7 \(count, mean, m2, .*as compute returns"):
        moments.summarise([1.0, 2.0, 3.0, 4.0])

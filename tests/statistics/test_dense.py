"""The fast way for ordinary float32 in host memory agrees with the careful one, and steps aside when it must."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.statistics import reference
from tests.statistics.strategies import tensors
from torchprobe.statistics import dense, moments, norms


@given(x=tensors())
@settings(max_examples=150, deadline=None)
def test_a_row_is_the_sum_of_squares_of_the_finite_elements(x):
    squares, nonfinite = norms.sum_squares(x).tolist()
    assert nonfinite == reference.nonfinite(x)
    assert squares == pytest.approx(reference.squares(x), rel=2e-6, nan_ok=True)


@given(x=tensors(), y=tensors())
@settings(max_examples=100, deadline=None)
def test_sums_of_squares_combine_to_that_of_the_concatenation(x, y):
    assume(x.numel() and y.numel())
    whole = torch.tensor(reference.elements(x) + reference.elements(y), dtype=torch.float64)
    squares, nonfinite = norms.combine_squares(norms.sum_squares(x), norms.sum_squares(y)).tolist()
    assert nonfinite == reference.nonfinite(whole)
    assert squares == pytest.approx(reference.squares(whole), rel=2e-6, nan_ok=True)


def test_sums_of_squares_combine_many_at_once():
    dead, alive = torch.tensor([math.nan, 2.0]), torch.tensor([3.0, 1.0])
    found = norms.combine_squares(torch.stack((dead, alive, dead)), torch.stack((alive, alive, dead)))
    torch.testing.assert_close(found, torch.tensor([[3.0, 3], [6, 2], [math.nan, 4]]), equal_nan=True)


@pytest.mark.parametrize("n", [3, 300_000])
def test_a_tensor_without_a_finite_element_has_no_sum_of_squares_inside_a_graph_either(n):
    compiled = torch.compile(norms.sum_squares, fullgraph=True, backend="aot_eager")
    for x in (torch.full((n,), math.nan), torch.zeros(n), torch.randn(n)):
        torch.testing.assert_close(compiled(x), norms.sum_squares(x), rtol=2e-6, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_element_that_is_not_finite_is_left_to_the_careful_way(bad):
    x = torch.randn(300_000)
    x[123_456] = bad
    assert dense.sums(x) is None
    assert dense.moments(x) is None
    assert moments.compute(x)[5] == 1


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_numbers_whose_squares_leave_float32_are_left_to_the_careful_way(scale):
    x = torch.randn(1000) * scale
    assert dense.sums(x) is None
    assert dense.moments(x) is None
    assert math.sqrt(norms.sum_squares(x)[0]) == pytest.approx(x.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(3_000_001,), (1000, 7, 200)])
def test_many_elements_stay_within_a_millionth(shape):
    x = torch.rand(shape)
    assert dense.sums(x)[0] == pytest.approx(x.double().square().sum().item(), rel=1e-6)
    count, mean, m2, *_ = dense.moments(x.transpose(0, -1))
    assert count == x.numel()
    assert mean == pytest.approx(x.double().mean().item(), rel=1e-6)
    assert m2 / count == pytest.approx(x.double().var(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@given(power=st.integers(-37, 38), wide=st.booleans(), dead=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_the_largest_magnitude_is_exact_and_fourth_powers_right_at_every_size(kind, power, wide, dead, seed):
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(1500, generator=made, dtype=torch.float64) * 10.0**power
    x = x * 10 ** (-20 * torch.rand(1500, generator=made)) if wide else x
    x = (x.relu() if dead else x).to(kind)
    row = dense.moments(x)
    assume(row is not None)
    elements = x.double()
    largest = elements.abs().max()
    assert row[3:5] == (largest, (x == 0).sum())
    fourth = (elements / largest).pow(4).sum() if largest else torch.zeros(())
    assert row[6] == pytest.approx(fourth.item(), rel=2e-6)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_fast_way(kind):
    x = torch.randn(600, 1000).to(kind).T
    assert dense.moments(x) is not None
    assert dense.sums(x, absolute=True) == pytest.approx(
        (x.double().square().sum().item(), 0.0, x.double().abs().sum().item()), rel=1e-6
    )


ORDINARY = {
    "after dropout": lambda: torch.randn(3_000_000) * (torch.rand(3_000_000) < 0.1),
    "after ReLU": lambda: torch.randn(3_000_000).relu(),
    "all equal but one": lambda: torch.full((3_000_000,), 0.3).index_fill_(0, torch.tensor([0]), 0.7),
    "a first chunk unlike the rest": lambda: torch.cat((torch.zeros(dense.CHUNK), 1e4 + 0.01 * torch.randn(3_000_000))),
}


@pytest.mark.parametrize("make", ORDINARY.values(), ids=ORDINARY.keys())
def test_rounding_does_not_add_up_over_elements_that_are_alike(make):
    x = make()
    wide = x.double()
    count, mean, m2, max_abs, zeros, _, fourth = dense.moments(x)
    assert (count, max_abs, zeros) == (len(x), x.abs().max().item(), (x == 0).sum().item())
    assert mean == pytest.approx(wide.mean().item(), rel=0, abs=1e-7 * max_abs)
    assert m2 == pytest.approx(wide.var(correction=0).item() * count, rel=5e-7)
    assert fourth == pytest.approx((wide / max_abs).pow(4).sum().item(), rel=5e-7)
    assert dense.sums(x)[0] == pytest.approx(wide.square().sum().item(), rel=5e-7)


def test_only_plain_floats_in_host_memory_are_looked_at():
    assert dense.applies_to(torch.ones(3))
    assert not dense.applies_to(torch.ones(3, dtype=torch.float64))
    assert not dense.applies_to(torch.ones(0))
    assert not dense.applies_to(torch.ones(3, device="meta"))

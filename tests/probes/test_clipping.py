"""What is concluded from sums of gradients, and how parts of them merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.probes.clipping import Changes, ChangesReporter, Judge, is_short
from torchprobe.probes.gradients import Gradients
from torchprobe.statistics import norms


def row(left: torch.Tensor, used: torch.Tensor, operations: float = 1.0) -> np.ndarray:
    sums = norms.finite_sums([left, used]).flatten()
    beside = torch.tensor([0.0, operations, torch.finfo(left.dtype).eps])
    return torch.cat((sums, norms.largest([used]), beside)).numpy()


def changes(left: list[torch.Tensor], used: list[torch.Tensor]) -> Changes:
    return Changes.of(np.stack([row(*pair) for pair in zip(left, used, strict=True)]))


def some(seed: int, sizes=(3, 40, 700)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [10 * torch.randn(n, generator=generator) for n in sizes]


@given(seed=st.integers(0, 10**6), digits=st.integers(1, 99), exponent=st.integers(-5, 1))
@settings(max_examples=100, deadline=None)
def test_clipping_by_norm_and_by_value_is_known_at_the_first_step(seed, digits, exponent):
    left, limit = some(seed), digits * 10.0**exponent
    norm = float(torch.cat(left).double().norm())
    by_norm = [x * min(1.0, limit / (norm + 1e-6)) for x in left]
    assert Judge()(changes(left, by_norm)) == (limit < norm, "")
    by_value = [x.clamp(-limit, limit) for x in left]
    lost = any(float((a - b).abs().sum()) > 1e-5 * float(a.abs().sum()) for a, b in zip(left, by_value, strict=True))
    if lost:
        assert Judge()(changes(left, by_value)) == (True, "")


@given(seed=st.integers(0, 10**6), size=st.floats(1e-3, 1.0))
@settings(max_examples=100, deadline=None)
def test_noise_is_never_clipping(seed, size):
    left = some(seed)
    noisy = [a + size * b for a, b in zip(left, some(seed + 1), strict=True)]
    assert Judge()(changes(left, noisy))[0] is None


@given(seed=st.integers(0, 10**6), cut=st.integers(1, 39))
@settings(max_examples=50, deadline=None)
def test_parts_of_a_gradient_are_what_the_whole_is(seed, cut):
    left, used = some(seed)[1], some(seed + 1)[1]
    merged = ChangesReporter(Gradients()).combine_rows(
        row(left[:cut], used[:cut])[None], row(left[cut:], used[cut:], 3.0)[None]
    )
    assert merged[0] == pytest.approx(row(left, used, 3.0), rel=1e-12)


@pytest.mark.parametrize(("number", "short"), [(1.0, True), (0.25, True), (5e-4, True), (1.337, False), (0.0, False)])
def test_limits_as_people_write_them(number, short):
    assert is_short(number, 1e-5) is short
    assert is_short(number * (1 + 5e-6), 1e-5) is short
    assert not is_short(number * 1.001, 1e-5)

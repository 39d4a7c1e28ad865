"""Targets of numbers from the gradients of a Gaussian likelihood: never a wrong one, and nothing of another loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.capture.predictions.reading import meaning_of
from torchprobe.capture.predictions.targets import targets_of


def recovered(field: str, loss, seed: int = 0, scale: float = 1.0, spread: float = 1.0, dtype=torch.float32):
    """Targets, what was recovered, and whether anything is claimed."""
    generator = torch.Generator().manual_seed(seed)
    m, source, y = torch.randn(3, 40, generator=generator)
    source = source * spread if field.startswith("log") else (source * spread).exp()
    m, source = (x.to(dtype).requires_grad_() for x in (m, source))
    meaning = meaning_of(field)
    variance = meaning.convert(source.float())
    gradients = torch.autograd.grad(loss(m.float(), y, variance) * scale, (m, source))
    found, claimed = targets_of(m.detach().float(), variance.detach(), *gradients, meaning.spread)
    return y, found, bool(claimed)


def likelihood(m, y, variance):
    return F.gaussian_nll_loss(m, y, variance, full=True)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["variance", "log_var", "std", "log_std"]),
    st.sampled_from([1e-3, 1.0, 65536.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_a_target_is_right(seed, field, scale, spread):
    y, found, claimed = recovered(field, likelihood, seed, scale, spread)
    assert claimed
    torch.testing.assert_close(found.float(), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_gradients_tell_or_nothing_is_claimed(dtype):
    y, found, claimed = recovered("log_var", likelihood, dtype=dtype, spread=0.3)
    assert not claimed or (found.float() - y).abs().amax() < 0.2


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, y, v: ((m - y).abs() / v.sqrt() + v.log()).mean(),  # a Laplace distribution
        lambda m, y, v: F.mse_loss(m, y) + 0.1 * v.mean(),
        lambda m, y, v: F.smooth_l1_loss(m, y) + F.mse_loss(v, (m - y).square()),
        lambda m, y, v: (v.detach().sqrt() * F.gaussian_nll_loss(m, y, v, reduction="none")).mean(),
        lambda m, y, v: 0.0 * (m.sum() + v.sum()),
    ],
)
def test_of_another_loss_nothing_is_claimed(loss):
    assert not recovered("variance", loss)[2]


def test_a_number_that_is_left_out_of_the_loss_has_no_target():
    mask = torch.arange(40) % 4 > 0
    y, found, claimed = recovered("variance", lambda m, y, v: likelihood(m[mask], y[mask], v[mask]))
    assert claimed
    assert found.isnan().equal(~mask)
    torch.testing.assert_close(found[mask].float(), y[mask], rtol=1e-3, atol=1e-3)

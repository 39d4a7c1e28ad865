"""Targets from the gradient at the logits: never a wrong one, and nothing of another loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchprobe.capture.predictions.forms import BINARY, IGNORED, LAST, Predicted
from torchprobe.capture.predictions.gradient import Recovered, recover

ROWS = 40


def recovered(z: Tensor, loss: Tensor, form=LAST):
    (gradient,) = torch.autograd.grad(loss, z)
    return of_one_pass(z.detach().float(), gradient.float(), form, gradient.dtype)


def of_one_pass(z: Tensor, gradient: Tensor, form, precision: torch.dtype) -> Recovered:
    found = recover(Predicted.of([z], form), gradient[None], form, precision)
    return found._replace(targets=found.targets[0])


def drawn(seed: int, classes: int, spread: float, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randn(ROWS, classes, generator=generator) * spread).to(dtype).requires_grad_()
    return z, torch.randint(0, classes, (ROWS,), generator=generator)


seeds, spreads = st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 4.0, 15.0])


@settings(max_examples=150, deadline=None)
@given(
    seeds,
    spreads,
    st.sampled_from([2, 3, 4, 7, 100]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([1e-3, 1.0, 1024.0]),
)
def test_a_target_is_right_or_none_is_given(seed, spread, classes, dtype, smoothing, scale):
    z, y = drawn(seed, classes, spread, dtype)
    y[::7] = IGNORED
    found = recovered(z, F.cross_entropy(z, y, label_smoothing=smoothing) * scale)
    assert bool(((found.targets == y) | (found.targets == IGNORED)).all())
    checked, passed, _ = found.evidence.tolist()
    assert passed == (found.targets != IGNORED).sum()
    assert passed <= checked <= (y != IGNORED).sum()


@pytest.mark.parametrize("classes", [2, 3, 5, 1000, 50_000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_logits_give_every_target(classes, smoothing, dtype):
    z, y = drawn(3, classes, 1.0, dtype)
    found = recovered(z, F.cross_entropy(z.float(), y, label_smoothing=smoothing))
    share = 1.0 if smoothing == 0 or classes > 3 else 0.8
    assert (found.targets == y).float().mean() >= share


@settings(max_examples=30, deadline=None)
@given(
    seeds,
    st.sampled_from([0.1, 1.0, 4.0]),
    st.sampled_from([400, 1000, 3001]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from(["wrong", "right", "too sure"]),
)
def test_of_many_rows_of_many_classes_some_classes_tell(seed, spread, classes, dtype, smoothing, kind):
    generator = torch.Generator().manual_seed(seed)
    z, y = torch.randn(300, classes, generator=generator) * spread, torch.randint(classes, (300,), generator=generator)
    push = {"wrong": 0.0, "right": 3.0 + 2.0 * spread, "too sure": 12.0 + 4.0 * spread}[kind]
    z = (z + push * F.one_hot(y, classes)).to(dtype).requires_grad_()
    y[::5] = IGNORED
    found = recovered(z, F.cross_entropy(z.float(), y, label_smoothing=smoothing))
    assert bool(((found.targets == y) | (found.targets == IGNORED)).all())
    checked, passed, _ = found.evidence.tolist()
    assert passed <= checked <= 240
    if dtype is torch.float32 and kind != "too sure":  # else rounding leaves little of the gradients
        assert passed >= 0.9 * checked


@pytest.mark.parametrize("loss", ["squared error of a choice", "several labels", "margin", "temperature", "energy"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_many_rows_of_many_classes_of_another_loss_do_not_pass(loss, spread):
    z = (torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)) * spread).requires_grad_()
    checked, passed, _ = recovered(z, OTHERS[loss](z, torch.arange(300))).evidence.tolist()
    assert passed <= 0.1 * checked


def test_log_probabilities_of_many_classes():
    z, y = torch.randn(300, 1000), torch.randint(1000, (300,))
    log = z.log_softmax(-1).requires_grad_()
    found = recovered(log, F.nll_loss(log, y))
    assert torch.equal(found.targets, y)


def test_a_row_of_zeros_is_ignored_and_counted_when_it_was_sure():
    z = torch.tensor([[200.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.5]], requires_grad=True)
    found = recovered(z, F.cross_entropy(z, torch.tensor([0, 2])))
    assert found.targets.tolist() == [IGNORED, 2]
    assert found.evidence.tolist() == [1, 1, 1]


def thirds(shape: torch.Size) -> Tensor:
    return (torch.arange(shape.numel()) % 3 == 0).float().view(shape)


OTHERS = {
    "squared error of a choice": lambda z, y: F.mse_loss(z, F.one_hot(y, z.shape[-1]).float()),
    "squared error": lambda z, y: F.mse_loss(z, torch.randn(z.shape, generator=torch.Generator().manual_seed(1))),
    "absolute error": lambda z, y: F.l1_loss(z, torch.randn(z.shape, generator=torch.Generator().manual_seed(1))),
    "several labels": lambda z, y: F.binary_cross_entropy_with_logits(z, thirds(z.shape)),
    "margin": F.multi_margin_loss,
    "temperature": lambda z, y: F.cross_entropy(z / 2, y),
    "sum": lambda z, y: z.sum(),
    "energy": lambda z, y: z.square().sum(),
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([0.3, 1.0, 4.0]), st.sampled_from([2, 3, 5, 100]))
@pytest.mark.parametrize("loss", OTHERS)
def test_hardly_a_row_of_another_loss_passes(loss, seed, spread, classes):
    z, y = drawn(seed, classes, spread)
    checked, passed, _ = recovered(z, OTHERS[loss](z, y)).evidence.tolist()
    assert passed <= 0.5 * checked


@settings(max_examples=60, deadline=None)
@given(seeds, spreads, st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([None, 3.0]))
def test_binary_cross_entropy_by_the_sign(seed, spread, dtype, weight):
    z, _ = drawn(seed, 1, spread, dtype)
    y = torch.randint(0, 2, (ROWS, 1), generator=torch.Generator().manual_seed(seed))
    loss = F.binary_cross_entropy_with_logits(
        z.float(), y.float(), pos_weight=None if weight is None else torch.tensor(weight)
    )
    targets = recovered(z, loss, BINARY).targets
    assert bool(((targets == y[:, 0]) | (targets == IGNORED)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("yes", [True, False])
def test_the_only_row_of_its_class_counts(yes, spread, dtype):
    z, _ = drawn(5, 1, spread, dtype)
    y = torch.full((ROWS, 1), float(not yes))
    y[7] = float(yes)
    found = recovered(z, F.binary_cross_entropy_with_logits(z, y.to(dtype)), BINARY)
    assert found.targets[7] == yes
    assert bool(((found.targets == y[:, 0]) | (found.targets == IGNORED)).all())


def test_the_only_row_of_its_class_with_a_weight_of_its_own_is_not_known():
    z, _ = drawn(5, 1, 1.0)
    y = torch.zeros(ROWS, 1)
    y[7] = 1.0
    loss = F.binary_cross_entropy_with_logits(z, y, pos_weight=torch.tensor(3.0))
    assert recovered(z, loss, BINARY).targets[7] == IGNORED


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_left_out(bad):
    z, y = drawn(0, 6, 1.0)
    gradient = torch.autograd.grad(F.cross_entropy(z, y), z)[0].clone()
    gradient[2, 3] = bad
    found = of_one_pass(z.detach(), gradient, LAST, torch.float32)
    assert found.targets[2] == IGNORED
    assert found.evidence.tolist() == [ROWS - 1, ROWS - 1, 0]


def test_no_rows_at_all():
    assert of_one_pass(torch.zeros(1, 4), torch.zeros(1, 4), LAST, torch.float32).evidence.tolist() == [0, 0, 0]

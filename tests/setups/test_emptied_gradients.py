"""Gradients that are zeroed between `backward()` and `optimizer.step()`: the step uses none of that backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import torchprobe
from torchprobe.testing import MemoryWriter

STEPS = 6
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def net(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(k: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(k)
    return torch.randn(8, 4, generator=random), torch.randn(8, 1, generator=random)


def zero(optimizer: torch.optim.Optimizer, how: str) -> None:
    if how == "by hand":
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = None
    else:
        optimizer.zero_grad(set_to_none=how == "removed")


@pytest.mark.parametrize("how", ["removed", "in place", "by hand"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_such_a_step_has_no_loss_and_nothing_of_its_pass(kind, how):
    model, writer = net(), MemoryWriter()
    optimizer, right = OPTIMIZERS[kind](list(model.parameters())), {}
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(1, STEPS + 1):
            optimizer.zero_grad(set_to_none=how != "in place")
            loss = mse_loss(model(batch(k)[0]), batch(k)[1])
            loss.backward()
            if k in (1, 4):
                zero(optimizer, how)
            else:
                right[k] = loss.item()
            optimizer.step()
    assert session.step == STEPS
    assert dict(writer.scalars("overview/loss")) == pytest.approx(right)
    assert [step for step, _ in writer.scalars("activation_mean/0")] == list(right)
    assert [step for step, _ in writer.scalars("activation_grad_norm/0")] == list(right)
    assert [step for step, _ in writer.scalars("overview/grad_norm_unclipped")] == list(right)
    assert writer.scalars("overview/skipped_steps")[-1][1] == 0


def test_a_step_after_gradients_that_were_not_finite_were_taken_away_is_a_skipped_one():
    model, writer = net(), MemoryWriter()
    optimizer, right = torch.optim.Adam(model.parameters(), 0.01), {}
    with torchprobe.instrument(model, writer=writer) as session:
        for k in range(1, STEPS + 1):
            x, y = batch(k)
            loss = mse_loss(model(x if k != 4 else x * math.inf), y)
            loss.backward()
            if nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
                right[k] = loss.item()
            else:
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
    assert [step for step, _ in writer.scalars("overview/loss")] == list(right)
    assert dict(writer.scalars("overview/loss")) == pytest.approx(right)
    assert writer.scalars("overview/skipped_steps")[-1][1] == 1
    assert {alert.rule for alert in session.alerts} == {"non_finite"}


def test_of_two_optimizers_the_one_whose_gradients_are_there_uses_its_loss():
    model, writer = nn.ModuleList([net(), net()]), MemoryWriter()
    first, second = (torch.optim.SGD(half.parameters(), 0.1, momentum=0.9) for half in model)
    right = {}
    with torchprobe.instrument(model, writer=writer):
        for k in range(1, STEPS + 1):
            x, y = batch(k)
            a, b = mse_loss(model[0](x), y), mse_loss(model[1](x), -y)
            a.backward()
            b.backward()
            if k == 4:
                first.zero_grad()
            right[k] = b.item() if k == 4 else a.item() + b.item()
            for optimizer in (first, second):
                optimizer.step()
            for optimizer in (first, second):
                optimizer.zero_grad()
    assert dict(writer.scalars("overview/loss")) == pytest.approx(right)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_gradients_that_the_step_itself_zeroes_were_used(closure, clips):
    class Zeroing(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            self.zero_grad(set_to_none=False)
            return loss

    model, writer = net(), MemoryWriter()
    optimizer, right = Zeroing(model.parameters(), 0.1), {}
    with torchprobe.instrument(model, writer=writer):
        for k in range(1, STEPS + 1):

            def evaluate(k: int = k) -> Tensor:
                loss = mse_loss(model(batch(k)[0]), batch(k)[1])
                loss.backward()
                if clips:
                    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                right[k] = loss.item()
                return loss

            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
    assert dict(writer.scalars("overview/loss")) == pytest.approx(right)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_pass_whose_first_gradients_were_zeroed_is_said_to_be_one(by_hand, caplog):
    """Norms of each task by themselves, before the backward pass that trains; or projected gradients, put by hand."""
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(4):
            output = model(batch(k)[0])
            for task in (output.mean(), output.square().mean()):
                optimizer.zero_grad()
                task.backward(retain_graph=True)
            found = [parameter.grad for parameter in model.parameters()]
            optimizer.zero_grad()
            if by_hand:
                for parameter, gradient in zip(model.parameters(), found, strict=True):
                    parameter.grad = gradient
            else:
                output.exp().mean().backward()
            optimizer.step()
    said = (
        "Activations saw nothing in its first 3 sampled steps (gradients were zeroed between a pass's first backward()"
    )
    assert said in caplog.text
    assert "activation_mean/0" not in writer.tags()

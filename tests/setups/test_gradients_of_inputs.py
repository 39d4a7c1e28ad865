"""A backward pass for inputs alone, before the one that trains: what runs through that graph counts all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchprobe
from torchprobe.testing import MemoryWriter

GROUPS = ("activation_", "attention_", "calibration/", "uncertainty_", "overview/loss")


class Reads(nn.Module):
    """A layer of attention over tokens, whose mean is mapped by `head`."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, outputs)

    def forward(self, x: Tensor):
        hidden, _ = self.attention(x, x, x)
        out = self.head(hidden.mean(1))
        return out if out.shape[-1] > 2 else (out[:, :1], F.softplus(out[:, 1:]) + 0.1)


def loss_of(output, x: Tensor) -> Tensor:
    if isinstance(output, Tensor):
        return F.cross_entropy(output, (x[:, 0, :].argmax(-1)) % 5)
    return F.gaussian_nll_loss(output[0], x[:, 0, :1].detach(), output[1])


def of_grad(x: Tensor, loss: Tensor, output) -> None:
    torch.autograd.grad(loss, x, retain_graph=True)


def of_inputs(x: Tensor, loss: Tensor, output) -> None:
    loss.backward(inputs=[x], retain_graph=True)


def of_the_mean(x: Tensor, loss: Tensor, output) -> None:
    """As a saliency map is made: not of the loss, and of a part of what the model gives."""
    mean = output if isinstance(output, Tensor) else output[0]
    torch.autograd.grad(mean.sum(), x, retain_graph=True)


def of_grad_with_a_graph(x: Tensor, loss: Tensor, output) -> None:
    """As a gradient penalty does, here of weight 0."""
    torch.autograd.grad(loss, x, create_graph=True)


def nothing(x: Tensor, loss: Tensor, output) -> None:
    """The truth."""


def recorded(outputs: int, before, once_more: bool = False) -> dict[str, list[tuple[int, float]]]:
    """Of three steps. once_more: a second pass, over other inputs, is trained on beside the first."""
    model, writer = Reads(outputs), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for _ in range(3):
            x = torch.randn(40, 6, 8, generator=generator).requires_grad_()
            output = model(x)
            loss = loss_of(output, x)
            before(x, loss, output)
            if once_more:
                loss = loss + loss_of(model(x.detach() + 0.1), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert not session.alerts
    return {tag: writer.scalars(tag) for tag in writer.tags() if tag.startswith(GROUPS)}


@pytest.mark.parametrize("once_more", [False, True], ids=["alone", "beside another pass"])
@pytest.mark.parametrize("outputs", [5, 2], ids=["classes", "mean and variance"])
@pytest.mark.parametrize("before", [of_grad, of_inputs, of_the_mean, of_grad_with_a_graph])
def test_takes_nothing_from_the_pass_and_adds_nothing_to_it(before, outputs, once_more):
    expected, found = recorded(outputs, nothing, once_more), recorded(outputs, before, once_more)
    assert {tag.split("_")[0].split("/")[0] for tag in expected} >= {"activation", "attention", "calibration"}
    assert found == expected


def test_of_a_pass_that_is_not_trained_on_nothing_is_left():
    """As an attack in evaluation mode that only wants its inputs' gradients."""
    model, writer = Reads(5), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            x = torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(k)).requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(model(x), x), x)
            optimizer.zero_grad()
            loss_of(model((x + gradient.sign()).detach()), x).backward()
            optimizer.step()
    assert writer.scalars("calibration/count") == [(1, 40.0), (2, 40.0), (3, 40.0)]


def of_inputs_slope(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The loss of a critic with a gradient penalty between real and fake."""
    between = (0.5 * (real + fake)).requires_grad_()
    out = critic(between)
    (slope,) = torch.autograd.grad(out, between, torch.ones_like(out), create_graph=True)
    return critic(fake).mean() - critic(real).mean() + 10 * (slope.norm(dim=-1) - 1).square().mean()


def of_weights_slope(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """A loss with a penalty of its own gradient, as for flat minima."""
    loss = (critic(real) - critic(fake)).square().mean()
    slopes = torch.autograd.grad(loss, [*critic.parameters()], create_graph=True)
    return loss + sum(slope.square().sum() for slope in slopes)


CRITICS = {
    "smooth": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
    "convolution": lambda: nn.Sequential(nn.Conv1d(1, 3, 2), nn.LeakyReLU(), nn.Conv1d(3, 1, 3)),
}


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("judged", [of_inputs_slope, of_weights_slope])
def test_a_gradient_penalty_leaves_gradients_of_outputs_as_those_of_the_loss(judged, critic, caplog):
    """Autograd hands None to the hook of an output on which a penalty does not depend."""
    torch.manual_seed(0)
    critic = CRITICS[critic]()
    optimizer, writer, outputs = torch.optim.SGD(critic.parameters(), lr=0.05), MemoryWriter(), {"0": [], "2": []}
    real, fake = torch.randn(6, 1, 4), torch.randn(6, 1, 4)
    handles = [critic[int(n)].register_forward_hook(lambda m, a, out, n=n: outputs[n].append(out)) for n in outputs]
    loss = judged(critic, real, fake)
    truth = {}
    for name, found in outputs.items():
        gradients = torch.autograd.grad(loss, found, retain_graph=True, allow_unused=True)
        truth[name] = torch.cat([g.flatten() for g in gradients if g is not None]).norm().item()
    for handle in handles:
        handle.remove()
    with torchprobe.instrument(critic, writer=writer, every=1):
        judged(critic, real, fake).backward()
        optimizer.step()
    assert {name: writer.value(f"activation_grad_norm/{name}") for name in truth} == pytest.approx(truth, rel=1e-4)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_of_the_evaluations_of_a_closure_the_last_counts_with_what_a_penalty_makes_a_graph_of():
    """As a network that solves a differential equation is trained: its slope is judged, and not its output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer, writer, expected = torch.optim.LBFGS(model.parameters(), max_iter=4), MemoryWriter(), []
    found: list[float] = []

    def closure() -> Tensor:
        points = torch.randn(16, 2).requires_grad_()
        optimizer.zero_grad()
        output = model(points)
        (slope,) = torch.autograd.grad(output, points, torch.ones_like(output), create_graph=True)
        (loss := (slope - 1).square().mean()).backward()
        with torch.no_grad():
            found.append(nn.functional.linear(points, *model[0].parameters()).square().mean().sqrt().item())
        return loss

    with torchprobe.instrument(model, writer=writer, every=1):
        for _ in range(3):
            optimizer.step(closure)
            expected.append(found[-1])
    assert [value for _, value in writer.scalars("activation_rms/0")] == pytest.approx(expected, rel=1e-5)

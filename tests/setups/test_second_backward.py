"""`overview/loss` of backward passes that do not run through the output of a call of the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.functional import softplus

import torchprobe
from tests.setups.compiled import COMPILERS_WARNINGS
from torchprobe.testing import MemoryWriter

LOSS = "overview/loss"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(k: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(k)).requires_grad_()


def of_weights(model: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    return 0.1 * sum(p.square().sum() for p in model.parameters())


def of_one_layer(model: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    return 0.1 * model.get_parameter("2.weight").abs().sum()


def r1(model: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return 5 * gradient.square().sum(1).mean()


def at_other_points(model: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    points = x.detach().roll(1, 0).requires_grad_()
    (gradient,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    return 10 * (gradient.norm(dim=1) - 1).square().mean()


PENALTIES = (of_weights, of_one_layer, r1, at_other_points)
Penalty = Callable[[nn.Module, Tensor, Tensor], Tensor]


def iteration(model: nn.Module, k: int, penalty: Penalty | None, first: bool = False) -> float:
    x = batch(k)
    output = model(x)
    loss = softplus(-output).mean()
    terms = [loss] if penalty is None else [loss, penalty(getattr(model, "_orig_mod", model), x, output)]
    for term in reversed(terms) if first else terms:
        term.backward(retain_graph=True)
    return sum(term.item() for term in terms)


def run(penalty: Penalty, with_penalty: Iterable[bool], first: bool = False) -> tuple[list[float], list[float]]:
    """Of each step what `backward()` was called on, and what was written; NaN where nothing was."""
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    right = []
    with torchprobe.instrument(model, writer=writer):
        for k, wanted in enumerate(with_penalty):
            optimizer.zero_grad()
            right.append(iteration(model, k, penalty if wanted else None, first))
            optimizer.step()
    written = dict(writer.scalars(LOSS))
    return right, [written.get(step, math.nan) for step in range(1, len(right) + 1)]


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_is_in_the_loss_of_every_step(penalty, first, caplog):
    with caplog.at_level(logging.WARNING, "torchprobe"):
        right, got = run(penalty, [True] * 12, first)
    if math.isnan(got[0]):
        assert first  # the very first one that comes before cannot be heard, only seen
        right[0] = math.nan
    assert got == pytest.approx(right, nan_ok=True)
    assert "overview/loss" not in caplog.text


@pytest.mark.parametrize("penalty", PENALTIES)
def test_that_comes_now_and_then_is_in_it_from_its_second_time_on(penalty):
    right, got = run(penalty, [k % 16 == 15 for k in range(70)])
    wrong = [k for k, (a, b) in enumerate(zip(right, got, strict=True)) if b != pytest.approx(a)]
    assert wrong == [15]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_that_begins_late_is_in_it_from_its_third_step_on(penalty):
    right, got = run(penalty, [k > 9 for k in range(20)])
    wrong = [k for k, (a, b) in enumerate(zip(right, got, strict=True)) if b != pytest.approx(a)]
    assert set(wrong) <= {10, 11}


def test_whose_gradients_come_before_the_forward_pass():
    """The first two of them cannot be heard, but seen: there is no loss then."""
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    right = {}
    with torchprobe.instrument(model, writer=writer):
        for k in range(6):
            optimizer.zero_grad()
            penalty = of_weights(model, batch(k), batch(k))
            penalty.backward()
            right[k + 1] = penalty.item() + iteration(model, k, None)
            optimizer.step()
    del right[1], right[2]
    assert dict(writer.scalars(LOSS)) == pytest.approx(right)


def test_gradients_that_are_there_before_the_session_begins_are_of_a_loss_that_is_not_known():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    iteration(model, 0, None)
    with torchprobe.instrument(model, writer=writer):
        iteration(model, 1, None)
        optimizer.step()
        optimizer.zero_grad()
        right = iteration(model, 2, None)
        optimizer.step()
    assert dict(writer.scalars(LOSS)) == pytest.approx({2: right})


def test_each_optimizer_has_what_reached_its_own_parameters():
    """Two nets that take turns, each with a penalty: a step of one has nothing of the other's."""
    model, writer = nn.ModuleDict({"a": net(), "b": net()}), MemoryWriter()
    optimizers = {name: torch.optim.SGD(part.parameters(), lr=0.01) for name, part in model.items()}
    right = []
    with torchprobe.instrument(model, writer=writer):
        for k in range(8):
            for name, part in model.items():
                optimizers[name].zero_grad()
                right.append(iteration(part, k, of_weights))
                optimizers[name].step()
    assert [value for _, value in writer.scalars(LOSS)] == pytest.approx(right)


@pytest.mark.parametrize("overflows", [(1,), (2, 3), (6,)])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_step_that_a_scaler_skips_is_one_however_many_terms_it_has(penalty, overflows):
    model, writer, right = net(), MemoryWriter(), []
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=64.0)
    with torchprobe.instrument(model, writer=writer, rules=[]):
        for k in range(10):
            optimizer.zero_grad()
            output = model(x := batch(k))
            loss = softplus(-output).mean() * (torch.inf if k in overflows else 1)
            terms = [loss, penalty(model, x, output)]
            for term in terms:
                scaler.scale(term).backward(retain_graph=True)
            scaler.step(optimizer)
            scaler.update()
            right += [] if k in overflows else [sum(terms).item()]
    assert writer.value("overview/skipped_steps") == len(overflows)
    assert [value for _, value in writer.scalars(LOSS)] == pytest.approx(right)


@pytest.mark.parametrize("aot", [pytest.param(aot, marks=COMPILERS_WARNINGS) for aot in (False, True)])
def test_beside_a_compiled_model_without_another_graph(aot):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs) if aot else graph.forward

    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    right = {}
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Loss()]):
        compiled = torch.compile(model, backend=backend)
        for k in range(8):
            optimizer.zero_grad()
            right[k + 1] = iteration(compiled, k, of_weights)
            optimizer.step()
    got = dict(writer.scalars(LOSS))
    assert set(range(2, 9)) <= set(got)  # what is compiled at the first step may hide its backward pass
    assert got == pytest.approx({step: right[step] for step in got})
    assert len(graphs) == 1


def test_is_not_looked_for_in_a_plain_loop_after_its_first_steps():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, writer=MemoryWriter()):
        hooked = []
        for k in range(6):
            optimizer.zero_grad()
            iteration(model, k, None)
            hooked.append(sum(bool(p._backward_hooks) for p in model.parameters()))
            optimizer.step()
        assert hooked[:3] == [4, 4, 4]
        assert hooked[4:] == [0, 0]
    assert all(p._backward_hooks is None for p in model.parameters())


def test_another_models_backward_passes_are_no_reason_to_listen_on():
    """As of a critic that is not watched."""
    model, other = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, writer=MemoryWriter()) as session:
        for k in range(8):
            optimizer.zero_grad()
            other(batch(k)).sum().backward()
            iteration(model, k, None)
            hooked = sum(bool(p._backward_hooks) for p in model.parameters())
            optimizer.step()
        assert hooked == 0
        assert session.step == 8


def test_hooks_of_the_users_own_stay():
    model, heard = net(), []
    handle = model[0].weight.register_hook(lambda gradient: heard.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, writer=MemoryWriter()):
        for k in range(5):
            iteration(model, k, None)
            optimizer.step()
    assert len(heard) == 5
    assert list(model[0].weight._backward_hooks) == [handle.id]


def test_what_stands_in_for_a_parameter_is_left_alone():
    """A hook on such a tensor, once its graph is gone, crashes torch."""
    model, seen = net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def of_bias(bias: Tensor) -> Tensor:
        seen.append(bias)
        loss = torch.func.functional_call(model, {"0.bias": bias}, (batch(0),)).sum()
        assert not bias._backward_hooks
        return loss

    with torchprobe.instrument(model, writer=MemoryWriter()) as session:
        for k in range(6):
            iteration(model, k, None)
            optimizer.step()
            optimizer.zero_grad()
            torch.autograd.functional.hessian(of_bias, model[0].bias.detach())
        assert session.step >= 6
    assert seen


@pytest.mark.parametrize("inner", [True, False], ids=["reentrant", "not"])
def test_a_checkpoints_inner_backward_passes_are_none(inner):
    """Not even where the outer one is heard of at no output."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor, into: list[Tensor]) -> None:
            for part in self.parts:
                x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=inner)
            into.append(x)  # nothing is returned

    model, writer, right = Checkpointed(), MemoryWriter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, writer=writer):
        for k in range(5):
            optimizer.zero_grad()
            model(batch(k), outputs := [])
            loss = outputs[0].square().mean()
            loss.backward()
            right.append(loss.item())
            optimizer.step()
    got = dict(writer.scalars(LOSS))
    assert all(value == pytest.approx(right[step - 1]) for step, value in got.items())


@pytest.mark.parametrize("head", [False, True], ids=["alone", "and a head"])
@pytest.mark.parametrize("zeroed", ["before", "after"])
def test_a_checkpoint_around_the_whole_model_hides_none(zeroed, head):
    """Its inner backward pass, in which it is heard of, has the number after that of the outer one."""
    model, writer, right = net(), MemoryWriter(), []
    last = nn.Linear(1, 1) if head else nn.Identity()
    optimizer = torch.optim.SGD([*model.parameters(), *last.parameters()], lr=0.01)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(5):
            if zeroed == "before":
                optimizer.zero_grad()
            right.append(0.0)
            for part in range(2):
                x = batch(2 * k + part)
                loss = last(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)).square().mean() / 2
                loss.backward()
                right[-1] += loss.item()
            optimizer.step()
            if zeroed == "after":
                optimizer.zero_grad()
    assert [value for _, value in writer.scalars(LOSS)] == pytest.approx(right)

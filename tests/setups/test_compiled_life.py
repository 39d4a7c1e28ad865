"""Compiled models that are detached, copied, exported, or fail."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import torchprobe
from tests.models import inputs
from tests.setups.compiled import (
    COMPILERS_WARNINGS,
    NEEDS_GRADIENTS,
    OLDER,
    Counting,
    Slim,
    assert_same_weights,
    bare,
    function,
    loss_of,
    method,
    train,
    wrapper,
)
from tests.setups.matrix import SCALAR
from torchprobe.capture.parameter_hooks import number_of_backward
from torchprobe.testing import MemoryWriter

pytestmark = [OLDER, *COMPILERS_WARNINGS]


@pytest.fixture(autouse=True)
def fresh_counters():
    counters.clear()


def made() -> Slim:
    torch.manual_seed(0)
    return Slim()


@pytest.mark.parametrize("way", [wrapper, function])
def test_a_probe_of_the_users_that_cannot_be_traced_or_fails_does_no_harm(way, caplog):
    class Largest(torchprobe.Probe):
        source = "outputs"
        fields = ("largest",)
        reduce = "max"

        def compute(self, tensor):
            if tensor.sum().item() == -1 or tensor.size(-1) == 48:
                raise RuntimeError("it cannot")
            return tensor.max().reshape(1)

        def report(self, name, values):
            yield f"largest/{name}", values["largest"]

    found, expected = (train(how, model=made(), probes=[Largest()], include=["head"], steps=4) for how in (way, bare))
    assert found.writer.scalars("largest/head") == expected.writer.scalars("largest/head") != []
    assert found.graphs[-1] == 2
    failing = train(way, model=made(), probes=[Largest()], steps=4)
    assert "it cannot" in caplog.text
    assert_same_weights(failing.model, expected.model)


def test_after_detach_the_graphs_are_the_plain_ones(traces):
    model, counting = Slim(), Counting()
    callee = wrapper(model, backend=counting)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        for n in range(2):
            loss_of(callee, n).backward()
    assert not traces(model)
    loss_of(callee, 3)
    torch._dynamo.reset()
    loss_of(callee, 3)
    *_, after, plain = counting.graphs
    assert after.code == plain.code


@torch._dynamo.config.patch(recompile_limit=3)
def test_sessions_may_follow_each_other_on_one_compiled_model(caplog):
    model, counting, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), Counting(), torch.randn(5, 3)
    callee, optimizer = wrapper(model, backend=counting), torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = torch._dynamo.config.recompile_limit + 2
    for n in range(rounds):
        writer = MemoryWriter()
        with torchprobe.instrument(model, writer=writer, every=3):
            for _ in range(3):
                callee(x).square().mean().backward()
                optimizer.step()
        assert [s for s, _ in writer.scalars("activation_mean/2")] == [1, 3], n
        callee(x)
    assert "recompile_limit" not in caplog.text
    assert len(counting.graphs) <= 3 * rounds


@NEEDS_GRADIENTS
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_step_may_begin_inside_a_graph(backend, caplog):
    """Whose operators Inductor runs below autograd. Of a module of torch's own the graph is the whole."""
    model, writer, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), MemoryWriter(), torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=2) as session:
        callee = wrapper(model, backend=backend, options=SCALAR if backend == "inductor" else None)
        for _ in range(4):
            optimizer.zero_grad()
            callee(x).square().mean().backward()
            optimizer.step()
    assert session.step == 4
    assert "failed" not in caplog.text
    for tag in ("activation_mean/2", "activation_grad_norm/0", "grad_norm/0.weight", "overview/grad_norm"):
        assert [s for s, _ in writer.scalars(tag)] == [1, 2, 4], tag


@NEEDS_GRADIENTS
def test_a_step_may_begin_with_a_graphs_backward_pass():
    """Of its forward pass nothing is recorded."""
    model, writer = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), MemoryWriter()
    optimizer, expected = torch.optim.SGD(model.parameters(), lr=0.1), {}
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.ActivationGradients(every=3)]):
        callee = wrapper(model, backend="aot_eager")
        for step in range(1, 8):
            optimizer.zero_grad()
            callee(torch.full((1, 3), float(step))).square().sum().backward()
            expected[step] = model[0].bias.grad.norm().item()  # that of the output, of one example
            optimizer.step()
    assert dict(writer.scalars("activation_grad_norm/0")) == pytest.approx({s: expected[s] for s in (1, 3, 6)})


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return self[1](checkpoint(self[0], x, use_reentrant=False))


def contrasted(callee):
    (callee(torch.ones(2, 3)) - callee(torch.arange(6.0).view(2, 3))).square().mean().backward()


def retained(callee):
    loss = callee(torch.arange(6.0).view(2, 3)).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


@NEEDS_GRADIENTS
@pytest.mark.parametrize("kind", [nn.Sequential, Checkpointed])
@pytest.mark.parametrize("backward", [contrasted, retained])
def test_a_graph_may_run_backward_several_times_before_a_step(backward, kind):
    """What it hands over is an input that the graph, behind AOT autograd, writes to."""
    runs = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        model, writer = kind(nn.Linear(3, 4), nn.Linear(4, 2)), MemoryWriter()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torchprobe.instrument(model, writer=writer, every=1):
            callee = model if backend is None else wrapper(model, backend=backend)
            for _ in range(3):
                optimizer.zero_grad()
                backward(callee)
                optimizer.step()
        runs.append(writer)
    for tag in ("activation_mean/0", "activation_grad_norm/0", "grad_norm/1.weight"):
        expected, found = (run.scalars(tag) for run in runs)
        assert len(expected) == 3
        assert [s for s, _ in found] == [s for s, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-4), tag


def test_the_next_backward_pass_is_counted_from_anywhere():
    before = number_of_backward()
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        assert number_of_backward() == before + 2


def test_a_compiled_model_hears_of_no_process_wide_hook(recwarn):
    model, criterion = Slim(), nn.CrossEntropyLoss()
    callee, optimizer = wrapper(model, backend="eager"), torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        for ids in (inputs("transformer", seed=1), inputs("transformer", seed=2)):
            passes = [callee(ids), callee(ids)]
            sum(criterion(output.flatten(0, 1), ids.flatten()) for output in passes).backward()
            optimizer.step()
            model.eval()
            criterion(callee(ids).flatten(0, 1), ids.flatten())
            model.train()
    assert not [warning for warning in recwarn if "global hooks" in str(warning.message)]


def test_a_copy_of_a_compiled_and_instrumented_model_is_neither(traces):
    model = Slim()
    callee, writer = method(model, backend="eager"), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1):
        loss_of(callee, 1).backward()
        twin = copy.deepcopy(model)
        assert torchprobe.session_of(twin) is None
        assert torch.equal(twin(inputs("transformer")), model(inputs("transformer")))


def test_an_exception_in_a_compiled_pass_reaches_the_user_and_leaves_nothing_entered():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Slim()

        def forward(self, ids, width):
            return self.inner(ids) @ torch.ones(width, 1)

    model, writer = Breaks(), MemoryWriter()
    callee, optimizer = wrapper(model, backend="eager"), torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for width in (11, 12, 11):
            with pytest.raises(Exception, match="reduction dim") if width == 12 else nullcontext():
                callee(inputs("transformer"), width).mean().backward()
                optimizer.step()
            assert torch._C._len_torch_function_stack() == 0
        assert session.step == 2
    assert [s for s, _ in writer.scalars("attention_entropy/inner.blocks.0.attention")] == [1, 2]


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_an_instrumented_model_gives_the_plain_program(strict):
    model, ids = Slim(), inputs("transformer")
    plain = torch.export.export(model, (ids,), strict=strict)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        watched = torch.export.export(model, (ids,), strict=strict)
        assert torch.equal(watched.module()(ids), model(ids))
    assert watched.graph_module.code == plain.graph_module.code


def test_functional_call_and_inference_mode_with_a_compiled_model():
    model = Slim()
    callee, ids = wrapper(model, backend="eager", fullgraph=True), inputs("transformer")
    expected, halves = model(ids).detach(), {name: p.detach() / 2 for name, p in model.named_parameters()}
    expected_half = torch.func.functional_call(model, halves, (ids,)).detach()
    with torch.inference_mode():
        inferred = model(ids)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        with torch.inference_mode():
            assert torch.equal(callee(ids), inferred)
        assert torch.equal(torch.func.functional_call(model, halves, (ids,)), expected_half)
        assert torch.equal(callee(ids), expected)


def test_transforms_of_torch_func_inside_a_compiled_function():
    model, ids = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(4, 3)

    def per_sample(ids):
        return torch.vmap(torch.func.grad(lambda row: model(row).sum()))(ids)

    expected = per_sample(ids)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        found = torch.compile(per_sample, backend="eager", fullgraph=True)(ids)
    assert torch.allclose(found, expected)

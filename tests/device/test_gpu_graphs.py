"""CUDA graphs, the user's own and `mode="reduce-overhead"`, on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.device.training import scalars
from torchprobe.capture.compiled.tracing import TRACES_GRADIENT_HOOKS
from torchprobe.testing import MemoryWriter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_step_in_the_users_own_graph_is_given_up_and_replays_are_right():
    """Suspicions 1 and 3: the drain thread waits meanwhile, and nothing of ours is part of the graph."""
    torch.manual_seed(0)
    model = nn.Linear(64, 8).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(32, 64, device="cuda"), torch.randn(32, 8, device="cuda")
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1, flush_every=1) as session:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.zero_grad(set_to_none=True)
                F.mse_loss(model(x), y).backward()
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        losses = []
        for _ in range(5):
            graph.replay()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)
        assert session.flush(60)
    assert "captured steps    1" in session.summary()


class Layers(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(300, 500), nn.GELU(), nn.Linear(500, 40))


def of_layers(model, x):
    """What a step on a copy of the model gives, in float64 from float32 tensors, by tag."""
    model, seen = copy.deepcopy(model), {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, a, y, name=name: (y.retain_grad(), seen.update({name: y}))[0])
    model(x).square().mean().backward()
    found = {f"activation_mean/{name}": y.double().mean().item() for name, y in seen.items() if name != "1"}
    found |= {f"activation_max_abs/{name}": y.abs().max().item() for name, y in seen.items() if name != "1"}
    found |= {f"activation_grad_norm/{name}": y.grad.double().norm().item() for name, y in seen.items() if name != "1"}
    return found | {f"grad_norm/{name}": p.grad.double().norm().item() for name, p in model.named_parameters()}


def in_a_graph(model, optimizer, x, whole):
    """Three steps, and a CUDA graph of one, without the optimizer's part unless `whole`."""

    def step(optimizes):
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        if optimizes:
            optimizer.step()

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(True)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step(whole)
    return graph


@pytest.mark.parametrize("whole", [True, False], ids=["whole_step", "optimizer_outside"])
def test_replays_record_the_rows_of_sampled_steps(errors_on_waiting, whole):
    torch.manual_seed(0)
    model, x, writer = Layers().cuda(), torch.randn(64, 300, device="cuda"), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    probes = [kind(every=lambda step: step % 2 == 0) for kind in (torchprobe.Activations, torchprobe.Gradients)]
    expected = {}
    with torchprobe.instrument(model, writer=writer, probes=probes) as session:
        graph = in_a_graph(model, optimizer, x, whole)
        optimizer.step() if not whole else session.next_step()
        for _ in range(6):
            x.copy_(torch.randn(64, 300, device="cuda"))
            expected[session.step + 1] = of_layers(model, x)
            torch.cuda.set_sync_debug_mode("error")
            graph.replay()
            optimizer.step() if not whole else session.next_step()
            torch.cuda.set_sync_debug_mode("default")
        assert session.flush(60)
    graph.replay()  # of a session that is over
    for number, values in expected.items():
        found = {tag: value for (at, tag), value in scalars(writer).items() if at == number and tag in values}
        if number % 2 == 0:
            assert found == pytest.approx(values, rel=1e-5, abs=1e-8), number
        else:
            assert not found


def test_weights_of_a_captured_run_are_bitwise_those_of_the_bare_one():
    finals = []
    for watch in (True, False):
        torch.manual_seed(0)
        model, x = Layers().cuda(), torch.randn(64, 300, device="cuda")
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        session = torchprobe.instrument(model, writer=MemoryWriter(), every=1) if watch else None
        graph = in_a_graph(model, optimizer, x, True)
        for _ in range(5):
            graph.replay()
            if session is not None:
                session.next_step()
        if session is not None:
            assert session.detach(60)
        finals.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *finals))


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_reduce_overhead_has_one_graph_for_sampled_steps_and_others():
    """Of activations and their gradients; no CUDA graph is given up, nothing is compiled again, values are right."""
    counters = pytest.importorskip("torch._dynamo.utils").counters
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model, x, writer = Layers().cuda(), torch.randn(64, 300, device="cuda"), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    compiled, expected = torch.compile(model, mode="reduce-overhead"), {}
    probes = [torchprobe.Activations(every=lambda step: step % 3 == 0)]
    with torchprobe.instrument(compiled, writer=writer, probes=probes) as session:
        for number in range(1, 16):
            x.copy_(torch.randn(64, 300, device="cuda"))
            expected[number] = of_layers(model, x)
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            compiled(x).square().mean().backward()
            optimizer.step()
        assert session.flush(60)
    print({name: dict(counters[name]) for name in ("inductor", "stats", "frames")})
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == 1
    seen = "activation" if TRACES_GRADIENT_HOOKS else ("activation_mean", "activation_max_abs")
    for number, values in expected.items():
        values = {tag: value for tag, value in values.items() if tag.startswith(seen)}
        found = {tag: value for (at, tag), value in scalars(writer).items() if at == number and tag in values}
        if number % 3 == 0:
            assert found == pytest.approx(values, rel=1e-4, abs=1e-7), number
        else:
            assert not found


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_copies_that_are_under_way_break_no_capture(mode):
    """Suspicion 1: the drain thread makes no call to the driver while it waits."""
    model = nn.Linear(256, 256).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1, flush_every=1) as session:
        for _ in range(10):
            torch.cuda._sleep(20_000_000)
            optimizer.zero_grad()
            model(torch.randn(8, 256, device="cuda")).sum().backward()
            optimizer.step()
            x = torch.ones(8, device="cuda")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode=mode):
                y = x * 2
            graph.replay()
            assert y.tolist() == [2.0] * 8
        assert session.flush(60)


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_reduce_overhead_keeps_its_graphs_in_idle_steps():
    """Suspicions 4 and 5."""
    counters = pytest.importorskip("torch._dynamo.utils").counters

    def skips(watch):
        torch._dynamo.reset()
        counters.clear()
        model = torch.compile(
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)).cuda(), mode="reduce-overhead"
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        session = torchprobe.instrument(model, writer=MemoryWriter(), every=4) if watch else None
        for _ in range(12):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            model(torch.randn(4, 16, device="cuda")).sum().backward()
            optimizer.step()
        if session is not None:
            assert session.detach(60)
        return counters["inductor"]["cudagraph_skips"]

    assert skips(watch=False) == 0
    assert skips(watch=True) <= 2  # the sampled graph and its backward, at most

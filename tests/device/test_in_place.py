"""What replays of a graph of the device add up in place: here of a graph that a dispatch mode records on the CPU, with
Triton's interpreter for the kernels; on a GPU see `test_gpu_graphs.py`."""

from __future__ import annotations

import copy
import gc
import math
from contextlib import contextmanager
from weakref import ref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchprobe
from tests.setups.matrix import SCALAR
from torchprobe.capture import gate, in_place, sites, sources
from torchprobe.capture.compiled.tracing import TRACES_GRADIENT_HOOKS, constant
from torchprobe.statistics import fused
from torchprobe.testing import MemoryWriter

pytest.importorskip("triton", "3.6", reason="the interpreter of earlier versions does not run these kernels")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")


class Graph(TorchDispatchMode):
    """Operations in order, with the memory that they read and write: `replay()` runs them again, and no Python else."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if "empty" not in function._schema.name:  # memory alone
            self.calls.append((function, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, found in self.calls:
            for old, new in zip(tree_leaves(found), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


@pytest.fixture
def capture(monkeypatch):
    """Takes the CPU for a device that captures graphs."""
    recording = []
    for module in (gate, sites):
        monkeypatch.setattr(module, "records_graph", lambda device=None: bool(recording))
    for module in (gate, sources):
        monkeypatch.setattr(module, "may_record_graphs", lambda: True)
    for module in (fused, in_place):
        monkeypatch.setattr(module, "GPUS", ("cpu",))
    for name, value in {"LINES": 3, "_PROGRAMS": 3, "_BLOCK": 16, "_MERGED": 4}.items():
        monkeypatch.setattr(fused, name, value)
    fused.usable.cache_clear()

    @contextmanager
    def captured():
        graph = Graph()
        with graph:
            recording.append(graph)
            yield graph
            recording.clear()

    yield captured
    fused.usable.cache_clear()
    in_place._kept.clear()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.last(self.first(x).relu())


PROBES = (torchprobe.Activations, torchprobe.Gradients)


def truth(model, optimizer, x):
    """Of a step on a copy: norms and means by tag."""
    model = copy.deepcopy(model)
    seen = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, a, y, name=name: (y.retain_grad(), seen.update({name: y}))[0])
    model(x).square().mean().backward()
    found = {f"activation_mean/{name}": y.double().mean().item() for name, y in seen.items()}
    found |= {f"activation_max_abs/{name}": y.abs().max().item() for name, y in seen.items()}
    found |= {f"activation_grad_norm/{name}": y.grad.double().norm().item() for name, y in seen.items()}
    found |= {f"grad_norm/{name}": p.grad.double().norm().item() for name, p in model.named_parameters()}
    return found


def warmed_up(every=1, probes=None):
    torch.manual_seed(0)
    model, x, writer = Net(), torch.randn(4, 5), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    probes = probes or [kind(every=every) for kind in PROBES]
    session = torchprobe.instrument(model, writer=writer, probes=probes)
    step(model, optimizer, x)
    return model, x, writer, optimizer, session


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def written(writer, number):
    return {tag: value for tag in writer.tags() for at, value in writer.scalars(tag) if at == number}


def assert_values(found, expected):
    assert {tag: found[tag] for tag in expected} == pytest.approx(expected, rel=1e-6)


def test_replays_of_a_whole_step_give_the_rows_of_each_sampled_step(capture):
    model, x, writer, optimizer, session = warmed_up(every=lambda number: number % 2 == 0)
    with capture() as graph:
        step(model, optimizer, x)
    session.next_step()
    first, expected = session.step + 1, {}
    for i in range(4):
        x.copy_(torch.randn(4, 5))
        expected[first + i] = truth(model, optimizer, x)
        graph.replay()
        session.next_step()
    session.detach()
    for number, values in expected.items():
        if number % 2:
            assert not written(writer, number).keys() & values.keys()
        else:
            assert_values(written(writer, number), values)


def test_an_optimizer_outside_of_the_graph_ends_the_steps(capture):
    model, x, writer, optimizer, session = warmed_up(every=1)
    optimizer.zero_grad(set_to_none=False)
    with capture() as graph:
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
    optimizer.step()
    expected = {}
    for _ in range(2):
        x.copy_(torch.randn(4, 5))
        now = truth(model, optimizer, x)
        graph.replay()
        optimizer.step()
        expected[session.step] = now
    session.detach()
    for number, values in expected.items():
        assert_values(written(writer, number), values)


def test_two_replays_of_a_step_are_one_row_and_gradients_stepped_twice_are_left_out(capture):
    model, x, writer, optimizer, session = warmed_up(every=1)
    with capture() as graph:
        step(model, optimizer, x)
    session.next_step()
    number, batches = session.step + 1, [torch.randn(4, 5) for _ in range(2)]
    means = []
    for batch in batches:
        x.copy_(batch)
        means.append(truth(model, optimizer, x)["activation_mean/first"])
        graph.replay()
    session.next_step()
    session.detach()
    found = written(writer, number)
    assert found["activation_mean/first"] == pytest.approx(sum(means) / 2, rel=1e-6)
    assert not [tag for tag in found if tag.startswith("grad_norm/")]


def test_a_step_that_nothing_samples_reads_no_element(capture):
    model, x, _, optimizer, session = warmed_up(every=10**6)
    with capture() as graph:
        step(model, optimizer, x)
    session.next_step()
    lines = [sums.lines for sums in session._recorder._sources.running.in_place._outputs.values()]
    assert lines
    for one in lines:
        one[:-1] = math.nan
    graph.replay()
    session.detach()
    graph.replay()
    assert all(one[:-1].isnan().all() for one in lines)


def test_weights_are_bitwise_those_of_the_bare_graph(capture):
    finals = []
    for watch in (True, False):
        torch.manual_seed(0)
        model, x = Net(), torch.randn(4, 5)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        probes = {"probes": [kind(every=1) for kind in PROBES]}
        session = torchprobe.instrument(model, writer=MemoryWriter(), **probes) if watch else None
        step(model, optimizer, x)
        with capture() as graph:
            step(model, optimizer, x)
        for _ in range(2):
            graph.replay()
            if session is not None:
                session.next_step()
        if session is not None:
            assert session.detach()
        finals.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *finals))


def test_a_probe_of_the_users_own_is_left_out(capture):
    class Mine(torchprobe.Activations):
        def compute(self, tensor):
            return super().compute(tensor * 2)

    model, x, writer, optimizer, session = warmed_up(probes=[Mine(every=1, gradients=False)])
    with capture() as graph:
        step(model, optimizer, x)
    session.next_step()
    number = session.step + 1
    graph.replay()
    session.next_step()
    session.detach()
    assert not [tag for tag in written(writer, number) if tag.startswith("activation")]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compiled_graph_serves_sampled_steps_and_all_others(capture, monkeypatch, backend):
    """As `mode="reduce-overhead"` asks for it, without the device's own graphs."""
    monkeypatch.setattr(sites, "becomes_device_graph", constant(lambda: True))
    lookup = torch._dynamo.lookup_backend(backend)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return lookup(graph, inputs)

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x, writer = Net(), torch.randn(4, 5), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    compiled = torch.compile(model, backend=counting)
    probes = [torchprobe.Activations(every=lambda number: number % 3 == 0)]
    session = torchprobe.instrument(model, writer=writer, probes=probes)
    expected = {}
    for number in range(1, 8):
        x.copy_(torch.randn(4, 5))
        seen = "activation" if TRACES_GRADIENT_HOOKS else ("activation_mean", "activation_max_abs")
        expected[number] = {t: v for t, v in truth(model, optimizer, x).items() if t.startswith(seen)}
        optimizer.zero_grad()
        with torch._inductor.config.patch(SCALAR):
            compiled(x).square().mean().backward()
        optimizer.step()
    session.detach()
    assert len(graphs) == 1
    for number, values in expected.items():
        if number % 3 == 0:
            assert_values(written(writer, number), values)
        else:
            assert not written(writer, number).keys() & values.keys()


def test_a_batch_that_is_dropped_makes_the_rows_of_a_compiled_step_unknown(capture, monkeypatch):
    """They are of both passes, and only one of them counts."""
    monkeypatch.setattr(sites, "becomes_device_graph", constant(lambda: True))
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x, writer = Net(), torch.randn(4, 5), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    compiled = torch.compile(model, backend="aot_eager")
    session = torchprobe.instrument(model, writer=writer, probes=[torchprobe.Activations(every=1)])
    for number in range(1, 4):
        if number == 2:
            compiled(x)
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
    session.detach()
    steps = {at for at, _ in writer.scalars("activation_mean/first")}
    assert steps == {1, 3}


def test_no_tensor_of_the_users_is_kept(capture):
    model, x, _, optimizer, session = warmed_up(every=1)
    with capture() as graph:
        step(model, optimizer, x)
    gradients = [ref(p.grad) for p in model.parameters()]
    graph.calls.clear()
    for p in model.parameters():
        p.grad = None
    session.next_step()
    session.next_step()
    gc.collect()
    assert not [one for one in gradients if one() is not None]
    session.detach()

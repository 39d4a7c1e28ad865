"""While the user's stream captures a graph, nothing of ours runs on the device; what would be part of it is given up.

The fixture fails a test in which an operation, a copy, an event or an allocation of ours meets a stream that captures.
"""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

import torchprobe
from tests.device import streams
from tests.device.training import Net, batch, everything, scalars, step
from torchprobe.capture.compiled import operators
from torchprobe.testing import MemoryWriter


@pytest.fixture
def run(on_fgpu):
    """A model, its optimizer, and a session with every probe at every step."""
    torch.manual_seed(0)
    model, writer = Net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = torchprobe.instrument(model, writer=writer, probes=everything())
    yield model, optimizer, session, writer
    session.detach()


def test_a_captured_step_is_given_up_and_counted_and_the_others_are_right(run, caplog):
    model, optimizer, session, writer = run
    with caplog.at_level(logging.WARNING, "torchprobe"):
        step(model, optimizer, *batch())
        for _ in range(2):
            with streams.captured():
                session.log_metrics({"loss": step(model, optimizer, *batch())}, prefix="captured")
        step(model, optimizer, *batch())
        session.detach()
    assert "captured steps    2" in session.summary()
    assert len([r for r in caplog.records if "captured into a graph" in r.getMessage()]) == 1
    assert session.step == 2
    found = scalars(writer)
    assert {(1, "overview/loss"), (2, "overview/loss"), (2, "grad_norm/head.weight")} <= found.keys()
    assert not [tag for _, tag in found if tag.startswith("captured")]


def test_a_forward_and_backward_pass_may_be_captured_and_the_optimizer_not(run):
    model, optimizer, session, writer = run
    step(model, optimizer, *batch())
    tokens, targets = batch()
    with streams.captured():
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), targets).backward()
    optimizer.step()  # on the gradients of a replay
    step(model, optimizer, *batch())
    session.detach()
    found = scalars(writer)
    assert (2, "grad_norm/head.weight") in found
    assert (2, "activation_rms/head") not in found


def test_validation_that_is_captured_leaves_nothing(run):
    model, optimizer, session, writer = run
    step(model, optimizer, *batch())
    with streams.captured(), torch.no_grad():
        model(batch()[0])
    session.detach()
    assert not [tag for _, tag in scalars(writer) if tag.startswith("val/")]


def test_a_flush_while_a_graph_is_captured_writes_what_was_there_before(run):
    model, optimizer, session, writer = run
    step(model, optimizer, *batch())
    with streams.captured():
        session.flush()
    step(model, optimizer, *batch())
    session.detach()
    assert {(1, "overview/loss"), (2, "overview/loss")} <= scalars(writer).keys()


def test_that_the_fixture_sees_an_operation_of_ours_in_a_graph(run, monkeypatch):
    from torchprobe.capture import gate

    model, optimizer, _, _ = run
    step(model, optimizer, *batch())
    monkeypatch.setattr(gate, "records_graph", lambda: False)  # as it would be without the check
    with streams.captured():
        step(model, optimizer, *batch())
    assert [line for line in streams.found if "becomes part of the user's graph" in line]
    streams.found.clear()


def test_inductor_leaves_a_handle_where_it_is():
    """Under CUDA graphs it moves scalars of the host that a graph only hands on, and an operator could not read one."""
    passes = pytest.importorskip("torch._inductor.fx_passes.post_grad")
    mover = getattr(passes, "ConstructorMoverPass", None)
    if not hasattr(mover, "is_cpu_scalar_tensor"):
        pytest.skip("this Inductor moves no inputs")
    graph, found = torch.fx.Graph(), {}
    for name, value in {"scalar": torch.tensor(1), "handle": operators.GradientHook(print).handle}.items():
        graph.placeholder(name).meta["val"] = value
    for node in graph.nodes:
        found[node.name] = mover("cuda", allow_outputs=True, allow_inputs=True).is_cpu_scalar_tensor(node)
    assert found == {"scalar": True, "handle": False}

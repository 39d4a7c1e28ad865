"""The capture core inside `torch.compile`: no break, two graphs, the numbers of eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import torchprobe
from tests.models import Transformer, inputs
from torchprobe.testing import MemoryWriter

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(backend: str | None, *, probed: bool = True, every: int = 2, steps: int = 6):
    torch.manual_seed(0)
    model = Transformer(dropout=0.0)
    callee = torch.compile(model, fullgraph=True, backend=backend) if backend else model
    writer = MemoryWriter()
    session = torchprobe.instrument(model, writer=writer, every=every) if probed else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        ids = inputs("transformer", seed=step)
        F.cross_entropy(callee(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    if session is not None:
        session.detach()
    return model, writer


def assert_same_values(found: MemoryWriter, expected: MemoryWriter) -> None:
    """All tags but those of dead units, which are not watched inside a graph.

    How many elements are exactly zero is rounding's affair: the gradient of a key's bias is zero but for noise.
    """
    tags = [tag for tag in expected.tags() if "dead_units" not in tag]
    assert found.tags() == tags
    for tag in tags:
        if tag == "overview/probe_overhead" or tag.startswith("gradients_zeros/"):
            continue
        assert [s for s, _ in found.scalars(tag)] == [s for s, _ in expected.scalars(tag)], tag
        for (_, a), (_, b) in zip(found.scalars(tag), expected.scalars(tag), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5), tag


def test_two_graphs_no_break_and_the_numbers_of_eager():
    _, eager = train(None)
    counters.clear()
    _, compiled = train("aot_eager")
    assert counters["stats"]["unique_graphs"] == 2, "one graph for sampled steps, one for the others"
    assert not counters["graph_break"]
    assert_same_values(compiled, eager)


def test_weights_are_bitwise_those_of_the_bare_compiled_run():
    bare, _ = train("aot_eager", probed=False)
    torch._dynamo.reset()
    seen, _ = train("aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), seen.parameters(), strict=True))


@pytest.mark.slow
def test_inductor_gives_the_numbers_of_eager():
    _, eager = train(None)
    counters.clear()
    _, compiled = train("inductor")
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert_same_values(compiled, eager)

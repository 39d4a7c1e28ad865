"""Compiled autograd, which compiles the backward pass and traces the hooks in it: no break, and every value."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchprobe
from tests.clocks import TIMED
from tests.setups.compiled import COMPILERS_WARNINGS, NEEDS_GRADIENTS, OLDER
from torchprobe.testing import MemoryWriter

compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
pytestmark = COMPILERS_WARNINGS

EVERY, STEPS = 3, 4
AT_THE_END = {"overview/grad_norm_unclipped", "overview/clipped_fraction"}  # of a backward pass, which is not told


class Net(nn.Module):
    """A frozen module, one that changes its input in place, one that is called twice, and an output without loss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.frozen, self.cell, self.head, self.scale = (
            nn.Linear(16, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
            nn.Linear(3, 1),
        )
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.frozen(self.act(self.norm(self.conv(x))).flatten(1))
        for _ in range(2):
            hidden = hidden + torch.tanh(self.cell(hidden))
        logits = self.head(hidden)
        return logits, self.scale(logits)


class Graphs:
    """A back end that runs a graph through AOTAutograd, and counts those it was given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@dataclass
class Trained:
    graphs: list[int]
    """After each step."""
    weights: list[Tensor]
    writer: MemoryWriter


def train(way: str, every: int | None) -> Trained:
    """way: "eager", "around backward()", or "as configured", which compiles the step too. every: None without us."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, writer, graphs = Net(), MemoryWriter(), Graphs()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = torchprobe.instrument(model, writer=writer, every=every) if every else nullcontext()

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x)[0], y)

    def step(x: Tensor, y: Tensor) -> None:
        loss = forward(x, y)
        around = compiled_autograd._enable(torch.compile(backend=graphs)) if way == "around backward()" else None
        with around or nullcontext():
            loss.backward()

    configured = way == "as configured"
    counts = []
    with torch._dynamo.config.patch(compiled_autograd=configured), session:
        run = torch.compile(step, backend=graphs) if configured else step
        for _ in range(STEPS):
            run(torch.randn(6, 2, 4, 4), torch.randint(3, (6,)))
            optimizer.step()
            optimizer.zero_grad()
            counts.append(graphs.count)
    return Trained(counts, [p.detach().clone() for p in model.parameters()], writer)


def values(writer: MemoryWriter) -> dict[tuple[str, int], float]:
    tags = (tag for tag in writer.tags() if not tag.startswith(TIMED))
    return {(tag, step): value for tag in tags for step, value in writer.scalars(tag)}


@OLDER
def test_a_compiled_backward_pass_has_no_break_and_loses_nothing():
    way = "around backward()"
    eager, bare, watched = train("eager", EVERY), train(way, None), train(way, EVERY)
    assert bare.graphs == [1, 1, 1, 1]
    assert watched.graphs == [1, 2, 2, 2], "one graph for sampled steps (1, 3), one for the others"
    assert all(map(torch.equal, watched.weights, bare.weights))
    expected = {at: value for at, value in values(eager.writer).items() if at[0] not in AT_THE_END}
    assert values(watched.writer) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert {tag for tag, _ in expected} > {"overview/loss", "activation_grad_norm/cell", "calibration/ece"}


@NEEDS_GRADIENTS
def test_a_step_that_is_compiled_with_its_backward_pass_has_no_more_breaks():
    way = "as configured"
    eager, bare, watched = train("eager", 1), train(way, None), train(way, 1)
    assert watched.graphs == bare.graphs
    assert all(map(torch.equal, watched.weights, bare.weights))
    found, expected = values(watched.writer), values(eager.writer)
    assert found == pytest.approx({at: expected[at] for at in found}, rel=1e-4, abs=1e-6)
    assert any(tag.startswith("activation_grad_norm/") for tag, _ in found)

"""Ways to compile a model, one training loop for all of them, and how to compare what it wrote."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.clocks import TIMED, reproducible
from tests.models import Attention, Transformer, inputs
from tests.setups.reference import Weights, following
from torchprobe.capture.compiled.tracing import TRACES_GRADIENT_HOOKS
from torchprobe.testing import MemoryWriter

COMPILERS_WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # which Dynamo hides by itself, unless it is an error
]
OLDER = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="what this torch can is in test_compiled_older.py",
)
NEEDS_GRADIENTS = pytest.mark.skipif(
    not TRACES_GRADIENT_HOOKS, reason="graphs of this torch take no hooks of tensors inside them"
)
_UNSEEN = ("dead_units/", *(() if TRACES_GRADIENT_HOOKS else ("activation_grad_norm/",)))
_OF_OUTPUTS = ("calibration", "uncertainty", "overview/ece")  # of an output inside the graph: not seen
_OF_BACKWARD = ("overview/grad_norm_unclipped", "overview/clipped_fraction", "overview/alerts", "alerts")
"""Of what is not heard of then."""
Callee = Callable[[torch.Tensor], torch.Tensor]


def bare(model: nn.Module, **how: Any) -> Callee:
    return model


def wrapper(model: nn.Module, **how: Any) -> Callee:
    return torch.compile(model, **how)


def method(model: nn.Module, **how: Any) -> Callee:
    model.compile(**how)
    return model


def each_block(model: nn.Module, **how: Any) -> Callee:
    for block in model.blocks:
        block.compile(**how)
    return model


def each_block_wrapped(model: nn.Module, **how: Any) -> Callee:
    for name, block in list(model.blocks.named_children()):
        model.blocks.register_module(name, torch.compile(block, **how))
    return model


def attentions(model: nn.Module, **how: Any) -> Callee:
    for block in model.blocks:
        block.attention.compile(**how)
    return model


def forward(model: nn.Module, **how: Any) -> Callee:
    model.forward = torch.compile(model.forward, **how)
    return model


def function(model: nn.Module, **how: Any) -> Callee:
    return torch.compile(lambda ids: model(ids), **how)


WAYS = [wrapper, method, each_block, each_block_wrapped, attentions, forward, function]


class AttentionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(x)


class Slim(Transformer):
    """Half a Transformer's modules, for tests that hold for any model: a compiler takes its time for each module."""

    def __init__(self, layers: int = 1, width: int = 16) -> None:
        super().__init__(width, layers=0)
        self.blocks = nn.ModuleList(AttentionBlock(width) for _ in range(layers))


class Counting:
    """A backend that counts the graphs that it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward


@dataclass
class Trained:
    model: nn.Module
    writer: MemoryWriter
    graphs: list[int]
    """How many there were after each step."""
    summary: str = ""
    weights: Weights = field(default_factory=list)


def train(
    compiled: Callable[..., Callee] = bare,
    *,
    model: nn.Module | None = None,
    backend: Any = None,
    probed: bool = True,
    when: str = "before",
    every: int = 3,
    steps: int = 7,
    micro_batches: int = 1,
    make_optimizer: Any = torch.optim.SGD,
    **options: Any,
) -> Trained:
    """when: `instrument` comes before compiling, after it, or after the first call; or gets what compiling returned."""
    torch.manual_seed(0)
    model = Transformer(dropout=0.0) if model is None else model
    counting = Counting() if backend is None else None
    writer, session = MemoryWriter(), None
    if probed and when == "before":
        session = torchprobe.instrument(model, writer=writer, every=every, **options)
    callee = compiled(model, fullgraph=True, backend=counting or backend)
    if when == "late":
        loss_of(callee, 99).backward()
        model.zero_grad()
    if probed and session is None:
        session = torchprobe.instrument(callee if when == "wrapped" else model, writer=writer, every=every, **options)
    optimizer = make_optimizer(model.parameters(), lr=0.1)
    graphs, weights = [], []
    for step in range(steps):
        for part in range(micro_batches):
            loss_of(callee, step * micro_batches + part).backward()
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(len(counting.graphs) if counting else 0)
        weights.append([p.detach().clone() for p in model.parameters()])
    summary = "" if session is None else session.summary()
    if session is not None:
        session.detach()
    return Trained(model, writer, graphs, summary, weights)


def twin(found: Trained, *, model: nn.Module, **options: Any) -> Trained:
    """An eager run in float64 from `model`, which is after each step where the other run was."""
    return train(
        bare,
        model=copy.deepcopy(model).double(),
        make_optimizer=following(found.weights, torch.optim.SGD),
        steps=len(found.weights),
        **options,
    )


def loss_of(callee: Callee, seed: int) -> torch.Tensor:
    ids = inputs("transformer", seed=seed)
    return F.cross_entropy(callee(ids).flatten(0, 1), ids.flatten())


def assert_same_values(found: MemoryWriter, expected: MemoryWriter, output_inside: bool = False) -> None:
    """All tags but those of dead units, which are not watched in a compiled model.

    How many elements are exactly zero is rounding's affair: the gradient of a key's bias is zero but for noise.
    """
    unseen = _UNSEEN + ((*_OF_OUTPUTS, *_OF_BACKWARD) if output_inside else ())
    tags = [tag for tag in expected.tags() if not tag.startswith(unseen) and reproducible(tag)]
    beside = (*TIMED, *_UNSEEN, *_OF_BACKWARD * output_inside, "nothing_captured/")
    assert [tag for tag in found.tags() if not tag.startswith(beside)] == tags
    for tag in tags:
        if tag.startswith("gradients_zeros/"):
            continue
        steps = [s for s, _ in found.scalars(tag)]
        missing = {s for s, _ in expected.scalars(tag)} - set(steps)
        if output_inside and tag == "overview/loss":  # what is not sampled is heard of from the fourth step on
            assert missing <= {1, 2, 3} - {s for s, _ in expected.scalars("overview/grad_norm")}
        else:
            assert steps == [s for s, _ in expected.scalars(tag)], tag
        right = dict(expected.scalars(tag))
        for step, value in found.scalars(tag):
            assert value == pytest.approx(right[step], rel=1e-3, abs=1e-5), tag


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name

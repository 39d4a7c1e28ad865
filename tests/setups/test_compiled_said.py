"""Attention that is written out inside compiled graphs: by default it is named, and the graphs are what they were."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.convert_frame import _bytecode_hooks
from torch._dynamo.utils import counters

import torchprobe
from tests.setups.compiled import COMPILERS_WARNINGS, Callee, each_block, each_block_wrapped, forward, function, method
from tests.setups.compiled import wrapper as wrapped
from tests.setups.matrix import SCALAR
from tests.setups.test_compiled_written import (
    HEADS,
    LENGTH,
    WIDTH,
    ByFunction,
    ByLogarithm,
    ByModule,
    Checkpointed,
    Folded,
    InParts,
    Layer,
    Model,
    Padded,
    Renormalised,
    Shifted,
)
from torchprobe.capture.attention import unread
from torchprobe.testing import MemoryWriter

pytestmark = COMPILERS_WARNINGS


def bare(model: nn.Module, **how) -> Callee:
    return model


def trained(layer=Layer, way=method, backend="eager", *, watched=True, late=False, steps=3, probes=None, **how):
    """Weights after some steps, what was said, and how many graphs there are."""
    torch.manual_seed(2)
    torch._dynamo.reset()
    counters.clear()
    model = Model(layer)
    callee = way(model, backend=backend, **{"fullgraph": True, **how})
    ids = [torch.randint(10, (3, LENGTH), generator=torch.Generator().manual_seed(step)) for step in range(steps)]
    if late:
        callee(ids[0]).sum().backward()
    probes = probes or [torchprobe.Attention(every=2, maps_every=100)]
    session = torchprobe.instrument(model, writer=MemoryWriter(), probes=probes) if watched else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for one in ids:
        optimizer.zero_grad()
        callee(one).square().mean().backward()
        optimizer.step()
    said = "" if session is None else session.summary()
    if session is not None:
        session.detach()
    lines = [line.partition(" x ")[2] for line in said.splitlines() if "attention not seen" in line]
    return [parameter.detach() for parameter in model.parameters()], lines, counters["stats"]["unique_graphs"]


def named(lines):
    return [line.removeprefix("the attention of ").partition(",")[0] for line in lines]


def assert_named(lines):
    assert named(lines) == ["blocks.0", "blocks.1"]
    assert all('Attention(compiled="read") reads it' in line for line in lines)


# ---- what is said


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # Inductor: with the bare run's weights, below
def test_it_is_named_once_by_default(backend, caplog):
    _, lines, _ = trained(backend=backend)
    assert_named(lines)
    said = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert len(said) == 1
    assert "blocks.0" in said[0]


@pytest.mark.parametrize(("way", "late"), [(wrapped, False), (forward, True), (wrapped, True), (function, False)])
def test_however_the_model_is_compiled(way, late):
    _, lines, _ = trained(way=way, late=late)
    assert named(lines) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("way", [each_block, each_block_wrapped])
@pytest.mark.parametrize("late", [False, True])
def test_a_graph_that_blocks_share_names_who_made_it_and_another(way, late):
    _, lines, _ = trained(way=way, late=late)
    assert named(lines) == ["blocks.0"]
    assert "a graph that blocks.1 and its like may share" in lines[0]


class ByExp(Layer):
    def weigh(self, scores, x):
        exponentials = scores.exp()
        return exponentials / exponentials.sum(-1, keepdim=True)


class ByLogSum(Layer):
    def weigh(self, scores, x):
        return (scores - scores.logsumexp(-1, keepdim=True)).exp()


class PartlyCheckpointed(Layer):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Helper(nn.Module):
    """A class of no telling name, whose dot product stands in a function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        return x + mixed(self.qkv(x))


def mixed(qkv):
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class ByItsFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 4), nn.Parameter(torch.zeros(3 * WIDTH))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x.transpose(0, 1)
        given = (x, x, x, WIDTH, HEADS, self.w, self.b, None, None, False, 0.0, self.out.weight, self.out.bias)
        return (x + F.multi_head_attention_forward(*given)[0]).transpose(0, 1)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (ByFunction, "reads it"),
        (ByLogarithm, "reads it"),
        (ByModule, "reads it"),
        (Folded, "reads it"),
        (ByExp, "written with exp"),
        (ByLogSum, "written with exp"),
        (Shifted, "shifted"),
        (Renormalised, "weights are changed"),
        (Padded, "which queries are padding"),
        (InParts, "another module"),
        (PartlyCheckpointed, "checkpoint"),
        (Helper, "not looked into"),
        (ByItsFunction, "inside a compiled graph"),
    ],
)
def test_however_it_is_written(layer, why):
    _, lines, _ = trained(layer)
    assert named(lines) == ["blocks.0", "blocks.1"]
    assert all(why in line for line in lines)


def test_inside_a_checkpointed_layer_the_layer_is_named():
    assert named(trained(Checkpointed)[1]) == ["blocks.0.layer", "blocks.1.layer"]


@pytest.mark.parametrize("layer", [ByExp, ByLogSum, PartlyCheckpointed])
def test_what_is_not_read_is_said_where_the_rest_is_read(layer):
    _, lines, _ = trained(layer, probes=[torchprobe.Attention(every=2, compiled="read")])
    assert named(lines) == ["blocks.0", "blocks.1"]


def test_sizes_that_are_symbols_are_no_hindrance():
    class Open(Layer):
        def weigh(self, scores, x):
            return (scores + 0).softmax(-1)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return x + ((q @ k.mT * x.shape[1]).softmax(-1) @ v).transpose(1, 2).flatten(2)

    _, lines, graphs = trained(Open, dynamic=True)
    assert named(lines) == ["blocks.0", "blocks.1"]
    assert graphs == trained(Open, dynamic=True, watched=False)[2]


class BrokenBefore(Layer):
    """The graph ends between scores and softmax."""

    def weigh(self, scores, x):
        torch._dynamo.graph_break()
        return scores.softmax(-1)


class BrokenAfter(Layer):
    def weigh(self, scores, x):
        weights = scores.softmax(-1)
        torch._dynamo.graph_break()
        return weights


@pytest.mark.parametrize("layer", [BrokenBefore, BrokenAfter])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_attention_in_two_graphs_is_perhaps_one(layer, backend):
    _, lines, _ = trained(layer, backend=backend, fullgraph=False)
    assert named(lines) == ["blocks.0"]
    assert "if it is one, which a graph break cuts in two" in lines[0]


# ---- the user's run


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_weights_and_graphs_are_those_of_the_bare_run(backend):
    with torch._inductor.config.patch(SCALAR):
        expected, _, graphs = trained(backend=backend, watched=False, steps=4)
        found, lines, found_graphs = trained(backend=backend, steps=4)
    assert_named(lines)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found_graphs == graphs


def test_the_first_look_compiles_a_model_anew_that_was_compiled_before_and_no_later_one():
    assert trained(late=True, steps=6)[2] == trained(watched=False, steps=6)[2] + 1


def test_an_error_of_ours_ends_the_look_alone_and_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(unread._Graph, "take", lambda *args: 1 / 0)
    expected, *_ = trained(watched=False)
    found, lines, _ = trained(way=each_block)
    assert lines == ["compiled graphs that could not be looked into"]
    assert len([record for record in caplog.records if "not looked for" in record.message]) == 1
    assert all(map(math.isfinite, (one.sum() for one in found)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_dynamo_calls_nothing_of_ours_after_the_end():
    before = len(_bytecode_hooks)
    trained()
    assert len(_bytecode_hooks) == before

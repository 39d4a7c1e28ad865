"""Attention that is written out, inside compiled graphs: read where the user asks for it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import torchprobe
from tests.setups.compiled import COMPILERS_WARNINGS, assert_same_values
from tests.setups.matrix import SCALAR
from tests.setups.reference import following
from torchprobe.capture.attention import graph
from torchprobe.testing import MemoryWriter

pytestmark = COMPILERS_WARNINGS

WIDTH, HEADS, LENGTH = 16, 2, 6


class Layer(nn.Module):
    """A causal attention, written out; `weigh` makes weights of scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)
        weights = F.dropout(self.weigh(scores.masked_fill(~self.seen, -math.inf), x), 0.0, self.training)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))

    def weigh(self, scores, x):
        return scores.softmax(-1)


class ByFunction(Layer):
    def weigh(self, scores, x):
        return F.softmax(scores, dim=-1, dtype=torch.float32)


class ByLogarithm(Layer):
    def weigh(self, scores, x):
        return torch.log_softmax(scores, -1).exp()


class ByAddition(Layer):
    """-5,000 with a score above 0 is larger than what hides by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(LENGTH, LENGTH).masked_fill(~self.seen, -5000.0))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-2, -1) + self.bias).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


class ByModule(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(-1)

    def weigh(self, scores, x):
        return self.softmax(scores)


class Folded(Layer):
    """Heads and batch are one dimension, in an order that the data flow alone tells."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).permute(2, 0, 1, 3).flatten(0, 1) for t in self.qkv(x).chunk(3, -1))
        weights = torch.baddbmm(self.seen.float().log(), q, k.transpose(1, 2), alpha=0.3).softmax(-1)
        return x + torch.bmm(weights, v).unflatten(0, (HEADS, -1)).permute(1, 2, 0, 3).flatten(2)


class Shifted(Layer):
    def weigh(self, scores, x):
        return (scores - scores.amax(-1, keepdim=True)).softmax(-1)


class Renormalised(Layer):
    def weigh(self, scores, x):
        weights = scores.softmax(-1) * self.seen.tril(-1)
        return weights / (weights.sum(-1, keepdim=True) + 1)


class Padded(Layer):
    def weigh(self, scores, x):
        padded = (x[..., 0] > 0)[:, None, None]
        return scores.masked_fill(padded, -1e4).softmax(-1)


class PaddedEarlier(Layer):
    """Before batch and heads become one dimension."""

    def weigh(self, scores, x):
        scores = scores + (x[..., 0] > 0)[:, None, None] * -1e4
        return scores.flatten(0, 1).softmax(-1).unflatten(0, (-1, HEADS))


class PaddedByABuffer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("padded", (torch.arange(LENGTH) >= torch.tensor([[6], [4], [2]]))[:, None, None])

    def weigh(self, scores, x):
        return scores.masked_fill(self.padded, -math.inf).softmax(-1)


class SoftmaxElsewhere(nn.Module):
    def forward(self, scores):
        return scores.softmax(-1)


class InParts(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.elsewhere = SoftmaxElsewhere()

    def weigh(self, scores, x):
        return self.elsewhere(scores)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)


class Router(nn.Module):
    """Experts whose keys are a parameter, and others that are a buffer; a gate over features."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)
        self.register_buffer("fixed", torch.randn(4, WIDTH))

    def forward(self, x):
        x = x + self.values(self.keys(x).softmax(-1)) + (x @ self.fixed.T).softmax(-1) @ self.fixed
        return x * x.softmax(-1)


class Model(nn.Module):
    def __init__(self, layer=Layer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(layer() for _ in range(2))

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x


def passes(how, layer=Layer, steps=5, compiled="read", make_optimizer=torch.optim.SGD, weights=None):
    torch.manual_seed(2)
    torch._dynamo.reset()
    counters.clear()
    model, writer = Model(layer), MemoryWriter()
    how(model)
    optimizer = make_optimizer(model.parameters(), lr=0.1)
    probes = [torchprobe.Attention(every=2, compiled=compiled, maps_every=100)]
    with torchprobe.instrument(model, writer=writer, probes=probes) as session:
        for step in range(steps):
            ids = torch.randint(10, (3, LENGTH), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
            if weights is not None:
                weights.append([p.detach().clone() for p in model.parameters()])
        said = session.summary()
    return writer, str(said), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_is_what_it_is_in_eager_mode(backend):
    options = SCALAR if backend == "inductor" else None
    weights = []
    found, _, graphs = passes(lambda m: m.compile(backend=backend, fullgraph=True, options=options), weights=weights)
    expected, *_ = passes(lambda model: None, make_optimizer=following(weights, torch.optim.SGD))
    assert "attention_entropy/blocks.1" in expected.tags()
    assert_same_values(found, expected)
    assert graphs == 2


def eager(model):
    model.compile(backend="eager", fullgraph=True)


def each_block(model):
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)


@pytest.mark.parametrize("how", [eager, each_block])
@pytest.mark.parametrize("layer", [ByFunction, ByLogarithm, ByAddition, ByModule, Folded])
def test_however_it_is_written(layer, how):
    expected, *_ = passes(lambda model: None, layer, 3)
    found, _, graphs = passes(how, layer, 3)
    assert "attention_entropy/blocks.1" in expected.tags()
    assert_same_values(found, expected)
    assert graphs == 2


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Shifted, "shifted"),
        (Renormalised, "weights are changed"),
        (Padded, "which queries are padding"),
        (PaddedEarlier, "which queries are padding"),
        (PaddedByABuffer, "which queries are padding"),
        (InParts, "another module"),
        (Checkpointed, "activation checkpoint"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_name(layer, why):
    found, said, _ = passes(eager, layer, 3)
    assert not [tag for tag in found.tags() if tag.startswith("attention_")]
    lines = [line for line in said.splitlines() if why in line]
    assert [name in line for name, line in zip(("blocks.0", "blocks.1"), lines, strict=True)] == [True, True]


def test_sizes_that_are_symbols_are_said():
    def dynamic(model):
        model.compile(backend="eager", fullgraph=True, dynamic=True)

    class Open(Layer):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return x + ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)

    found, said, _ = passes(dynamic, Open, 3)
    assert not [tag for tag in found.tags() if tag.startswith("attention_")]
    assert "symbols" in said


def test_what_is_no_attention_is_none():
    found, said, _ = passes(eager, Router, 3)
    assert not [tag for tag in found.tags() if tag.startswith("attention_")]
    assert "not seen" not in said


def test_nothing_is_read_unless_it_is_asked_for():
    found, *_ = passes(eager, Layer, 3, compiled="say")
    assert not [tag for tag in found.tags() if tag.startswith("attention_")]


def test_weights_are_those_of_the_bare_model():
    def trained(watched):
        torch.manual_seed(2)
        torch._dynamo.reset()
        model = Model()
        model.compile(backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probes = [torchprobe.Attention(every=2, compiled="read")]
        session = torchprobe.instrument(model, writer=MemoryWriter(), probes=probes) if watched else None
        for step in range(3):
            ids = torch.randint(10, (3, LENGTH), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
        if session is not None:
            session.detach()
        return [parameter.detach().clone() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


def test_an_error_of_ours_while_a_graph_is_traced_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(graph, "_looking", graph._Looking())
    monkeypatch.setattr(graph._Tracker, "call", lambda *args: 1 / 0)
    found, said, graphs = passes(eager, Layer, 3)
    assert not [tag for tag in found.tags() if tag.startswith("attention_")]
    assert graphs == 2
    assert len([record for record in caplog.records if "not looked for" in record.message]) == 1
    assert "could not be looked into" in said


class Steps(Layer):
    """A query at a time. Where they are shuffled, it is not told which key is a query's own."""

    shuffled = False

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q = q[:, :, x[0, :, 0].argsort()] if self.shuffled else q
        keys = ((k[:, :, : i + 1], v[:, :, : i + 1]) for i in range(LENGTH))
        read = [(q[:, :, i : i + 1] @ k.mT).softmax(-1) @ v for i, (k, v) in enumerate(keys)]
        return x + self.out(torch.cat(read, 2).transpose(1, 2).flatten(2))


def test_a_query_at_a_time_stands_where_it_does_in_every_layer():
    found, *_ = passes(eager, Steps, 3)
    torch.manual_seed(2)
    model = Model(Steps).double()
    x = model.embedding(torch.randint(10, (3, LENGTH), generator=torch.Generator().manual_seed(0)))
    far = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).tril()
    for i, block in enumerate(model.blocks):
        q, k, _ = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in block.qkv(x).chunk(3, -1))
        p = (q @ k.mT).masked_fill(~block.seen, -math.inf).softmax(-1)
        distance, entropy = (p * far).sum(-1).mean().item(), torch.special.entr(p).sum(-1).mean().item()
        assert found.value(f"attention_distance/blocks.{i}", 1) == pytest.approx(distance, rel=1e-5)
        assert found.value(f"attention_entropy/blocks.{i}", 1) == pytest.approx(entropy, rel=1e-5)
        x = block(x)


def second_shuffled(model):
    model.blocks[1].shuffled = True
    eager(model)


def test_of_calls_at_one_line_of_which_one_is_not_read_none_is_written():
    found, said, _ = passes(second_shuffled, Steps, 3)
    assert "the attention of blocks.1, whose queries stand where it is not known" in said
    assert [tag for tag in found.tags() if tag.startswith("attention_entropy/")] == ["attention_entropy/blocks.0"]


def test_another_word_is_an_error_that_says_what_to_write():
    with pytest.raises(ValueError, match=r"compiled='reed': takes \"say\" or \"read\": write compiled=\"read\""):
        torchprobe.Attention(compiled="reed")

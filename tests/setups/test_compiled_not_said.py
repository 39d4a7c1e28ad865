"""What looks like attention in a compiled graph, or is recorded there, is not named as attention that is not read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.setups.compiled import COMPILERS_WARNINGS, function, method, wrapper
from tests.setups.test_compiled_said import trained
from tests.setups.test_compiled_written import HEADS, LENGTH, WIDTH, Layer, Model, Router
from torchprobe.testing import MemoryWriter

pytestmark = COMPILERS_WARNINGS


class Dot(nn.Module):
    """Attention that is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class MultiHead(nn.Module):
    def __init__(self, weights=True) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), weights

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=self.weights)[0]


class Experts(nn.Module):
    """A router over experts, whose outputs are summed by its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 4), nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 4)

    def forward(self, x):
        made = torch.einsum("bnd,edf->bnef", x, self.experts)
        return x + torch.einsum("bne,bnef->bnf", self.router(x).softmax(-1), made)


class HashedExperts(Experts):
    """The router's keys are made of parameters."""

    def forward(self, x):
        keys = F.normalize(self.experts.mean(-1), dim=-1)
        weights = (x @ keys.mT).softmax(-1)
        return x + weights @ self.experts.mean(1)


class LinearAttention(Layer):
    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + (q.softmax(-1) @ (k.softmax(-2).mT @ v)).transpose(1, 2).flatten(2)


class Classes(nn.Module):
    """A head whose probabilities weigh the embeddings of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.classes = nn.Linear(WIDTH, 5), nn.Embedding(5, WIDTH)

    def forward(self, x):
        return x + self.head(x).softmax(-1) @ self.classes.weight


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + (self.gate(x).softmax(-1) * self.value(x)).sum(1, keepdim=True)


class Contrastive(nn.Module):
    """Similarities of sequences: probabilities that no value is summed with."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        a, b = self.one(x).mean(1), self.other(x).mean(1)
        return x + (a @ b.mT).softmax(-1).diagonal().sum()


class BrokenLinear(LinearAttention):
    """Its keys have the shape of scores, which a graph break lets by."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        torch._dynamo.graph_break()
        return x + (q.softmax(-1) @ (k.softmax(-2).mT @ v)).transpose(1, 2).flatten(2)


LOOK_ALIKES = [Router, Experts, HashedExperts, LinearAttention, Classes, Gated, Contrastive, BrokenLinear]


@pytest.mark.parametrize("compiled", ["say", "read"])
@pytest.mark.parametrize("layer", [Dot, MultiHead, lambda: MultiHead(False), *LOOK_ALIKES])
def test_what_is_recorded_or_is_none_is_not_named(layer, compiled):
    probes = [torchprobe.Attention(every=2, compiled=compiled)]
    _, lines, _ = trained(layer, fullgraph=layer is not BrokenLinear, probes=probes)
    assert not [line for line in lines if "the attention of" in line]


def test_a_model_of_the_same_class_that_is_not_watched_is_not_named():
    torch._dynamo.reset()
    watched, other = Model(Dot), Model(Layer)
    other.compile(backend="eager")
    with torchprobe.instrument(watched, writer=MemoryWriter(), probes=[torchprobe.Attention(every=1)]) as session:
        ids = torch.zeros(1, LENGTH, dtype=torch.long)
        (watched(ids).sum() + other(ids).sum()).backward()
        assert "not seen" not in session.summary()


class Convolved(nn.Module):
    """Nothing in it could be attention."""

    def forward(self, x):
        return x + F.conv1d(x.mT, x.new_ones(WIDTH, 1, 3), padding=1, groups=WIDTH).mT.sigmoid()


@pytest.mark.parametrize("way", [method, wrapper, function])
@pytest.mark.parametrize(("layer", "said"), [(Convolved, []), (Gated, ["compiled graphs"])])
def test_graphs_in_which_no_attention_can_be_are_not_named(layer, said, way):
    probes = [torchprobe.Attention(every=2), torchprobe.Activations(every=2)]
    _, lines, _ = trained(layer, way=way, probes=probes)
    assert lines == said

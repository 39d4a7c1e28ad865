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
from torchprobe.testing import MemoryWriter

pytestmark = COMPILERS_WARNINGS

WIDTH, HEADS, LENGTH = 16, 2, 6


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)).masked_fill(~self.seen, -math.inf)
        weights = F.dropout(scores.softmax(-1), 0.0, self.training)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


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


def passes(how, layer=Layer, steps=5, compiled="read"):
    torch.manual_seed(2)
    torch._dynamo.reset()
    counters.clear()
    model, writer = Model(layer), MemoryWriter()
    how(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probes = [torchprobe.Attention(every=2, compiled=compiled, maps_every=100)]
    with torchprobe.instrument(model, writer=writer, probes=probes) as session:
        for step in range(steps):
            ids = torch.randint(10, (3, LENGTH), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
        said = session.summary()
    return writer, str(said), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_is_what_it_is_in_eager_mode(backend):
    expected, *_ = passes(lambda model: None)
    found, _, graphs = passes(lambda model: model.compile(backend=backend, fullgraph=True))
    assert "attention_entropy/blocks.1" in expected.tags()
    assert_same_values(found, expected)
    assert graphs == 2

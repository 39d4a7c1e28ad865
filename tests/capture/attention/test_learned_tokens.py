"""Tokens that are parameters: as queries over segments, as slots that others look at."""

from __future__ import annotations

import torch
from torch import nn

from tests.capture.attention.attends import scores
from tests.capture.attention.harness import record
from tests.capture.attention.reference import assert_close, of_weights

WIDTH, HEADS, SLOTS = 16, 2, 3


def by_head(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def flat(x):
    return x.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """Queries of one sequence, keys and values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, memory):
        p = scores(by_head(self.q(x)), by_head(self.k(memory))).softmax(-1)
        self.p = p.detach()
        return self.out(flat(p @ by_head(self.v(memory))))


class Segments(nn.Module):
    """A series is cut into segments; in each, learned queries look at all series."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(6, WIDTH), Layer()
        self.router = nn.Parameter(torch.randn(SLOTS, WIDTH))

    def forward(self, x):
        x = self.embed(x.unflatten(-1, (-1, 6))).transpose(1, 2).flatten(0, 1)
        return self.attention(self.router.expand(len(x), -1, -1), x)


def test_segments_of_learned_queries_are_no_heads():
    model = Segments()
    found = record(model, torch.randn(3, 5, 24)).heads["attention"]
    assert_close(found, of_weights(model.attention.p))


class Mutual(nn.Module):
    """Tokens and slots look at each other, by the same scores."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.of_tokens, self.of_slots = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, slots):
        s = scores(by_head(self.q(x)), by_head(self.k(slots)))
        self.p = s.softmax(-1).detach()
        read, write = s.softmax(-1) @ by_head(self.of_slots(slots)), s.softmax(-2).mT @ by_head(self.of_tokens(x))
        return x + flat(read), slots + flat(write)


class Slots(nn.Module):
    """They do so in two layers; at first slots are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(SLOTS, WIDTH))
        self.layers = nn.ModuleList(Mutual() for _ in range(2))

    def forward(self, x):
        slots = self.slots.expand(len(x), -1, -1)
        for layer in self.layers:
            x, slots = layer(x, slots)
        return x, slots


def test_slots_that_have_read_are_keys_though_they_were_parameters_before():
    model = Slots()
    found = record(model, torch.randn(4, 7, WIDTH)).heads
    assert_close(found["layers.1"], of_weights(model.layers[1].p))

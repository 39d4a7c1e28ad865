"""Products with parameters, such as positions, beside those of queries and keys; and memories that are still empty."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.capture.attention.harness import assert_untouched, record
from tests.capture.attention.reference import assert_close, per_head

HEADS, WIDTH = 2, 8


def of_a_head(q: Tensor, table: Tensor, keys: int) -> Tensor:
    return torch.einsum("bhid,jhd->bhij", q, table[:keys, 0])


def by_matmul(q: Tensor, table: Tensor, keys: int) -> Tensor:
    return q @ table[:keys, 0].transpose(0, 1).mT


def of_a_query(q: Tensor, table: Tensor, keys: int) -> Tensor:
    return torch.einsum("bhid,ijd->bhij", q, table[: q.size(2), :keys, 0])


def picked(q: Tensor, table: Tensor, keys: int) -> Tensor:
    apart = (torch.arange(q.size(2))[:, None] - torch.arange(keys)).abs()
    return torch.einsum("bhid,ijd->bhij", q, table[:, 0, 0][apart])


def of_pairs(q: Tensor, table: Tensor, keys: int) -> Tensor:
    """Made of a batch, as relations between words are."""
    one = q[:, 0] * table[0, 0, 0]
    return torch.einsum("bhid,bijd->bhij", q, one[:, :, None] + one[:, None])


class Positions(nn.Module):
    """Self-attention with positions in its logits, all at once or step by step behind a cache."""

    def __init__(self, positions, first: bool, hidden: Tensor | None = None) -> None:
        super().__init__()
        self.qkv, self.table = nn.Linear(16, 48), nn.Parameter(torch.randn(9, 9, HEADS, WIDTH) * 0.3)
        self.positions, self.first, self.hidden = positions, first, hidden
        self.logits: list[Tensor] = []

    def forward(self, x: Tensor, parts: int = 1) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        self.logits, size = [], x.size(1) // parts
        return torch.cat(
            [self._attend(q[:, :, n - size : n], k[:, :, :n], v[:, :, :n]) for n in range(size, x.size(1) + 1, size)], 2
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores, more = q @ k.mT, self.positions(q, self.table, k.size(2))
        scores = scores if self.hidden is None else scores.masked_fill(self.hidden, -math.inf)
        logits = more + scores if self.first else scores + more
        self.logits.append(logits.detach())
        return logits.softmax(-1) @ v


ALL = pytest.mark.parametrize("positions", [of_a_head, by_matmul, of_a_query, picked, of_pairs])
ORDER = pytest.mark.parametrize("first", [True, False])


@ORDER
@ALL
@pytest.mark.parametrize("length", [6, 1])
def test_positions_may_be_added_on_either_side(positions, first, length):
    model, x = Positions(positions, first), torch.randn(2, length, 16)
    seen = record(model, x)
    assert_close(seen.heads["root"], per_head(model.logits[0]))
    assert list(seen.heads) == ["root"]
    assert not seen.uncovered
    assert_untouched(model, x)


@ORDER
@pytest.mark.parametrize("positions", [of_a_head, by_matmul])
def test_the_first_step_of_a_cache_is_of_the_same_attention(positions, first):
    model = Positions(positions, first)
    seen = record(model, torch.randn(2, 5, 16), parts=5)
    weights = [each.softmax(-1) for each in model.logits]
    far = [(p * (p.size(-1) - 1 - torch.arange(p.size(-1)))).sum(-1) for p in weights]
    entropies = [torch.special.entr(p).sum(-1) for p in weights]
    assert list(seen.heads) == ["root"]
    assert seen.of("entropy") == pytest.approx(torch.cat(entropies, 2).mean((0, 2)).tolist(), rel=1e-4)
    assert seen.of("distance") == pytest.approx(torch.cat(far, 2).mean((0, 2)).tolist(), rel=1e-4)


@ORDER
def test_padding_is_that_of_the_scores_before_positions_are_added(first):
    padded = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    model = Positions(of_a_head, first, padded[:, None, None])
    seen = record(model, torch.randn(2, 6, 16))
    assert_close(seen.heads["root"], per_head(model.logits[0], padded))


class Segments(nn.Module):
    """Attends to the segment before, too, of which there is none at first: a tensor without any dimension of theirs."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.kv, self.fused, self.logits = nn.Linear(16, 16), nn.Linear(16, 32), fused, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        memory, out, self.logits = torch.empty(0), [], []
        for segment in x.split(4, 1):
            both = torch.cat([memory, segment], 1)
            q, k, v = (
                t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(segment), *self.kv(both).chunk(2, -1))
            )
            logits = q @ k.mT * WIDTH**-0.5
            self.logits.append(logits.detach())
            fused = nn.functional.scaled_dot_product_attention if self.fused else None
            out.append(fused(q, k, v) if fused else logits.softmax(-1) @ v)
            memory = segment.detach()
        return torch.cat(out, 2)


@pytest.mark.parametrize("fused", [True, False])
def test_a_memory_that_is_still_empty_makes_no_other_attention_of_it(fused):
    model = Segments(fused)
    seen = record(model, torch.randn(2, 8, 16))
    first, second = (logits.softmax(-1) for logits in model.logits)
    places = torch.arange(4)[:, None]
    far = [(first * (places - torch.arange(4)).abs()).sum(-1), (second * (places + 4 - torch.arange(8)).abs()).sum(-1)]
    assert list(seen.heads) == ["root"]
    assert seen.of("distance") == pytest.approx(torch.cat(far, 2).mean((0, 2)).tolist(), rel=1e-4)

"""Distances are between true positions, and a decode step has the self-attention's tag."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.attention.attends import HEADS, Attends, scores
from tests.capture.attention.harness import capture_of, hooked, record, recorded
from tests.capture.attention.passes import Lambda
from tests.capture.attention.reference import assert_close, of_weights

X = torch.randn(2, 12, 16)


class Cached(nn.Module):
    """Keeps keys and values from call to call, written out or by a call that names them."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.fused, self.cache, self.p = nn.Linear(16, 48), fused, None, []

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        past = 0
        if self.cache is not None:
            past = self.cache[0].size(2)
            k, v = (torch.cat(pair, 2) for pair in zip(self.cache, (k, v), strict=True))
        self.cache = (k, v)
        seen = torch.arange(k.size(2)) <= torch.arange(past, k.size(2))[:, None]
        self.p.append(scores(q, k).masked_fill(~seen, -math.inf).softmax(-1).detach())
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return scores(q, k).masked_fill(~seen, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("first", "each"), [(9, 1), (6, 3), (1, 1)])
def test_with_a_cache(fused, first, each):
    model = nn.Sequential()
    model.add_module("layer", Cached(fused))
    capture = capture_of(model)
    with torch.no_grad(), hooked(model, capture):
        for part in (X[:, :first], *X[:, first:].split(each, 1)):
            model(part)
            found, p = recorded(capture), model.layer.p[-1]
            position = torch.arange(p.size(3) - p.size(2), p.size(3))
            assert list(found.heads) == ["layer"]
            assert_close(found.heads["layer"], of_weights(p, position=position))


@pytest.mark.parametrize("way", ["slices", "split", "sdpa"])
def test_queries_in_parts(way):
    class Parts(Attends):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            self.p = scores(q, k).softmax(-1).detach()
            parts = q.split(5, 2) if way == "split" else [q[:, :, i : i + 4] for i in range(0, 12, 4)]
            each = F.scaled_dot_product_attention if way == "sdpa" else lambda q, k, v: scores(q, k).softmax(-1) @ v
            return torch.cat([each(part, k, v) for part in parts], 2)

    model = Parts(None)
    assert_close(record(model, X).heads["root"], of_weights(model.p))


def test_a_last_query_alone_stands_at_the_end():
    """As in pooling by the last token."""
    attend = lambda m, q, k: scores(q[:, :, -1:], k).softmax(-1)  # noqa: E731
    model = Attends(attend)
    assert_close(record(model, X).heads["root"], of_weights(model.p, position=torch.tensor([11])))


def test_tokens_that_are_gathered_keep_no_wrong_place():
    """Queries of another sequence stand where they stand in their own."""
    model = Attends(lambda m, q, k: scores(m.other(m.y).unflatten(-1, (HEADS, -1)).transpose(1, 2), k).softmax(-1))
    model.other, model.y = nn.Linear(16, 16), torch.randn(2, 5, 16)
    assert_close(record(model, X).heads["root"], of_weights(model.p))


@pytest.mark.parametrize("memory", [1, 3])
def test_keys_before_the_tokens_move_them(memory):
    class Prefix(Attends):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            k, v = (torch.cat((self.prefix.expand(len(x), -1, -1, -1), t), 2) for t in (k, v))
            self.p = scores(q, k).softmax(-1).detach()
            return scores(q, k).softmax(-1) @ v

    model = Prefix(None, prefix=nn.Parameter(torch.randn(HEADS, memory, 8)))
    position = torch.arange(12) + memory
    assert_close(record(model, X).heads["root"], of_weights(model.p, position=position))


@pytest.mark.parametrize("shift", [0, 2])
def test_windows_of_two_dimensions(shift):
    """As Swin has them, rolled or not: places within the window."""

    def windows(x):
        x = x.view(2, 4, 4, 16).roll((-shift, -shift), (1, 2))
        return x.view(2, 2, 2, 2, 2, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 16)

    inner = Attends(lambda m, q, k: scores(q, k).softmax(-1))
    model = nn.Sequential(Lambda(windows), inner)
    seen = record(model, torch.randn(2, 16, 16))
    assert_close(seen.heads["1"], of_weights(inner.p))

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


def write_by_index(cache, new, at):
    cache.index_copy_(2, at, new)


def write_by_assignment(cache, new, at):
    cache[:, :, at] = new


def write_by_slice(cache, new, at):
    cache[:, :, int(at[0]) : int(at[-1]) + 1] = new


class Static(Cached):
    """Writes keys and values into tensors of a fixed length."""

    def __init__(self, fused: bool, write) -> None:
        super().__init__(fused)
        self.write, self.past = write, torch.zeros((), dtype=torch.long)
        self.cache = [torch.zeros(2, HEADS, 15, 8), torch.zeros(2, HEADS, 15, 8)]

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        at = torch.arange(q.size(2)) + self.past
        for cache, new in zip(self.cache, (k, v), strict=True):
            self.write(cache, new, at)
        self.past += q.size(2)
        k, v = self.cache
        seen = torch.arange(15) <= at[:, None]
        at += 7  # what was written stays where it is
        self.p.append(scores(q, k).masked_fill(~seen, -math.inf).softmax(-1).detach())
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return scores(q, k).masked_fill(~seen, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("write", [write_by_index, write_by_assignment, write_by_slice])
def test_with_a_cache_of_fixed_length(fused, write):
    model = nn.Sequential()
    model.add_module("layer", Static(fused, write))
    capture, past = capture_of(model), 0
    with torch.no_grad(), hooked(model, capture):
        for part in (X[:, :6], X[:, 6:7], X[:, 7:10]):
            model(part)
            found, position = recorded(capture), torch.arange(past, past + part.size(1))
            assert list(found.heads) == ["layer"]
            assert_close(found.heads["layer"], of_weights(model.layer.p[-1], position=position))
            past += part.size(1)


def write_by_number(cache, new, at):
    cache[:, :, int(at[0])] = new[:, :, 0]


def write_by_choice(cache, new, at):
    return torch.where((torch.arange(6) == at)[:, None], new, cache)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "write", [write_by_index, write_by_assignment, write_by_slice, write_by_number, write_by_choice]
)
def test_a_cache_that_goes_round_has_no_distances_once_older_keys_stand_behind(fused, write):
    class Ring(Cached):
        def __init__(self) -> None:
            super().__init__(fused)
            self.past = 0
            self.register_buffer("keys", torch.zeros(2, HEADS, 6, 8))
            self.register_buffer("values", torch.zeros(2, HEADS, 6, 8))

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            at, self.past = torch.tensor([self.past % 6]), self.past + 1
            for name, new in (("keys", k), ("values", v)):
                setattr(
                    self,
                    name,
                    cache if (cache := write(getattr(self, name), new, at)) is not None else getattr(self, name),
                )
            k, v = (t[:, :, : self.past] for t in (self.keys, self.values))
            self.p.append(scores(q, k).softmax(-1).detach())
            return F.scaled_dot_product_attention(q, k, v) if fused else scores(q, k).softmax(-1) @ v

    model = nn.Sequential()
    model.add_module("layer", Ring())
    capture = capture_of(model)
    with torch.no_grad(), hooked(model, capture):
        for past in range(8):
            model(X[:, past : past + 1])
            found = recorded(capture).heads["layer"]
            right = of_weights(model.layer.p[-1], position=torch.tensor([past]))
            known = past < 6 and (write is not write_by_choice or past == 0)
            assert all(("distance" in head) == known for head in found)
            assert_close(found, right if known else [{"entropy": head["entropy"]} for head in right])


def test_a_cache_that_is_full_moves_on():
    """As a sliding window of fixed length does: all move by one, the new one is the last."""

    class Rolling(Static):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            for cache, new in zip(self.cache, (k, v), strict=True):
                moved = cache.roll(-1, 2)
                moved[:, :, torch.tensor([-1])] = new
                cache.copy_(moved)
            k, v = self.cache
            self.p.append(scores(q, k).softmax(-1).detach())
            return scores(q, k).softmax(-1) @ v

    model = nn.Sequential()
    model.add_module("layer", Rolling(False, None))
    with torch.no_grad():
        for cache in model.layer.cache:
            cache.normal_()
        found = record(model, X[:, :1])
    assert_close(found.heads["layer"], of_weights(model.layer.p[-1], position=torch.tensor([14])))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_tokens_that_parameters_add_are_tokens(fused, tokens):
    """As the class token of a vision transformer, before patches that a convolution makes: self-attention."""

    class Vision(Attends):
        def forward(self, image):
            x = self.patch(image).flatten(2).transpose(1, 2)
            x = torch.cat((self.first.expand(len(x), -1, -1), x), 1)
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            self.p = scores(q, k).softmax(-1).detach()
            return F.scaled_dot_product_attention(q, k, v) if fused else scores(q, k).softmax(-1) @ v

    model = Vision(None, patch=nn.Conv2d(3, 16, 4, 4), first=nn.Parameter(torch.randn(1, tokens, 16)))
    assert_close(record(model, torch.randn(2, 3, 16, 16)).heads["root"], of_weights(model.p))


@pytest.mark.parametrize("fused", [False, True])
def test_a_token_before_those_that_a_convolution_makes_of_the_same_sequence(fused):
    class Downsampled(Attends):
        def forward(self, x):
            few = self.few(x.transpose(1, 2)).transpose(1, 2)
            x = torch.cat((x[:, :1], few[:, :-1]), 1)
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            self.p = scores(q, k).softmax(-1).detach()
            return F.scaled_dot_product_attention(q, k, v) if fused else scores(q, k).softmax(-1) @ v

    model = Downsampled(None, few=nn.Conv1d(16, 16, 4, 4))
    assert_close(record(model, X).heads["root"], of_weights(model.p))


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


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_windows_of_two_dimensions(shift):
    """As Swin has them, rolled or not: places within the window."""

    def windows(x):
        x = x.view(2, 4, 4, 16).roll((-shift, -shift), (1, 2))
        return x.view(2, 2, 2, 2, 2, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 16)

    inner = Attends(lambda m, q, k: scores(q, k).softmax(-1))
    model = nn.Sequential(Lambda(windows), inner)
    seen = record(model, torch.randn(2, 16, 16))
    assert_close(seen.heads["1"], of_weights(inner.p))


MOVED = {
    "rolled": lambda s: s.relu().roll(1, -2),
    "rolled and summed up": lambda s: s.relu().roll(1, -2).cumsum(-2),  # as selective attention masks
    "of one head": lambda s: s[:, :1].relu().roll(1, -2),
    "padded": lambda s: F.pad(s[:, :, :-1].relu(), (0, 0, 1, 0)),
}


@pytest.mark.parametrize("moved", MOVED.values(), ids=MOVED.keys())
def test_queries_stand_where_they_do_whatever_scores_of_other_queries_are_taken_off(moved):
    model = Attends(lambda m, q, k: ((s := scores(q, k)) - moved(s)).softmax(-1))
    assert_close(record(model, X).heads["root"], of_weights(model.p))

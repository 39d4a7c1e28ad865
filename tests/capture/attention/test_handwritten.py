"""Attention that is written out is found by matmul, softmax, matmul; what only looks like it is not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.attention.harness import assert_untouched, record
from tests.capture.attention.reference import assert_close, causal, per_head

WIDTH, HEADS, LENGTH = 8, 2, 6


class Written(nn.Module):
    """Projects, and leaves the attention to a function of queries, keys and values (batch, heads, length, width)."""

    def __init__(self, attend) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.attend = attend

    def project(self, x):
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        y = self.attend(*self.project(x))
        return self.out(y.transpose(1, 2).flatten(2))


MASK = causal(LENGTH, LENGTH)
SCALE = 1 / math.sqrt(WIDTH / HEADS)


def plain(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * SCALE, dim=-1) @ v


def masked_in_place(q, k, v):
    scores = torch.matmul(q, k.mT)
    scores /= 2
    scores.masked_fill_(~MASK, -math.inf)
    return torch.matmul(scores.softmax(-1), v)


def added_mask(q, k, v):
    scores = q @ k.transpose(2, 3) / 2
    scores = scores + torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~MASK, torch.finfo(torch.float32).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, 0.5), v)


def where_and_clamp(q, k, v):
    scores = torch.where(MASK, (q @ k.mT).mul(0.5).clamp(-50, 50), torch.tensor(-math.inf))
    return nn.Dropout(0.3)(nn.Softmax(dim=3)(scores)).matmul(v)


def folded(q, k, v):
    b = len(q)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(b, HEADS, LENGTH, LENGTH) * SCALE
    weights = scores.softmax(-1).view(b * HEADS, LENGTH, LENGTH)
    return torch.bmm(weights, v).view(b, HEADS, LENGTH, -1)


def baddbmm(q, k, v):
    b, bias = len(q), torch.zeros(2 * HEADS, LENGTH, LENGTH)
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    scores = bias.baddbmm(batch1=q, batch2=k.mT, beta=1.0, alpha=SCALE)
    return F.softmax(scores.view(b, HEADS, LENGTH, LENGTH), -1) @ v


def einsum(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * SCALE
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)


def einsum_without_arrow(q, k, v):
    scores = torch.einsum("...id,...jd->...ij", q, k) * SCALE
    return torch.einsum("...ij,...jd->...id", scores.softmax(dim=-1), v)


def keys_first(q, k, v):
    scores = (k @ q.mT * SCALE).transpose(-1, -2)
    weights = scores.softmax(-1)
    return (v.mT @ weights.mT).mT


def stabilised(q, k, v):
    scores = q @ k.mT * SCALE
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1) @ v


def stabilised_in_place(q, k, v):
    scores = q @ k.mT * SCALE
    scores -= scores.detach().amax(-1, True)
    return scores.softmax(-1) @ v


def in_parts(q, k, v):
    scores = q @ k.mT * SCALE
    weights = torch.softmax(scores.float(), -1).type_as(q).contiguous()
    parts = weights.split(2, dim=2)
    return torch.cat([part @ v for part in parts], dim=2)


def talking(q, k, v):
    mix = torch.eye(HEADS)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE
    scores = torch.einsum("bhqk,hg->bgqk", scores, mix)
    weights = torch.einsum("bhqk,hg->bgqk", scores.softmax(-1), mix)
    return torch.einsum("bgqk,bgkd->bgqd", weights, v)


@pytest.mark.parametrize(
    ("attend", "mask"),
    [
        (plain, None),
        (masked_in_place, MASK),
        (added_mask, MASK),
        (where_and_clamp, MASK),
        (folded, None),
        (baddbmm, None),
        (einsum, None),
        (einsum_without_arrow, None),
        (keys_first, None),
        (stabilised, None),
        (stabilised_in_place, None),
        (talking, None),
        (in_parts, None),
    ],
)
def test_attention_is_found_and_exact(attend, mask):
    model, x = Written(attend), torch.randn(2, LENGTH, WIDTH)
    seen = record(model, x)
    q, k, _ = model.project(x)
    logits = (q.double() @ k.double().mT) * 0.5
    logits = logits if mask is None else logits.masked_fill(~mask, -math.inf)
    assert list(seen.heads) == ["root"]
    assert_close(seen.heads["root"], per_head(logits))
    assert not seen.uncovered
    assert_untouched(model, x)


def test_a_softcap_is_part_of_the_logits():
    model = Written(lambda q, k, v: (5 * torch.tanh(q @ k.mT / 5)).softmax(-1) @ v)
    x = torch.randn(2, LENGTH, WIDTH) * 3
    q, k, _ = model.project(x)
    assert_close(record(model, x).heads["root"], per_head(5 * torch.tanh(q.double() @ k.double().mT / 5)))


def sinks(q, k, v):
    """As GPT-OSS has it: a logit a head that takes probability and has no value."""
    sink = torch.tensor([0.5, 2.0])
    scores = (q @ k.mT * SCALE).masked_fill(~MASK, -math.inf)
    scores = torch.cat([scores, sink.view(1, -1, 1, 1).expand(len(q), -1, LENGTH, -1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(dim=-1)[..., :-1] @ v


def test_sink_logits_take_probability_and_are_no_key():
    model, x = Written(sinks), torch.randn(2, LENGTH, WIDTH)
    seen = record(model, x)
    q, k, _ = model.project(x)
    logits = (q.double() @ k.double().mT * 0.5).masked_fill(~MASK, -math.inf)
    sink = torch.tensor([0.5, 2.0]).double().view(1, -1, 1, 1).expand(2, -1, LENGTH, -1)
    p = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    entropy = -(p * torch.where(p > 0, p, 1).log()).sum(-1)
    assert seen.of("entropy") == pytest.approx(entropy.mean((0, 2)).tolist(), abs=1e-5)
    assert seen.of("max_logit") == pytest.approx(logits.amax((0, 2, 3)).tolist(), abs=1e-5)
    assert seen.of("max_probability") == pytest.approx(p.amax(-1).mean((0, 2)).tolist(), abs=1e-5)
    assert_untouched(model, x)


@pytest.mark.parametrize("declared", [True, False])
def test_folded_heads_are_told_apart_whether_or_not_the_module_says_how_many(declared):
    def attend(q, k, v):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return (torch.bmm(q, k.mT).softmax(-1) @ v).unflatten(0, (-1, HEADS))

    model, x = Written(attend), torch.randn(3, LENGTH, WIDTH)
    if declared:
        model.num_heads = HEADS
    q, k, _ = model.project(x)
    logits = q.double() @ k.double().mT
    assert_close(record(model, x).heads["root"], per_head(logits))


class Grouped(nn.Module):
    """Grouped queries in five dimensions: (batch, key heads, group, queries, keys)."""

    num_heads = 4

    def forward(self, q, k, v):
        q = q.unflatten(1, (2, 2))
        return torch.einsum("bhgqk,bhkd->bhgqd", torch.einsum("bhgqd,bhkd->bhgqk", q, k).softmax(-1), v).flatten(1, 2)


def test_grouped_queries_in_five_dimensions():
    q, k = torch.randn(2, 4, LENGTH, 4), torch.randn(2, 2, LENGTH, 4)
    seen = record(Grouped(), q, k, k)
    assert_close(seen.heads["root"], per_head(q.double() @ k.double().repeat_interleave(2, 1).mT))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min])
def test_only_rows_without_a_key_are_left_out_by_a_mask_of_each_query(side, value):
    """A mask (batch, 1, queries, keys) says nothing of padding; the rows on the left see nothing."""
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, slice(0, 2) if side == "left" else slice(4, 6)] = False
    visible = real[:, None, None] & MASK

    def attend(q, k, v):
        scores = (q @ k.mT).masked_fill(~visible, value)
        return scores.softmax(-1).nan_to_num() @ v

    model, x = Written(attend), torch.randn(2, LENGTH, WIDTH)
    seen = record(model, x)
    q, k, _ = model.project(x)
    logits = (q.double() @ k.double().mT).masked_fill(~visible, -math.inf)
    assert seen.of("rows") == ([10, 10] if side == "left" else [12, 12])
    assert_close(seen.heads["root"], per_head(logits))


def test_softmax_and_dropout_modules_inside_do_not_own_the_attention():
    class Inner(Written):
        def __init__(self) -> None:
            super().__init__(lambda q, k, v: self.drop(self.softmax(q @ k.mT)) @ v)
            self.softmax, self.drop = nn.Softmax(dim=-1), nn.Dropout(0.1)

    model = nn.Sequential(nn.Identity(), Inner())
    assert list(record(model, torch.randn(2, LENGTH, WIDTH)).heads) == ["1"]


class Products(nn.Module):
    """Both products are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.qk, self.inner.pv = Matmul(), Matmul()

    def forward(self, q, k, v):
        return self.inner.pv(self.inner.qk(q, k.mT).softmax(-1), v)


class Matmul(nn.Module):
    def forward(self, a, b):
        return a @ b


def test_the_owner_contains_both_products():
    assert list(record(Products(), *torch.randn(3, 1, 2, 5, 4)).heads) == ["inner"]


def test_weights_that_are_used_twice_count_once():
    def attend(q, k, v):
        weights = (q @ k.mT).softmax(-1)
        return weights @ v + weights @ (v * 2)

    assert record(Written(attend), torch.randn(2, LENGTH, WIDTH)).of("rows") == [2 * LENGTH] * HEADS

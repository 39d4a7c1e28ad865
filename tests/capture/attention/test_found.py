"""Scores and weights on unusual ways: found and exact, or said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.attention.attends import HEADS, LENGTH, WIDTH, Attends, scores
from tests.capture.attention.harness import assert_untouched, record
from tests.capture.attention.reference import assert_close, of_weights

X = torch.randn(3, LENGTH, WIDTH)
TABLE = torch.randn(LENGTH, LENGTH)
EVERY = torch.ones(1, dtype=torch.bool)  # key is visible, though its weight may be 0 by rounding

POINTWISE = {
    "square": lambda s: s.square(),
    "sqrt": lambda s: s.abs().sqrt(),
    "sigmoid": lambda s: s.sigmoid() * 5,
    "elu": lambda s: F.elu(s),
    "softplus": lambda s: F.softplus(s),
    "hardtanh": lambda s: F.hardtanh(s),
    "clip": lambda s: s.clip(-1, 1),
    "addcmul": lambda s: torch.addcmul(s, TABLE, TABLE),
    "lerp": lambda s: s.lerp(TABLE, 0.2),
    "maximum": lambda s: torch.maximum(s, TABLE),
    "in place": lambda s: s.mul_(2).add_(TABLE),
    "triu": lambda s: s.triu(),
    "layer norm": lambda s: F.layer_norm(s, (LENGTH,)),
    "standardised": lambda s: (s - s.mean(-1, keepdim=True)) / (s.std(-1, keepdim=True) + 1e-3),
}


@pytest.mark.parametrize("change", POINTWISE.values(), ids=POINTWISE.keys())
def test_scores_that_are_changed_element_by_element(change):
    model = Attends(lambda m, q, k: change(scores(q, k)).softmax(-1))
    seen = record(model, X)
    assert_close(seen.heads["root"], of_weights(model.p, seen=EVERY))
    assert seen.uncovered == {}


def each(product, q, k):
    """A product of matrices, for every head of every sequence."""
    pairs = zip(q, k, strict=True)
    return torch.stack([torch.stack([product(a, b) for a, b in zip(*pair, strict=True)]) for pair in pairs])


PRODUCTS = {
    "inner": lambda q, k: each(torch.inner, q, k),
    "linear": lambda q, k: each(F.linear, q, k),
    "tensordot": lambda q, k: each(lambda a, b: torch.tensordot(a, b.mT, 1), q, k),
    "addmm": lambda q, k: each(lambda a, b: TABLE.addmm(a, b.mT), q, k),
    "cdist": lambda q, k: -(torch.cdist(q, k) ** 2),
    "letters apart": lambda q, k: torch.einsum("... i d, ... j d -> ... i j", q, k),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS.keys())
def test_products_of_other_names(product):
    model = Attends(lambda m, q, k: product(q, k).softmax(-1))
    assert_close(record(model, X).heads["root"], of_weights(model.p, seen=EVERY))


REARRANGED = {
    "padded behind": lambda s: F.pad(s, (0, 2)).softmax(-1)[..., :-2],
    "rolled by three": lambda s: s.roll(3, -1).softmax(-1).roll(-3, -1),
    "flipped twice": lambda s: s.flip(-1).softmax(-1).flip((-1,)),
    "tokens first": lambda s: s.permute(2, 3, 0, 1).softmax(1).permute(2, 3, 0, 1),
    "in halves": lambda s: torch.cat([part.softmax(-1) for part in s.split(3, 2)], 2),
    "keys in halves": lambda s: torch.cat((s[..., :3], s[..., 3:]), -1).softmax(-1),
}


@pytest.mark.parametrize("weigh", REARRANGED.values(), ids=REARRANGED.keys())
def test_columns_that_are_rearranged(weigh):
    model = Attends(lambda m, q, k: weigh(scores(q, k)))
    assert_close(record(model, X).heads["root"], of_weights(model.p, seen=EVERY))


SOFTMAXES = {
    "log_softmax": lambda s: s.log_softmax(-1).exp(),
    "logsumexp": lambda s: torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True)),
    "logsumexp, unsqueezed": lambda s: (s - s.logsumexp(-1).unsqueeze(-1)).exp(),
    "exp and sum": lambda s: (e := s.exp()) / e.sum(-1, keepdim=True),
    "with the largest taken off": lambda s: (
        (e := (s - s.amax(-1, keepdim=True)).exp()) / e.sum(-1, True).clamp(min=1e-8)
    ),
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_softmax_of_other_functions(name):
    model = Attends(lambda m, q, k: SOFTMAXES[name](scores(q, k)))
    seen = record(model, X)
    assert_close(seen.heads["root"], of_weights(model.p, seen=EVERY))
    assert max(seen.of("max_logit")) < 40


SHIFTS = {
    "of all": lambda s: s.max(),
    "of all, detached": lambda s: torch.amax(s.detach()),
    "of a head": lambda s: s.amax((-2, -1), keepdim=True),
    "of a row": lambda s: torch.max(s, -1, keepdim=True)[0],
}


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS.keys())
def test_the_largest_logit_is_that_before_it_was_taken_off(shift):
    def weigh(m, q, k):
        s = scores(q, k)
        m.s = s.detach()
        return (s - shift(s)).softmax(-1)

    model = Attends(weigh)
    assert record(model, X).of("max_logit") == pytest.approx(model.s.amax((0, 2, 3)).tolist(), rel=1e-5)


def test_what_is_taken_off_and_made_of_other_things_is_part_of_the_logits():
    def weigh(m, q, k):
        s = scores(q, k) - q.max()
        m.s = s.detach()
        return s.softmax(-1)

    model = Attends(weigh)
    assert record(model, X).of("max_logit") == pytest.approx(model.s.amax((0, 2, 3)).tolist(), rel=1e-5)


def heads_by_linear(m, q, k):
    return m.mix(scores(q, k).movedim(1, -1)).movedim(-1, 1).softmax(-1)


def heads_by_einsum(m, q, k):
    return torch.einsum("bhij,hg->bgij", scores(q, k), m.mix.weight).softmax(-1)


def heads_by_convolution(m, q, k):
    return F.conv2d(scores(q, k), m.mix.weight[..., None, None]).softmax(-1)


@pytest.mark.parametrize("weigh", [heads_by_linear, heads_by_einsum, heads_by_convolution])
def test_heads_that_are_mixed_before_the_softmax(weigh):
    model = Attends(weigh, mix=nn.Linear(HEADS, HEADS))
    assert_close(record(model, X).heads["root"], of_weights(model.p, seen=EVERY))
    assert_untouched(model, X)


def test_the_largest_logits_of_a_row_may_be_scattered():
    def weigh(m, q, k):
        s = scores(q, k)
        top = s.topk(3, dim=-1)
        return torch.full_like(s, -1e9).scatter(-1, top.indices, top.values).softmax(-1)

    model = Attends(weigh)
    assert_close(record(model, X).heads["root"], of_weights(model.p))


def test_values_that_are_multiplied_and_summed():
    class Summed(Attends):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            self.p = scores(q, k).softmax(-1)
            return (self.p.unsqueeze(-1) * v.unsqueeze(2)).sum(3)

    model = Summed(None)
    assert_close(record(model, X).heads["root"], of_weights(model.p, seen=EVERY))


def test_projections_by_parameters_of_a_head_each():
    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, HEADS, WIDTH, 8) * 0.3)

        def forward(self, x):
            q, k, v = (torch.matmul(x.unsqueeze(1), w) for w in self.w)
            self.p = scores(q, k).softmax(-1)
            return self.p @ v

    model = Each()
    assert_close(record(model, X).heads["root"], of_weights(model.p, seen=EVERY))


# ---- said


def sorted_scores(m, q, k):
    return scores(q, k).sort(-1).values.softmax(-1)


def gathered_scores(m, q, k):
    return scores(q, k).gather(-1, torch.arange(LENGTH).flip(0).expand(3, HEADS, LENGTH, LENGTH)).softmax(-1)


def picked_scores(m, q, k):
    return scores(q, k)[..., torch.arange(LENGTH).flip(0)].softmax(-1)


def running(m, q, k):
    return torch.fft.fft(scores(q, k)).real.softmax(-1)


def put_back(m, q, k):
    order = torch.arange(LENGTH).flip(0)
    return scores(q, k)[..., order].softmax(-1)[..., order]


def put_back_by_rank(m, q, k):
    values, places = scores(q, k).sort(-1)
    return torch.zeros_like(values).scatter(-1, places, values.softmax(-1))


def scattered_by_hand(m, q, k):
    places = torch.arange(LENGTH).expand(3, HEADS, LENGTH, LENGTH)
    return torch.zeros(places.shape).scatter(-1, places, scores(q, k)).softmax(-1)


def written_by_head(m, q, k):
    s = torch.zeros(3, HEADS, LENGTH, LENGTH)
    for head in range(HEADS):
        s[:, head] = scores(q[:, head], k[:, head])
    return s.softmax(-1)


def scattered_by_mask(m, q, k):
    s = scores(q, k)
    large = s > s.mean(-1, keepdim=True)
    return torch.full_like(s, -1e9).masked_scatter(large, s[large]).softmax(-1)


@pytest.mark.parametrize("weigh", [put_back, put_back_by_rank, scattered_by_hand, scattered_by_mask, written_by_head])
def test_weights_and_scores_that_are_put_elsewhere_are_read_right_or_said(weigh):
    model = Attends(weigh)
    seen = record(model, X)
    assert seen.uncovered or seen.heads
    if seen.heads:
        assert_close(seen.heads["root"], of_weights(model.p, seen=EVERY))


@pytest.mark.parametrize("weigh", [sorted_scores, gathered_scores, picked_scores, running])
def test_scores_in_an_order_that_is_not_known_are_said(weigh, caplog):
    model = nn.Sequential()
    model.add_module("layer", Attends(weigh))
    seen = record(model, X)
    assert seen.heads == {}
    assert any("layer" in reason for reason in seen.uncovered)
    assert "attention is not recorded for the attention of layer, whose scores pass" in caplog.text


def test_a_softmax_that_writes_into_another_tensor_is_said():
    with torch.no_grad():
        seen = record(Attends(lambda m, q, k: torch.softmax(scores(q, k), -1, out=torch.empty(0))), X)
    assert seen.heads == {}
    assert list(seen.uncovered) == ["the attention of root, whose softmax writes into `out`"]


def test_windows_that_move_with_their_query_are_said():
    class Windows(Attends):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            k, v = (F.pad(t, (0, 0, 1, 1)).unfold(2, 3, 1) for t in (k, v))
            weights = (q.unsqueeze(-2) @ k).squeeze(-2).softmax(-1)
            return torch.einsum("bhnw,bhndw->bhnd", weights, v)

    seen = record(Windows(None), X)
    assert seen.heads == {}
    assert list(seen.uncovered) == ["the attention of root, over a window of keys for each query"]


def test_scores_that_a_convolution_mixes_with_those_before_are_found():
    """As multi-token attention does: over heads and keys, and over queries up to its own."""
    mixes = nn.Conv2d(HEADS, HEADS, 3)
    model = Attends(lambda m, q, k: m.mixes(F.pad(scores(q, k), (1, 1, 2, 0))).softmax(-1), mixes=mixes)
    assert_close(record(model, X).heads["root"], of_weights(model.p, seen=EVERY))


def test_queries_that_a_convolution_mixes_as_channels_are_no_heads_and_said():
    mixes = nn.Conv1d(LENGTH, LENGTH, 3, padding=1)
    model = Attends(lambda m, q, k: m.mixes((s := scores(q, k)).flatten(0, 1)).view_as(s).softmax(-1), mixes=mixes)
    seen = record(model, X)
    assert seen.heads == {}
    assert len(seen.uncovered) == 1

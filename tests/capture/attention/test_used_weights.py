"""Weights that are changed between their softmax and the values are read as they are used, or it is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.attention.attends import HEADS, LENGTH, Attends, scores
from tests.capture.attention.harness import assert_untouched, record
from tests.capture.attention.reference import assert_close, of_weights

BAND = torch.ones(LENGTH, LENGTH).tril(2).triu(-2)
X = torch.randn(3, LENGTH, 16)


def banded(m, q, k):
    return scores(q, k).softmax(-1).masked_fill(BAND == 0, 0.0)


def renormalised(m, q, k):
    w = scores(q, k).softmax(-1) * BAND
    return F.normalize(w, p=1.0, dim=-1)


def gated_by_head(m, q, k):
    return torch.sigmoid(m.gate) * scores(q, k).softmax(-1)


def gated_by_query(m, q, k):
    return scores(q, k).softmax(-1) * q.mean(-1, keepdim=True).sigmoid()


def with_uniform(m, q, k):
    return 0.7 * torch.softmax(scores(q, k), -1) + 0.3 / LENGTH


def sharpened(m, q, k):
    w = scores(q, k).softmax(-1) ** 2
    return w / w.sum(-1, keepdim=True)


def off_by_two(m, q, k):
    e = torch.exp(scores(q, k))
    return e / e.sum(-1, keepdim=True).add(2.0)


def masked_exponentials(m, q, k):
    e = torch.exp(scores(q, k)) * BAND
    return e / e.sum(-1, keepdim=True)


def thresholded(m, q, k):
    w = scores(q, k).softmax(dim=-1)
    return torch.where(w < 0.1, torch.zeros_like(w), w)


def drawn(m, q, k):
    return F.gumbel_softmax(scores(q, k), tau=0.5, dim=-1)


@pytest.mark.parametrize(
    "weigh",
    [
        *(banded, renormalised, gated_by_head, gated_by_query, with_uniform, sharpened, off_by_two),
        *(masked_exponentials, thresholded, drawn),
    ],
)
def test_they_are_read_as_they_are_used(weigh):
    model = Attends(weigh, gate=nn.Parameter(torch.randn(HEADS, 1, 1)))
    seen = record(model, X)
    assert_close(seen.heads["root"], of_weights(model.p))
    assert seen.uncovered == {}
    assert_untouched(model, X)


def test_a_null_key_whose_value_is_used_counts_as_a_key():
    class Null(Attends):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            null = torch.zeros(*q.shape[:3], 1)
            self.p = torch.cat((scores(q, k), null), -1).softmax(-1)
            return self.p @ torch.cat((v, self.null.expand(len(x), -1, -1, -1)), 2)

    model = Null(None, null=nn.Parameter(torch.randn(HEADS, 1, 8)))
    assert_close(record(model, X).heads["root"], of_weights(model.p))


@pytest.mark.parametrize("place", ["behind", "before", "both"])
def test_sinks_may_stand_anywhere_and_differ_from_row_to_row(place):
    def weigh(m, q, k):
        columns = {"behind": (0, 1), "before": (1, 0), "both": (1, 1)}[place]
        sinks = [q.mean(-1, keepdim=True)] * columns[0], [m.sink.expand(len(q), -1, LENGTH, -1)] * columns[1]
        w = torch.cat((*sinks[0], scores(q, k), *sinks[1]), -1).softmax(-1)
        return w[..., columns[0] : columns[0] + LENGTH]

    model = Attends(weigh, sink=nn.Parameter(torch.randn(HEADS, 1, 1)))
    assert_close(record(model, X).heads["root"], of_weights(model.p))


def differential(m, q, k):
    return scores(q, k).softmax(-1) - 0.3 * scores(q.flip(-1), k).softmax(-1)


def mixed_by_parameters(m, q, k):
    return torch.einsum("bhqk,hg->bgqk", scores(q, k).softmax(-1), m.mix)


def mixed_by_a_convolution(m, q, k):
    return F.conv2d(scores(q, k).softmax(-1), m.mix[..., None, None])


def twice(m, q, k):
    return scores(q, k).softmax(-1).softmax(-1)


@pytest.mark.parametrize("weigh", [differential, mixed_by_parameters, mixed_by_a_convolution, twice])
def test_what_may_be_negative_or_is_no_softmax_any_more_is_said(weigh, caplog):
    model = nn.Sequential()
    model.add_module("layer", Attends(weigh, mix=nn.Parameter(torch.randn(HEADS, HEADS))))
    seen = record(model, X)
    assert seen.heads == {}
    assert len(seen.uncovered) == 1
    assert "attention is not recorded" in caplog.text
    assert "layer" in caplog.text


def by_rand(m, w):
    return w * (torch.rand_like(w) > 0.5) / 0.5


def by_bernoulli(m, w):
    drop = (1 - torch.empty_like(w).bernoulli_(0.5)).bool()
    return w.masked_fill(drop, 0) * 2.0


def by_where(m, w):
    return torch.where(torch.rand(w.shape) < 0.5, w, 0.0).mul(2.0)


@pytest.mark.parametrize("banded_before", [False, True])
@pytest.mark.parametrize("drop", [by_rand, by_bernoulli, by_where])
def test_a_dropout_by_hand_is_one(drop, banded_before):
    """Statistics are those before dropout, whichever way it is written."""

    def weigh(m, q, k):
        before = banded(m, q, k) if banded_before else scores(q, k).softmax(-1)
        m.before = before.detach()
        return drop(m, before)

    model = Attends(weigh)
    seen = record(model, X)
    assert_close(seen.heads["root"], of_weights(model.before))
    assert_untouched(model, X)


class Diagonalised(nn.Module):
    """Weights of a window are sheared into a matrix, in which it is not known any more what their columns count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Attends(None)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.layer.qkv(x).chunk(3, -1))
        w = scores(q, k).softmax(-1)
        matrix = F.pad(w, (0, LENGTH)).flatten(2)[..., :-LENGTH].unflatten(2, (LENGTH, -1))
        return matrix @ torch.cat((v, v), 2)[:, :, 1:]


def test_weights_whose_keys_are_lost_on_the_way_are_said():
    seen = record(Diagonalised(), X)
    assert seen.heads == {}
    assert list(seen.uncovered) == ["the attention of root, whose weights are rearranged"]


@pytest.mark.parametrize("few", [3, LENGTH])
def test_scores_of_two_products_in_one_softmax_are_said(few):
    class Two(Attends):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            other = x[:, :few].relu().unflatten(-1, (HEADS, -1)).transpose(1, 2)
            w = torch.cat((scores(q, other), scores(q, k)), -1).softmax(-1)
            return w[..., few:] @ v + w[..., :few] @ other

    seen = record(Two(None), X)
    assert seen.heads == {}
    assert len(seen.uncovered) == 1


def test_one_product_may_be_an_attention_both_ways():
    class Both(Attends):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            s = scores(q, k) - scores(q, k).max()
            self.p = s.softmax(-1), s.transpose(-1, -2).softmax(-1)
            return self.p[0] @ v + self.p[1] @ v

    model = Both(None)
    seen = record(model, X)
    for name, weights in zip(("root", "root/2"), model.p, strict=True):
        assert_close(seen.heads[name], of_weights(weights))


def test_weights_with_signs_are_said_and_not_read():
    """A row with a negative weight has no entropy, and the other rows would be no sample."""

    def signed(m, q, k):
        s = scores(q, k)
        return s.abs().softmax(-1) * s.sign()

    seen = record(Attends(signed), X)
    assert not seen.heads
    assert list(seen.uncovered) == ["the attention of root, some of whose weights are negative"]

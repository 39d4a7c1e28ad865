"""`flex_attention` outside of `torch.compile`: what the user's score_mod and mask_mod make of the logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.attention import flex_attention as flex

from tests.capture.attention.harness import record
from tests.capture.attention.reference import assert_close, causal, logits_of, per_head

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LENGTH = 32


class Flex(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return flex.flex_attention(q, k, v, **self.options)


def tensors(key_heads: int = 4):
    q = torch.randn(2, 4, LENGTH, 16)
    return (q, *torch.randn(2, 2, key_heads, LENGTH, 16))


def positions():
    i = torch.arange(LENGTH)
    return i[:, None], i[None, :]


def test_plain():
    q, k, v = tensors()
    seen = record(Flex(), q, k, v)
    assert torch.equal(seen.output, Flex()(q, k, v))
    assert_close(seen.heads["root"], per_head(logits_of(q, k)))
    assert not seen.uncovered


def test_a_score_mod_with_heads_and_scale():
    def alibi(score, batch, head, query, key):
        return score - (head + 1) * (query - key).abs() / 8

    q, k, v = tensors()
    seen = record(Flex(score_mod=alibi, scale=0.5), q, k, v)
    i, j = positions()
    slopes = (torch.arange(4) + 1)[:, None, None] / 8
    assert_close(seen.heads["root"], per_head(logits_of(q, k, 0.5) - slopes * (i - j).abs()))


def test_a_score_mod_that_looks_things_up_and_branches():
    documents = torch.arange(LENGTH) // 10
    bias = torch.randn(2, 4)

    def score_mod(score, batch, head, query, key):
        score = torch.tanh(score / 2) * 2 + bias[batch, head] * (query == key)
        return torch.where(documents[query] == documents[key], score, -math.inf)

    q, k, v = tensors()
    seen = record(Flex(score_mod=score_mod), q, k, v)
    i, j = positions()
    logits = torch.tanh(logits_of(q, k) / 2) * 2 + bias[:, :, None, None].double() * (i == j)
    expected = logits.masked_fill(documents[i] != documents[j], -math.inf)
    assert_close(seen.heads["root"], per_head(expected))


def test_a_block_mask_and_grouped_queries():
    def window(batch, head, query, key):
        return (query >= key) & (query - key < 5 + 5 * batch)

    mask = flex.create_block_mask(window, 2, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=16)
    q, k, v = tensors(key_heads=2)
    model = Flex(block_mask=mask, enable_gqa=True)
    seen = record(model, q, k, v)
    i, j = positions()
    visible = torch.stack([causal(LENGTH, LENGTH) & (i - j < width) for width in (5, 10)])[:, None]
    assert torch.equal(seen.output, model(q, k, v))
    assert_close(seen.heads["root"], per_head(logits_of(q, k, mask=visible)))


def test_sampled_rows_are_the_same_rows():
    def score_mod(score, batch, head, query, key):
        return torch.where(query >= key, score + batch + head, -math.inf)

    q, k, v = tensors()
    seen = record(Flex(score_mod=score_mod), q * 0, k, v, rows=16)
    assert seen.sampled == {"root": True}
    assert all(1 <= entropy <= math.log(LENGTH) for entropy in seen.of("entropy"))
    assert seen.of("normalized_entropy") == pytest.approx([1.0] * 4)
    assert seen.of("max_logit") == pytest.approx([1 + head for head in range(4)])

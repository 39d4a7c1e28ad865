"""A map shows one sequence's attention probabilities: queries down, keys across, pooled to an image's size."""

from __future__ import annotations

import pytest
import torch

from tests.statistics import attention_reference as reference
from tests.statistics.attention_sources import blocks_of, causal_bias, query_key
from torchprobe.statistics import attention
from torchprobe.statistics.attention import Logits, QueryKey


def pooled(probability: torch.Tensor, tall: int, wide: int) -> torch.Tensor:
    """(heads, queries, keys): the mean over rows of the sum over keys, pixel by pixel."""
    rows = torch.stack([part.mean(1) for part in probability.split(tall, 1)], 1)
    return torch.stack([part.sum(2) for part in rows.split(wide, 2)], 2)


@pytest.mark.parametrize("block", [1, 100, 2**18])
@pytest.mark.parametrize("kind", ["full", "causal", "mask", "sinks", "logits"])
@pytest.mark.parametrize(
    ("queries", "keys", "size", "tall", "wide"),
    [(7, 9, 128, 1, 1), (16, 16, 8, 2, 2), (33, 50, 16, 3, 4), (64, 5, 16, 4, 1), (1, 40, 8, 1, 5)],
)
def test_up_to_four_rows_a_pixel_the_map_is_exact(queries, keys, size, tall, wide, kind, block):
    options = {"causal": {"causal": True}, "sinks": {"sinks": torch.tensor([0.0, 9.0, -9.0, 1.0])}}.get(kind, {})
    mask = causal_bias(queries, keys) if kind == "mask" else None
    source = query_key(3, 4, 2, queries, keys, sigma=3, mask=mask, **options)
    expected = pooled(reference.probabilities(source)[1], tall, wide)
    with blocks_of(block):
        read = Logits(reference.logits(source).float()) if kind == "logits" else source
        result = attention.attention_map(read, size, batch_index=1)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_long_sequence_is_sampled_within_each_pixel_row(seed, causal):
    source = query_key(1, 2, queries=1003, width=4, sigma=0.3, causal=causal)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    result = attention.attention_map(source, 16, generator=generator)
    expected = pooled(reference.probabilities(source)[0], 63, 63)
    assert result.shape == (2, 16, 16)
    torch.testing.assert_close(result.sum(-1), torch.ones(2, 16))
    assert (result - expected).abs().max() < (0.5 if causal else 0.05), "the first causal row is sharp, and sampled"
    assert (result - expected).abs().mean() < 0.01


def test_no_pixel_shows_a_key_after_its_queries():
    result = attention.attention_map(query_key(1, 2, queries=1000, causal=True), 10)
    assert result.triu(1).eq(0).all()
    assert result.diagonal(dim1=1, dim2=2).gt(0).all()


@pytest.mark.parametrize("queries", [8, 800])
def test_padded_rows_are_not_shown(queries):
    padding = (torch.arange(queries) >= queries // 2).expand(2, -1)
    result = attention.attention_map(query_key(queries=queries, padding=padding), 4)
    torch.testing.assert_close(result[:, :2].sum(-1), torch.ones(4, 2))
    assert result[:, 2:].eq(0).all()


def test_a_row_that_sees_nothing_or_is_not_finite_is_not_shown():
    logits = torch.randn(1, 2, 4, 6)
    logits[0, 0, 0] = torch.finfo(torch.float32).min
    logits[0, 1, 1, 2] = torch.nan
    result = attention.attention_map(Logits(logits))
    assert result.sum(-1).round(decimals=5).tolist() == [[0, 1, 1, 1], [1, 0, 1, 1]]


def test_an_empty_sequence_has_an_empty_map():
    assert attention.attention_map(Logits(torch.zeros(1, 2, 0, 5))).shape == (2, 0, 5)


def test_score_functions_see_the_index_of_the_sequence():
    source = query_key(batch=3, queries=6)
    source = QueryKey(source.query, source.key, 1.0, modify=lambda s, b, h, q, k: s.masked_fill(k > b, -torch.inf))
    assert attention.attention_map(source, batch_index=1)[..., 2:].eq(0).all()
    assert attention.attention_map(source, batch_index=1)[..., 1].gt(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 0}, "size: got 0, takes a positive"), ({"batch_index": 2}, "batch_index: got 2, takes 0 to 1")],
)
def test_wrong_arguments_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        attention.attention_map(query_key(), **options)

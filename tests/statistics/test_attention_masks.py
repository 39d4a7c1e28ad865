"""A key that a mask hides is not visible, whatever the mask is made of; rows that see nothing are left out."""

from __future__ import annotations

import math

import pytest
import torch

from tests.statistics.attention_sources import causal_bias, query_key
from torchprobe.statistics import attention
from torchprobe.statistics.attention import FIELDS, Logits, QueryKey

ROWS, WITH_CHOICE = FIELDS.index("rows"), FIELDS.index("rows_with_choice")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def computed(source: QueryKey | Logits) -> torch.Tensor:
    return attention.compute(source, "all", None)


def with_mask(source: QueryKey, mask: torch.Tensor, **options) -> QueryKey:
    return QueryKey(source.query, source.key, source.scale, mask=mask, **options)


@pytest.mark.parametrize("hidden", ["lowest", "lowest twice", "-inf", "-1e9"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_customary_masks_hide_as_causal_does(dtype, hidden):
    source = query_key(queries=9)
    bias = causal_bias(9, 9, dtype)
    values = {"lowest": bias, "lowest twice": bias + bias, "-inf": bias * math.inf}
    mask = values.get(hidden, bias.clamp(min=max(-1e9, torch.finfo(dtype).min))).masked_fill(bias == 0, 0)
    expected = computed(QueryKey(source.query, source.key, source.scale, causal=True))
    torch.testing.assert_close(computed(with_mask(source, mask)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hidden", ["lowest", "lowest twice", "-inf", "-1e9"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_so_they_do_where_they_have_been_added_to_the_logits(dtype, hidden):
    logits = (torch.randn(2, 3, 9, 9) * 30).to(dtype)
    bias = causal_bias(9, 9, dtype)
    added = {
        "lowest": logits + bias,
        "lowest twice": logits + bias + bias,
        "-inf": logits.masked_fill(bias < 0, -math.inf),
        "-1e9": logits.masked_fill(bias < 0, max(-1e9, torch.finfo(dtype).min)),
    }
    row = computed(Logits(added[hidden]))
    expected = computed(Logits(logits.double().masked_fill(bias < 0, -math.inf)))
    torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
    assert row[:, WITH_CHOICE].tolist() == [2 * 8] * 3


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_that_sees_nothing_is_left_out_though_its_softmax_is_uniform(dtype):
    mask = torch.zeros(6, 6, dtype=dtype)
    mask[2] = torch.finfo(dtype).min
    source = query_key(queries=6)
    row = computed(with_mask(source, mask))
    assert row[:, ROWS].tolist() == [10.0] * 4
    kept = [0, 1, 3, 4, 5]
    expected = computed(QueryKey(source.query[:, :, kept], source.key, source.scale))
    torch.testing.assert_close(row[:, 0], expected[:, 0])


@pytest.mark.parametrize("bias", [-100.0, -4000.0])
def test_a_mild_bias_hides_nothing(bias):
    """Swin's -100 and ALiBi at long distances: such keys take part, if with next to no probability."""
    mask = torch.zeros(1, 6).index_fill(1, torch.tensor([0]), bias)
    means = attention.summarise(computed(with_mask(query_key(queries=6), mask))[0].tolist())
    assert means["sink"] < 1e-30
    alone = computed(with_mask(query_key(queries=6), mask < 0))
    assert alone[0, ROWS] == 12
    assert alone[0, WITH_CHOICE] == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gives_what_the_shorter_sequences_give(side):
    """As in a padded batch: hidden keys, and queries that are declared padded."""
    lengths, size = (5, 8, 3), 8
    source = query_key(batch=3, queries=size, sigma=4)
    index = torch.arange(size)
    real = torch.stack([index >= size - n if side == "left" else index < n for n in lengths])
    mask = real[:, None, None] & torch.ones(size, size, dtype=torch.bool).tril()
    row = computed(with_mask(source, mask, padding=~real))
    expected = torch.zeros_like(row)
    for one, n in enumerate(lengths):
        kept = real[one].nonzero()[:, 0]
        query, key = source.query[one, None, :, kept], source.key[one, None, :, kept]
        expected = attention.combine(expected, computed(QueryKey(query, key, source.scale, causal=True)))
        assert len(kept) == n
    torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def test_left_padded_rows_that_see_nothing_need_no_declaration():
    real = torch.arange(8) >= 5
    mask = torch.where(real[None] & torch.ones(8, 8, dtype=torch.bool).tril(), 0.0, torch.finfo(torch.float32).min)
    assert computed(with_mask(query_key(batch=1, queries=8), mask))[:, ROWS].tolist() == [3.0] * 4


def test_the_sink_is_the_first_visible_key():
    logits = torch.zeros(1, 1, 2, 4)
    logits[0, 0, :, 0] = -math.inf
    logits[0, 0, :, 1] = math.log(3)
    means = attention.summarise(computed(Logits(logits))[0].tolist())
    assert means["sink"] == pytest.approx(3 / 5)
    assert means["normalized_entropy"] == pytest.approx((math.log(5) - 3 / 5 * math.log(3)) / math.log(3))


def test_every_head_has_its_own_mask():
    mask = torch.ones(1, 4, 6, 6, dtype=torch.bool)
    for head in range(4):
        mask[0, head, :, head:] = False
    row = computed(with_mask(query_key(queries=6), mask))
    assert row[:, ROWS].tolist() == [0, 12, 12, 12]
    assert row[:, WITH_CHOICE].tolist() == [0, 0, 12, 12]


def test_score_functions_see_the_indices_of_the_whole_batch():
    seen: dict[str, set[int]] = {"batch": set(), "head": set(), "query": set(), "key": set()}

    def modify(logits, batch, head, query, key):
        for name, index in zip(seen, (batch, head, query, key), strict=True):
            assert torch.broadcast_shapes(index.shape, logits.shape) == logits.shape
            seen[name] |= set(index.flatten().tolist())
        return logits

    source = query_key(batch=5, heads=4, key_heads=2, queries=8)
    for seed in range(30):
        attention.compute(
            QueryKey(source.query, source.key, 1.0, modify=modify), 3, torch.Generator().manual_seed(seed)
        )
    assert seen == {"batch": set(range(5)), "head": set(range(4)), "query": set(range(8)), "key": set(range(8))}


def test_what_a_score_function_returns_is_not_overwritten():
    table = torch.randn(1, 1, 6, 6)
    before = table.clone()
    source = query_key(queries=6)
    computed(QueryKey(source.query, source.key, 1.0, modify=lambda *_: table.expand(2, 4, 6, 6)))
    assert torch.equal(table, before)

"""Attention statistics are those of the dense float64 softmax, and merge as if the batches had been one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.statistics import attention_reference as reference
from tests.statistics.attention_sources import block_sizes, blocks_of, hand_written, query_key, query_keys
from torchprobe.statistics import attention
from torchprobe.statistics.attention import FIELDS, Logits, QueryKey, Source

MAX_LOGIT, ROWS, WITH_CHOICE = (FIELDS.index(name) for name in ("max_logit", "rows", "rows_with_choice"))


def rounding(source: Source) -> float:
    """How far a float32 product can be from the exact one: its type's rounding of the largest sum of magnitudes."""
    if isinstance(source, Logits):
        return 0.0
    query, key = (x.double().abs() for x in (source.query, source.key))
    largest = (query @ key.repeat_interleave(source.group, 1).transpose(-1, -2)).max().item() * source.scale
    return largest * torch.finfo(source.dtype).eps * 4 + 2e-7 * (0 if source.mask is None else 1000)


def assert_close(row: torch.Tensor, source: Source) -> None:
    """Counts exactly, the largest logit to rounding, entropy to 1e-4, and the other means as closely."""
    expected = reference.compute(source)
    torch.testing.assert_close(row[:, [ROWS, WITH_CHOICE]], expected[:, [ROWS, WITH_CHOICE]], rtol=0, atol=0)
    torch.testing.assert_close(row[:, MAX_LOGIT], expected[:, MAX_LOGIT], rtol=2e-7, atol=rounding(source) + 1e-9)
    counts = expected[:, [ROWS, WITH_CHOICE, ROWS, WITH_CHOICE, ROWS]].clamp(min=1)
    means = [FIELDS.index(name) for name in ("entropy", "normalized_entropy", "max_probability", "sink", "distance")]
    torch.testing.assert_close(row[:, means] / counts, expected[:, means] / counts, rtol=0, atol=1e-4)
    assert (row[:, :MAX_LOGIT] >= 0).all()


@given(source=query_keys(), block=block_sizes())
@settings(max_examples=100, deadline=None)
def test_statistics_are_those_of_the_dense_softmax(source, block):
    with blocks_of(block):
        assert_close(attention.compute(source, 512, None), source)


@given(source=hand_written(), block=block_sizes())
@settings(max_examples=80, deadline=None)
def test_so_are_those_of_hand_written_logits(source, block):
    with blocks_of(block):
        assert_close(attention.compute(source, 512, None), source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [1, 10, 40])
def test_entropy_of_long_rows_is_within_1e_4(sigma, dtype):
    source = query_key(batch=1, heads=2, queries=40, keys=3000, width=64, sigma=sigma, dtype=dtype)
    rows = [attention.compute(QueryKey(q[None, :, None], source.key, source.scale), "all", None)[:, 0]
            for q in source.query[0].unbind(1)]  # fmt: skip
    expected = reference.rows(source)["entropy"][0].T
    torch.testing.assert_close(torch.stack(rows), expected, rtol=0, atol=1e-4)


def test_float64_inputs_are_computed_in_float64():
    source = query_key(dtype=torch.float64, sigma=40, causal=True)
    torch.testing.assert_close(attention.compute(source, "all", None), reference.compute(source), rtol=1e-12, atol=0)


@given(source=st.one_of(query_keys(), hand_written()), block=block_sizes())
@settings(max_examples=60, deadline=None)
def test_streaming_all_rows_is_the_same_as_all_rows_at_once(source, block):
    expected = attention.compute(source, 10**6, None)
    assert torch.equal(attention.compute(source, "all", None), expected)
    with blocks_of(block):
        torch.testing.assert_close(attention.compute(source, "all", None), expected, rtol=1e-5, atol=1e-4)


def test_entropy_is_zero_and_not_negative_where_one_key_takes_all():
    key = torch.zeros(1, 1, 1000, 4)
    key[0, 0, 7] = 1.0
    row = attention.compute(QueryKey(torch.full((1, 1, 3, 4), 1e4), key, 1.0), "all", None)[0]
    assert 0 <= row[0] < 1e-25
    assert attention.summarise(row.tolist())["max_probability"] == 1


def test_uniform_attention_has_the_entropy_of_the_visible_keys():
    source = QueryKey(torch.zeros(1, 1, 4, 8), torch.randn(1, 1, 4, 8), 1.0, causal=True)
    means = attention.summarise(attention.compute(source, "all", None)[0].tolist())
    assert means == pytest.approx({
        "entropy": math.log(24) / 4,
        "normalized_entropy": 1.0,
        "max_probability": (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4,
        "max_logit": 0.0,
        "sink": (1 / 2 + 1 / 3 + 1 / 4) / 3,
        "distance": (0 + 1 / 2 + 1 + 3 / 2) / 4,
        "rows": 4.0,
        "rows_with_choice": 3.0,
    })  # fmt: skip


def test_the_largest_logit_is_signed():
    source = QueryKey(torch.full((1, 1, 2, 1), -3.0), torch.ones(1, 1, 5, 1), 2.0)
    assert attention.compute(source, "all", None)[0, MAX_LOGIT] == -6


def test_sink_logits_take_probability_and_are_no_key():
    source = query_key(queries=6, sinks=torch.tensor([-50.0, 0.0, 3.0, 200.0]))
    probability = reference.probabilities(source)
    row = attention.compute(source, "all", None)
    assert_close(row, source)
    assert probability.sum(-1)[0, 2].max() < 1
    assert row[3, 0] == pytest.approx(0, abs=1e-6), "all went to the sink"
    assert row[3, MAX_LOGIT] < 10, "the sink's own logit is no key's"


@given(sources=st.lists(query_keys(), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_combined_rows_are_the_row_of_the_concatenation(sources):
    heads = min(source.shape.heads for source in sources)
    row = torch.zeros(heads, len(FIELDS), dtype=torch.float64)
    for source in sources:
        row = attention.combine(row, attention.compute(source, 512, None)[:heads])
    expected = torch.stack([reference.compute(source)[:heads] for source in sources])
    torch.testing.assert_close(row[:, ROWS], expected[:, :, ROWS].sum(0))
    torch.testing.assert_close(row[:, 0], expected[:, :, 0].sum(0), rtol=0, atol=1e-4 * (1 + row[:, ROWS].max().item()))
    some = torch.where(expected[:, :, ROWS] > 0, expected[:, :, MAX_LOGIT], -math.inf).amax(0)
    torch.testing.assert_close(row[:, MAX_LOGIT], some.where(some > -math.inf, 0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sizes", [(1, 2), (3, 1, 2), (1, 5, 1)])
def test_micro_batches_of_unequal_size_combine_to_the_whole_batch(sizes):
    whole = query_key(batch=sum(sizes), causal=True, sigma=5)
    row = torch.zeros(4, len(FIELDS), dtype=torch.float64)
    for query, key in zip(whole.query.split(sizes), whole.key.split(sizes), strict=True):
        row = attention.combine(row, attention.compute(QueryKey(query, key, whole.scale, causal=True), "all", None))
    torch.testing.assert_close(row, attention.compute(whole, "all", None), rtol=1e-6, atol=1e-6)


def test_a_negative_largest_logit_survives_combining_with_nothing():
    row = attention.compute(QueryKey(torch.ones(1, 1, 2, 1), -torch.ones(1, 1, 5, 1), 2.0), "all", None)
    nothing = torch.zeros(1, len(FIELDS), dtype=torch.float64)
    assert torch.equal(attention.combine(row, nothing), row)
    assert torch.equal(attention.combine(nothing, row), row)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_whose_softmax_would_be_nan_is_left_out(bad):
    logits = torch.randn(1, 2, 6, 5)
    logits[0, 0, 3, 2] = bad
    row = attention.compute(Logits(logits), "all", None)
    assert row[:, ROWS].tolist() == [5, 6]
    others = torch.cat((logits[:, :1, :3], logits[:, :1, 4:]), 2)
    expected = attention.compute(Logits(others), "all", None)[0]
    assert row[0, 0] == pytest.approx(expected[0].item(), rel=1e-6)
    assert row.isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing_to_look_at_gives_zeros(sizes):
    assert torch.equal(attention.compute(Logits(torch.zeros(sizes)), 512, None), torch.zeros(2, 8, dtype=torch.float64))


def test_a_head_without_a_valid_row_has_counts_alone():
    assert attention.summarise([0.0] * len(FIELDS)) == {"rows": 0.0, "rows_with_choice": 0.0}


def test_a_head_whose_rows_see_one_key_has_no_sink():
    row = attention.compute(query_key(queries=5, keys=1), "all", None)[0]
    assert sorted(attention.summarise(row.tolist())) == [
        "distance", "entropy", "max_logit", "max_probability", "rows", "rows_with_choice"
    ]  # fmt: skip


QUERY, KEY = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QueryKey(QUERY[0], KEY, 1.0), r"query: got torch.float32 of shape \(4, 5, 8\), takes \(batch, heads"),
        (lambda: QueryKey(QUERY, KEY[:1], 1.0), r"key: .* takes \(2, key_heads, keys, 8\)"),
        (lambda: QueryKey(QUERY[:, :3], KEY, 1.0), "key: .* divides the query's 3"),
        (lambda: QueryKey(QUERY, KEY, 1.0, mask=torch.zeros(5, 6)), r"mask: .*broadcasts to \(2, 4, 5, 7\)"),
        (lambda: QueryKey(QUERY, KEY, 1.0, mask=torch.zeros(5, 7).int()), "mask: got torch.int32"),
        (lambda: QueryKey(QUERY, KEY, 1.0, padding=torch.zeros(2, 7).bool()), r"padding: .*takes bool \(2, 5\)"),
        (lambda: QueryKey(QUERY, KEY, 1.0, sinks=torch.zeros(2)), r"sinks: .*takes \(4,\)"),
        (lambda: Logits(QUERY[0]), "logits: .*batch, heads, queries, keys"),
        (lambda: attention.compute(Logits(QUERY), 0, None), 'rows: got 0, takes "all" or a positive'),
        (lambda: attention.compute(Logits(QUERY), "some", None), "rows: got 'some'"),
        (lambda: attention.compute(Logits(QUERY), True, None), "rows: got True"),
        (lambda: attention.summarise([1.0]), "row: got 1 numbers, takes 8"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()

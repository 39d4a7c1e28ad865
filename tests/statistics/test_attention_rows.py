"""A sample of query rows is spread over all sequences and positions, and its means are unbiased."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.statistics import attention_reference as reference
from tests.statistics.attention_sources import block_sizes, blocks_of, causal_bias, query_key
from torchprobe.statistics import attention
from torchprobe.statistics.attention import FIELDS, Logits, QueryKey
from torchprobe.statistics.attention.rows import choose

ROWS = FIELDS.index("rows")


def private(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform_causal(batch: int, queries: int) -> QueryKey:
    """Query i attends equally to keys 0 … i: its entropy is log(i + 1)."""
    return QueryKey(torch.zeros(batch, 1, queries, 2), torch.zeros(batch, 1, queries, 2), 1.0, causal=True)


def mean(row: torch.Tensor, name: str = "entropy") -> float:
    return attention.summarise(row[0].tolist())[name]


@pytest.mark.parametrize(
    ("batch", "queries", "rows", "sampled"),
    [(2, 256, 512, False), (2, 257, 512, True), (1, 8, 4, True), (600, 1, 512, True), (9, 999, "all", False)],
)
def test_it_is_sampled_where_there_are_more_rows_than_asked_for(batch, queries, rows, sampled):
    source = Logits(torch.zeros(batch, 1, queries, 1))
    assert attention.is_sampled(source, rows) is sampled
    read = attention.compute(source, rows, private())[0, ROWS].item()
    assert (read < batch * queries) is sampled


@pytest.mark.parametrize(
    ("batch", "rows", "read"), [(1, 100, 100), (8, 64, 64), (3, 64, 63), (100, 64, 64), (64, 64, 64)]
)
def test_as_many_rows_are_read_as_asked_for_or_a_few_less(batch, rows, read):
    source = Logits(torch.zeros(batch, 2, 300, 1))
    assert attention.compute(source, rows, private())[:, ROWS].tolist() == [read, read]


@given(queries=st.integers(2, 400), share=st.floats(0.01, 1.0), batch=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_every_stratum_of_every_sequence_gives_a_row(queries, share, batch, seed):
    each = max(1, int(queries * share) - 1)
    chosen = choose(Logits(torch.zeros(batch, 1, queries, 1)), batch * each, private(seed)).queries
    stratum = torch.arange(each)
    low, high = stratum * queries // each, ((stratum + 1) * queries + each - 1) // each
    assert chosen.shape == (batch, each)
    assert ((chosen >= low) & (chosen < high)).all()


@pytest.mark.parametrize(("queries", "rows"), [(10, 3), (10, 7), (7, 5), (1000, 1)])
def test_every_row_is_as_likely_as_every_other(queries, rows):
    source, trials = Logits(torch.zeros(1, 1, queries, 1)), 4000
    chosen = torch.cat([choose(source, rows, private(seed)).queries.flatten() for seed in range(trials)])
    frequency = torch.bincount(chosen, minlength=queries) / trials
    share = rows / queries
    assert (frequency - share).abs().max() < 5 * math.sqrt(share / trials)


def test_every_sequence_is_as_likely_as_every_other_where_there_are_more_than_rows():
    source, trials = Logits(torch.zeros(10, 1, 5, 1)), 4000
    chosen = [choose(source, 4, private(seed)) for seed in range(trials)]
    sequences = torch.bincount(torch.cat([rows.sequences for rows in chosen]), minlength=10) / trials
    queries = torch.bincount(torch.cat([rows.queries.flatten() for rows in chosen]), minlength=5) / trials
    assert (sequences - 0.4).abs().max() < 5 * math.sqrt(0.4 / trials)
    assert (queries - 0.8).abs().max() < 5 * math.sqrt(0.8 / trials)


@pytest.mark.parametrize(("batch", "queries", "rows"), [(1, 64, 8), (1, 100, 7), (3, 50, 8), (20, 30, 7)])
def test_a_sampled_mean_is_unbiased(batch, queries, rows):
    """Every k-th row from the first would be too low: the entropy of causal attention grows with the position."""
    source = uniform_causal(batch, queries)
    exact = sum(map(math.log, range(1, queries + 1))) / queries
    means = torch.tensor([mean(attention.compute(source, rows, private(seed))) for seed in range(300)])
    error, standard_error = (means.mean() - exact).item(), (means.std() / math.sqrt(len(means))).item()
    assert abs(error) < 4 * standard_error + 1e-6
    strided = [math.log(i + 1) for i in range(0, queries, -(-queries // max(1, rows // batch)))]
    assert exact - sum(strided) / len(strided) > 8 * standard_error


def test_a_sample_over_sequences_that_differ_is_close():
    """One sequence attends to one key, the others to all of them: rows of a single sequence would be off by nats."""
    source = query_key(batch=8, heads=2, queries=256, width=16, causal=True)
    source = QueryKey(source.query * torch.linspace(0, 20, 8)[:, None, None, None], source.key, 1.0, causal=True)
    exact = mean(attention.compute(source, "all", None))
    errors = [abs(mean(attention.compute(source, 128, private(seed))) - exact) for seed in range(20)]
    assert max(errors) < 0.15
    assert sum(errors) / len(errors) < 0.05


@given(seed=st.integers(0, 999), block=block_sizes(), kind=st.sampled_from(("causal", "mask", "head mask", "logits")))
@settings(max_examples=60, deadline=None)
def test_sampled_rows_have_the_values_of_those_rows(seed, block, kind):
    """Whatever the blocks: against the dense rows that were chosen."""
    batch, queries = 3, 30
    head_mask = torch.rand(1, 4, queries, queries, generator=private(seed)) > 0.5
    mask = {"mask": causal_bias(queries, queries), "head mask": head_mask}.get(kind)
    source = query_key(batch, 4, 2, queries, seed=seed, sigma=3, mask=mask, causal=kind == "causal")
    of = reference.rows(source)
    chosen = choose(source, 20, private(seed)).queries
    taken = {name: x.gather(2, chosen[:, None].expand(-1, 4, -1)) for name, x in of.items()}
    read = Logits(reference.logits(source).float()) if kind == "logits" else source
    with blocks_of(block):
        row = attention.compute(read, 20, private(seed))
    entropy = torch.where(taken["valid"], taken["entropy"], 0).sum((0, 2))
    torch.testing.assert_close(row[:, 0], entropy, rtol=1e-5, atol=1e-4)
    assert row[:, ROWS].tolist() == taken["valid"].sum((0, 2)).tolist()


def test_with_more_sequences_than_rows_the_chosen_ones_are_read():
    logits = torch.arange(40.0)[:, None, None, None].expand(40, 2, 6, 3)  # the largest logit names the sequence
    seen = {attention.compute(Logits(logits), 1, private(seed))[0, 3].item() for seed in range(60)}
    assert seen <= set(range(40))
    assert len(seen) > 20


def test_the_largest_logit_of_a_sample_is_a_lower_bound():
    source = query_key(queries=200, sigma=5)
    exact = attention.compute(source, "all", None)[:, 3]
    for seed in range(10):
        assert (attention.compute(source, 16, private(seed))[:, 3] <= exact + 1e-5).all()


def test_padded_rows_of_a_sample_are_left_out():
    padding = torch.arange(100) >= torch.tensor([[40], [90]])
    source = uniform_causal(2, 100)
    source = QueryKey(source.query, source.key, 1.0, causal=True, padding=padding)
    exact = mean(attention.compute(source, "all", None))
    rows = [attention.compute(source, 40, private(seed)) for seed in range(100)]
    assert all(row[0, ROWS] < 40 for row in rows)
    assert sum(map(mean, rows)) / len(rows) == pytest.approx(exact, abs=0.02)


def test_the_same_seed_gives_the_same_rows_and_another_other_ones():
    source = query_key(queries=100)
    rows = [attention.compute(source, 8, private(seed)) for seed in (1, 1, 2)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_without_a_generator_the_rows_are_always_the_same():
    source = query_key(queries=100)
    assert torch.equal(attention.compute(source, 8, None), attention.compute(source, 8, None))

"""AUROC of in- against out-of-distribution scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.statistics import separation

scores = st.lists(st.one_of(st.floats(0, 3, width=16), st.sampled_from((0.0, 1.0, math.nan, math.inf, 1e30, -1.0))))
dtypes = st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64))


@given(inside=scores, outside=scores, dtype=dtypes)
@settings(max_examples=200, deadline=None)
def test_auroc_is_the_share_of_pairs(inside, outside, dtype):
    tensors = [torch.tensor(x, dtype=torch.float64).to(dtype) for x in (inside, outside)]
    row = separation.compute(*tensors)
    assert len(row) == len(separation.FIELDS)
    low, high = ([v for v in x.double().tolist() if math.isfinite(v)] for x in tensors)
    wins = sum((b > a) + (b == a) / 2 for a in low for b in high)
    found = separation.summarise(row.numpy())
    assert (found["count_in"], found["count_out"]) == (len(low), len(high))
    assert found["nonfinite_in"] == len(inside) - len(low)
    assert found["nonfinite_out"] == len(outside) - len(high)
    if low and high:
        assert found["auroc"] == pytest.approx(wins / (len(low) * len(high)))
    else:
        assert "auroc" not in found
    histograms = separation.histograms(row)
    assert {side: counts.sum() for side, (_, counts) in histograms.items()} == {
        side: len(values) for side, values in (("in", low), ("out", high)) if values
    }


def test_chance_and_certainty():
    x = torch.randn(1000)
    assert separation.summarise(separation.compute(x, x))["auroc"] == 0.5
    assert separation.summarise(separation.compute(x, x + 100))["auroc"] == 1.0
    assert separation.summarise(separation.compute(x + 100, x))["auroc"] == 0.0


def test_agrees_with_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification", reason="needs torchmetrics")
    inside, outside = torch.rand(300), torch.rand(200) + 0.3
    labels = torch.cat((torch.zeros(300), torch.ones(200))).long()
    scores = torch.cat((inside, outside)) / 2
    expected = torchmetrics.binary_auroc(scores, labels).item()
    assert separation.summarise(separation.compute(inside, outside))["auroc"] == pytest.approx(expected, abs=1e-6)


@given(
    inside=st.lists(st.integers(0, 9), min_size=5, max_size=5),
    outside=st.lists(st.integers(0, 9), min_size=5, max_size=5),
)
def test_counts_are_scores_that_tie_within_a_bucket(inside, outside):
    found = separation.auroc_of_counts(np.array(inside, float), np.array(outside, float))
    vectors = [torch.arange(5.0).repeat_interleave(torch.tensor(counts)) for counts in (inside, outside)]
    expected = separation.summarise(separation.compute(*vectors)).get("auroc")
    assert found == (None if expected is None else pytest.approx(expected))


def test_scores_of_integers_are_refused():
    with pytest.raises(TypeError, match=r"out_scores: got a tensor of torch.int64, takes a floating one"):
        separation.compute(torch.ones(2), torch.ones(2).long())

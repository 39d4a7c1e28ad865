"""AUROC of in- against out-of-distribution scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.statistics import out_of_distribution

scores = st.lists(st.one_of(st.floats(0, 3, width=16), st.sampled_from((0.0, 1.0, math.nan, math.inf, 1e30, -1.0))))
dtypes = st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64))


@given(inside=scores, outside=scores, dtype=dtypes)
@settings(max_examples=200, deadline=None)
def test_auroc_is_the_share_of_pairs(inside, outside, dtype):
    tensors = [torch.tensor(x, dtype=torch.float64).to(dtype) for x in (inside, outside)]
    row = out_of_distribution.compute(*tensors)
    assert len(row) == len(out_of_distribution.FIELDS)
    low, high = ([v for v in x.double().tolist() if math.isfinite(v)] for x in tensors)
    wins = sum((b > a) + (b == a) / 2 for a in low for b in high)
    found = out_of_distribution.summarise(row.numpy())
    assert (found["count_in"], found["count_out"]) == (len(low), len(high))
    assert found["nonfinite_in"] == len(inside) - len(low)
    assert found["nonfinite_out"] == len(outside) - len(high)
    if low and high:
        assert found["auroc"] == pytest.approx(wins / (len(low) * len(high)))
    else:
        assert "auroc" not in found
    histograms = out_of_distribution.histograms(row)
    assert {side: counts.sum() for side, (_, counts) in histograms.items()} == {
        side: len(values) for side, values in (("in", low), ("out", high)) if values
    }


def test_chance_and_certainty():
    x = torch.randn(1000)
    assert out_of_distribution.summarise(out_of_distribution.compute(x, x))["auroc"] == 0.5
    assert out_of_distribution.summarise(out_of_distribution.compute(x, x + 100))["auroc"] == 1.0
    assert out_of_distribution.summarise(out_of_distribution.compute(x + 100, x))["auroc"] == 0.0


def test_agrees_with_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification", reason="needs torchmetrics")
    inside, outside = torch.rand(300), torch.rand(200) + 0.3
    labels = torch.cat((torch.zeros(300), torch.ones(200))).long()
    scores = torch.cat((inside, outside)) / 2
    expected = torchmetrics.binary_auroc(scores, labels).item()
    summary = out_of_distribution.summarise(out_of_distribution.compute(inside, outside))
    assert summary["auroc"] == pytest.approx(expected, abs=1e-6)


def test_scores_of_integers_are_refused():
    with pytest.raises(TypeError, match=r"out_scores: got a tensor of torch.int64, takes a floating one"):
        out_of_distribution.compute(torch.ones(2), torch.ones(2).long())

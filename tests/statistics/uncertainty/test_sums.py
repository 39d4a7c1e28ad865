"""Rows of many examples: exact counts, and parts that merge to the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.statistics import uncertainty
from torchprobe.statistics.uncertainty import Decomposition

values = st.lists(
    st.one_of(
        st.floats(0, 10, width=32),
        st.sampled_from((0.0, -0.5, 1e-20, 1e30, math.nan, math.inf, -math.inf, 2.0**-40, 2.0**24, 1e-45)),
    ),
    max_size=40,
)
dtypes = st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64))


@given(numbers=values, dtype=dtypes, kind=st.sampled_from(uncertainty.KINDS))
@settings(max_examples=200, deadline=None)
def test_a_row_counts_every_example_once(numbers, dtype, kind):
    x = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    row = uncertainty.compute(Decomposition(None, None, None)._replace(**{kind: x})).numpy()
    finite = [value for value in x.double().tolist() if math.isfinite(value)]
    found = uncertainty.summarise(row)
    if finite:
        assert found[kind] == pytest.approx(math.fsum(finite) / len(finite), rel=1e-12)
    else:
        assert kind not in found
    assert found.get(f"{kind}_nonfinite", 0) == len(x) - len(finite)
    assert all(name.startswith(kind) for name in found)
    edges, counts = uncertainty.histograms(row).get(kind, (None, np.zeros(1)))
    assert counts.sum() == sum(value > 0 for value in finite)
    if edges is not None:
        assert_between(np.log10([value for value in finite if value > 0]), edges, counts)


def assert_between(logs: np.ndarray, edges: np.ndarray, counts: np.ndarray) -> None:
    """As many below each inner edge as there are, give or take those within rounding of it."""
    for edge, below in zip(edges[1:-1], np.cumsum(counts)[:-1], strict=True):
        assert (logs < edge - 1e-9).sum() <= below <= (logs < edge + 1e-9).sum()


@given(parts=st.lists(values, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_unequal_parts_merge_to_the_whole(parts):
    tensors = [torch.tensor(part, dtype=torch.float32) for part in parts]

    def row(x: torch.Tensor) -> torch.Tensor:
        return uncertainty.compute(Decomposition(x, None, 2 * x))

    merged = row(tensors[0])
    for part in tensors[1:]:
        merged = uncertainty.combine(merged, row(part))
    torch.testing.assert_close(merged, row(torch.cat(tensors)), rtol=1e-12, atol=0)


@given(numbers=values, seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_examples_that_are_not_among_them_do_not_count(numbers, seed):
    x = torch.tensor(numbers, dtype=torch.float32)
    among = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) < 0.5
    row, expected = (
        uncertainty.compute(*given)
        for given in ((Decomposition(x, 2 * x, None), among), (Decomposition(x[among], 2 * x[among], None),))
    )
    torch.testing.assert_close(row, expected, rtol=1e-12, atol=0, equal_nan=True)


def test_nothing_is_no_decomposition():
    with pytest.raises(ValueError, match="got None for total, aleatoric and epistemic"):
        uncertainty.compute(Decomposition(None, None, None))
    with pytest.raises(ValueError, match=r"row: got shape \(3,\)"):
        uncertainty.summarise([1.0, 2.0, 3.0])


def test_all_nan_is_counted_and_has_no_mean():
    row = uncertainty.compute(uncertainty.classification(torch.full((2, 5, 3), math.nan)))
    assert uncertainty.summarise(row) == {f"{kind}_nonfinite": 5.0 for kind in uncertainty.KINDS}
    assert uncertainty.histograms(row) == {}


def test_the_row_is_as_long_as_its_fields():
    assert len(uncertainty.compute(Decomposition(torch.ones(2), None, None))) == len(uncertainty.FIELDS)
    assert len(set(uncertainty.FIELDS)) == len(uncertainty.FIELDS)
    assert len(uncertainty.edges()) == (len(uncertainty.FIELDS) - 12) // 3 + 1

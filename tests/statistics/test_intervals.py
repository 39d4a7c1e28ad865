"""Coverage and PIT of Gaussian predictions."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.statistics import intervals

numbers = st.one_of(st.floats(-5, 5, width=32), st.sampled_from((math.nan, math.inf, 0.0, 1e30, -1e30, 1e-30)))


def twin(mean: float, variance: float, target: float) -> tuple[bool, bool, int] | None:
    """Inside the 50 % and the 90 % interval, and the bin of the PIT; None for what is no prediction."""
    if not (variance > 0 and all(map(math.isfinite, (mean, variance, target)))):
        return None
    score = (target - mean) / math.sqrt(variance)
    place = NormalDist().cdf(score)
    return *(abs(score) <= NormalDist().inv_cdf(0.5 + level / 2) for level in (0.5, 0.9)), min(int(place * 20), 19)


@given(
    rows=st.lists(st.tuples(numbers, numbers, numbers), max_size=30),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
)
@settings(max_examples=200, deadline=None)
def test_a_row_is_that_of_the_twins(rows, dtype):
    columns = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).to(dtype)
    row = intervals.compute(*columns.unbind(-1))
    twins = [twin(*example) for example in columns.double().tolist()]
    judged = [example for example in twins if example is not None]
    pit = [0] * 20
    for *_, place in judged:
        pit[place] += 1
    inside = [sum(example[i] for example in judged) for i in (0, 1)]
    assert row.tolist() == [len(judged), *inside, len(twins) - len(judged), *pit]


def test_right_predictions_cover_what_they_promise_and_have_an_even_pit():
    target = 3 + 2 * torch.randn(100_000)
    row = intervals.compute(torch.full((100_000,), 3.0), torch.tensor(4.0), target).numpy()
    found = intervals.summarise(row)
    assert found["coverage_50"] == pytest.approx(0.5, abs=0.01)
    assert found["coverage_90"] == pytest.approx(0.9, abs=0.01)
    edges, counts = intervals.pit_histogram(row)
    assert counts.sum() == found["count"] == 100_000
    assert counts == pytest.approx([5000] * 20, rel=0.08)
    assert (edges[0], edges[-1], len(edges)) == (0, 1, 21)


@given(cut=st.integers(0, 20))
def test_unequal_parts_merge_to_the_whole(cut):
    mean, variance, target = torch.randn(20), torch.rand(20), torch.randn(20)
    parts = [intervals.compute(mean[s], variance[s], target[s]) for s in (slice(0, cut), slice(cut, None))]
    assert torch.equal(intervals.combine(*parts), intervals.compute(mean, variance, target))


def test_without_an_example_there_is_no_coverage():
    row = intervals.compute(torch.ones(2), torch.zeros(2), torch.ones(2))
    assert intervals.summarise(row) == {"count": 0, "invalid": 2}


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got shapes \(2,\), \(2,\), \(3,\), takes shapes that broadcast"):
        intervals.compute(torch.ones(2), torch.ones(2), torch.ones(3))
    with pytest.raises(TypeError, match=r"variance: got a tensor of torch.int64"):
        intervals.compute(torch.ones(2), torch.ones(2).long(), torch.ones(2))

"""Every example is judged as its twin is, whatever the task, the type and the strides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.statistics.calibration import reference
from tests.statistics.calibration.reference import Example
from tests.statistics.predictions import DTYPES, logits, probabilities
from torchprobe.statistics import calibration

pieces = st.sampled_from((1, 16, 2**18))


def assert_like(row: torch.Tensor, examples: Sequence[Example | None], ignored: int = 0) -> None:
    judged = [example for example in examples if example is not None]
    found = calibration.summarise(row.numpy())
    assert (found["count"], found["ignored"]) == (len(judged), ignored)
    assert found["invalid"] == len(examples) - len(judged)
    if not judged:
        assert set(found) == {"count", "ignored", "invalid"}
        assert calibration.reliability(row) == calibration.risk_coverage(row) == {}
        return
    for name in ("confidence", "brier", "nll"):
        mean = math.fsum(getattr(example, name) for example in judged) / len(judged)
        assert found[name] == pytest.approx(mean, rel=2e-5, abs=2e-5), name


def tie_free(rows: list[list[float]]) -> bool:
    """Whether the largest entry of each row stands out, so that rounding does not decide which it is."""
    tops = [sorted(row)[-2:] for row in rows if len(row) > 1]
    return all(math.isnan(a - b) or b - a > 1e-3 * (1 + abs(b)) for a, b in tops)


@given(p=st.one_of(probabilities(), logits()), from_logits=st.booleans(), piece=pieces, seed=st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_class_numbers(p, from_logits, piece, seed, in_chunks_of):
    classes = p.size(-1)
    if classes == 1:
        return  # a binary task
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, classes + 1, p.shape[:-1], generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    with in_chunks_of(piece):
        row = calibration.compute(p, targets, from_logits=from_logits)
    rows, named = p.double().reshape(-1, classes).tolist(), targets.flatten().tolist()
    examples = [
        reference.judge(x, reference.one_hot(k, classes), from_logits)
        for x, k in zip(rows, named, strict=True)
        if k != -100
    ]
    assert_like(row, examples, named.count(-100))
    assert_bins(row, examples)
    if tie_free(rows):
        judged = [example for example in examples if example is not None]
        assert calibration.summarise(row).get("accuracy", 0) * len(judged) == pytest.approx(
            sum(example.correct for example in judged)
        )


def assert_bins(row: torch.Tensor, examples: Sequence[Example | None]) -> None:
    """Counts in the bins, but for confidences within rounding of an edge."""
    curve = calibration.reliability(row)
    judged = [example.confidence for example in examples if example is not None]
    for lower, upper, count in zip(*(curve.get(k, ()) for k in ("lower", "upper", "count")), strict=True):
        top = 2.0 if upper == 1 else upper
        sure = sum(lower + 1e-5 <= c < top - 1e-5 for c in judged)
        perhaps = sum(lower - 1e-5 <= c < top + 1e-5 for c in judged)
        assert sure <= count <= perhaps


@given(p=st.one_of(probabilities(), logits()), from_logits=st.booleans(), piece=pieces, seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_soft_labels(p, from_logits, piece, seed, in_chunks_of):
    if p.size(-1) == 1 or p.dim() == 1:
        return  # a binary task
    generator = torch.Generator().manual_seed(seed)
    targets = (3 * torch.randn(p.shape, generator=generator)).softmax(dim=-1)
    targets[torch.rand(p.shape, generator=generator) < 0.05] = math.nan
    with in_chunks_of(piece):
        row = calibration.compute(p, targets, from_logits=from_logits)
    rows = p.double().reshape(-1, p.size(-1)).tolist()
    goals = targets.to(torch.float64 if p.dtype == torch.float64 else torch.float32).reshape(-1, p.size(-1)).tolist()
    examples = [reference.judge(x, y, from_logits) for x, y in zip(rows, goals, strict=True)]
    answers = not from_logits and reference.are_answers(rows)
    assert_like(row, [None] * len(rows) if answers else examples)


@given(
    odds=st.lists(st.floats(-30, 30) | st.sampled_from((math.nan, math.inf, 1e4, -1e4, 0.0)), max_size=30),
    dtype=st.sampled_from(DTYPES),
    from_logits=st.booleans(),
    column=st.booleans(),
    piece=pieces,
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_binary_tasks(odds, dtype, from_logits, column, piece, seed, in_chunks_of):
    x = torch.tensor(odds, dtype=torch.float64)
    x = (x if from_logits else x.sigmoid()).to(dtype)
    targets = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed))
    targets[::5] = -100
    with in_chunks_of(piece):
        row = calibration.compute(x[:, None] if column else x, targets, from_logits=from_logits)
    pairs = [(score, y) for score, y in zip(x.double().tolist(), targets.tolist(), strict=True) if y != -100]
    examples = [binary(score, y, from_logits) for score, y in pairs]
    assert_like(row, examples, int((targets == -100).sum()))


def binary(score: float, y: int, from_logits: bool) -> Example | None:
    if math.isinf(score):  # sure, though its softmax with 0 has no value
        score, from_logits = float(score > 0), False
    row = [0.0, score] if from_logits else [1 - score, score]
    return reference.judge(row, [1.0 - y, float(y)], from_logits)


def test_two_classes_are_the_binary_task_of_the_second():
    x = torch.randn(50)
    y = torch.bernoulli(x.sigmoid()).long()
    binary = calibration.compute(x, y, from_logits=True)
    classes = calibration.compute(torch.stack((torch.zeros(50), x), dim=-1), y, from_logits=True)
    torch.testing.assert_close(binary, classes)


@given(p=logits(), cut=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_unequal_parts_merge_to_the_whole(p, cut, seed):
    p = p.reshape(-1, p.size(-1))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, p.size(-1), p.shape[:-1], generator=generator)
    doubt = torch.rand(len(p), generator=generator)
    at = int(cut * len(p))
    whole, *parts = (
        calibration.compute(p[part], targets[part], from_logits=True, uncertainty=doubt[part])
        for part in (slice(None), slice(0, at), slice(at, None))
    )
    # Counts exactly; the softmax of a row of float32 may round otherwise beside other rows.
    torch.testing.assert_close(calibration.combine(*parts), whole, rtol=1e-6, atol=1e-6)


def test_a_sequence_task_wants_its_classes_last():
    logits_of_tokens, targets = torch.randn(2, 7, 5), torch.randint(7, (2, 5))
    with pytest.raises(ValueError, match=r"takes \(2, 7\) class numbers .* predictions.movedim\(1, -1\)"):
        calibration.compute(logits_of_tokens, targets)
    found = calibration.summarise(calibration.compute(logits_of_tokens.movedim(1, -1), targets, from_logits=True))
    expected = torch.nn.functional.cross_entropy(logits_of_tokens, targets)
    assert found["nll"] == pytest.approx(expected.item(), rel=1e-6)


def test_predictions_that_are_no_probabilities_are_counted_not_believed():
    row = calibration.compute(torch.randn(10, 4) * 5, torch.randint(4, (10,)))
    assert calibration.summarise(row) == {"count": 0, "ignored": 0, "invalid": 10}


def test_other_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"uncertainty: got shape \(3,\), takes a number for each of 2"):
        calibration.compute(torch.ones(2, 2) / 2, torch.zeros(2).long(), uncertainty=torch.ones(3))
    with pytest.raises(TypeError, match=r"predictions: got a tensor of torch.int64"):
        calibration.compute(torch.ones(2, 2).long(), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"targets: got shape \(3,\) for predictions of shape \(2, 2\)"):
        calibration.compute(torch.ones(2, 2), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"row: got shape \(2,\)"):
        calibration.summarise([1.0, 2.0])


@pytest.mark.parametrize("piece", [1, 2**18])
def test_the_likeliest_class_may_be_handed_in(piece, monkeypatch):
    from torchprobe.statistics import dtypes

    monkeypatch.setattr(dtypes, "CPU_CHUNK", piece)
    p = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    targets = torch.arange(24).view(4, 6) % 9
    assert calibration.compute(p, targets, favourite=p.argmax(-1)).equal(calibration.compute(p, targets))
    other = calibration.compute(p, targets, favourite=p.argmin(-1))
    assert calibration.summarise(other.numpy())["confidence"] < 1 / 9

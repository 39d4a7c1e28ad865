"""What a row says: errors, curves, and where peers say something else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.statistics.calibration import reference
from torchprobe.statistics import calibration, out_of_distribution


def predictions(seed: int, n: int = 3000, classes: int = 6, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities sharper than the classes are drawn from: over-confident."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(x.softmax(dim=-1), 1, generator=generator)[:, 0]
    return (1.6 * x).softmax(dim=-1), targets


def examples_of(p: torch.Tensor, targets: torch.Tensor) -> list[reference.Example]:
    rows = zip(p.double().tolist(), targets.tolist(), strict=True)
    return [reference.judge(row, reference.one_hot(k, len(row)), False) for row, k in rows]


@given(seed=st.integers(0, 10**6), n=st.integers(1, 400), scale=st.sampled_from((0.1, 1.0, 5.0, 40.0)))
@settings(max_examples=60, deadline=None)
def test_errors_are_those_of_the_twin(seed, n, scale):
    p, targets = predictions(seed, n, scale=scale)
    found = calibration.summarise(calibration.compute(p, targets))
    examples = examples_of(p, targets)
    assert found["ece"] == pytest.approx(reference.ece(examples), abs=1e-9)
    assert found["mce"] == pytest.approx(reference.mce(examples), abs=1e-9)
    assert found["confidence_gap"] == pytest.approx(reference.gap(examples), abs=1e-9)
    assert found["confidence_gap"] == pytest.approx(found["confidence"] - found["accuracy"])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
def test_adaptive_ece_is_near_that_of_sorted_examples(seed, scale):
    p, targets = predictions(seed, scale=scale)
    found = calibration.summarise(calibration.compute(p, targets))
    examples = examples_of(p, targets)
    exact = reference.ece(examples, reference.equal_mass(examples))
    assert found["adaptive_ece"] == pytest.approx(exact, abs=0.006)


def test_every_bin_shows_in_the_reliability_diagram():
    p, targets = predictions(0)
    curve = calibration.reliability(calibration.compute(p, targets))
    bins = reference.equal_width(examples_of(p, targets))
    assert curve["count"].tolist() == [len(part) for part in bins]
    accuracies = [sum(e.correct for e in part) / len(part) for part in bins]
    assert curve["accuracy"] == pytest.approx(accuracies)
    assert ((curve["lower"] <= curve["confidence"]) & (curve["confidence"] <= curve["upper"])).all()


def test_a_confidence_of_one_is_in_the_last_bin_not_in_a_phantom_one():
    """A sixteenth bin for 1.0 alone, as in torchmetrics, keeps errors of opposite sign apart."""
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification", reason="needs torchmetrics")
    p = torch.tensor([[1.0, 0.0], [0.94, 0.06]])
    targets = torch.tensor([1, 0])
    row = calibration.compute(p, targets)
    assert calibration.reliability(row)["count"].tolist() == [2]
    assert calibration.summarise(row)["ece"] == pytest.approx(0.47)
    phantom = torchmetrics.multiclass_calibration_error(p, targets, num_classes=2, n_bins=15, norm="l1")
    assert phantom.item() == pytest.approx(0.53)


def test_edges_of_bins_belong_to_the_bin_above():
    sevenths = torch.tensor([7 / 15, 8 / 15, 9 / 15], dtype=torch.float64)
    curve = calibration.reliability(calibration.compute(torch.stack((sevenths, 1 - sevenths), -1), torch.zeros(3)))
    assert curve["lower"] == pytest.approx(np.array([8, 9]) / 15)  # 7/15 is the less probable class of two
    assert curve["count"].tolist() == [2, 1]


@pytest.mark.parametrize("norm", ["l1", "max"])
def test_agrees_with_torchmetrics_below_one(norm):
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification", reason="needs torchmetrics")
    p, targets = predictions(3)
    found = calibration.summarise(calibration.compute(p, targets))
    peer = torchmetrics.multiclass_calibration_error(p, targets, num_classes=6, n_bins=15, norm=norm)
    assert found["ece" if norm == "l1" else "mce"] == pytest.approx(peer.item(), abs=1e-6)


def test_scores_of_a_binary_task_agree_with_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification", reason="needs torchmetrics")
    score = torch.randn(4000).sigmoid()
    targets = torch.bernoulli(score).long()
    found = calibration.summarise(calibration.compute(score, targets))
    assert found["auroc"] == pytest.approx(torchmetrics.binary_auroc(score, targets).item(), abs=2e-3)
    assert found["average_precision"] == pytest.approx(
        torchmetrics.binary_average_precision(score, targets).item(), abs=1e-2
    )


@given(seed=st.integers(0, 10**6), scale=st.sampled_from((0.3, 2.0, 9.0)))
@settings(max_examples=30, deadline=None)
def test_curves_of_a_binary_task_are_those_of_sorted_scores(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    score = (scale * torch.randn(500, generator=generator, dtype=torch.float64)).sigmoid()
    targets = torch.bernoulli(score, generator=generator).long()
    row = calibration.compute(score, targets)
    curve = calibration.precision_recall(row)
    for threshold, precision, recall in zip(*(curve[k] for k in ("threshold", "precision", "recall")), strict=True):
        found = targets[score >= threshold * (1 - 1e-12)]
        if threshold > 0:
            assert precision == pytest.approx(found.double().mean().item())
            assert recall == pytest.approx((found.sum() / targets.sum()).item())
    rates = calibration.roc(row)
    assert rates["true_positive_rate"][-1] == rates["false_positive_rate"][-1] == 1.0
    exact = out_of_distribution.summarise(out_of_distribution.compute(score[targets == 0], score[targets == 1]))[
        "auroc"
    ]
    found = calibration.summarise(row)
    assert found.get("auroc", exact) == pytest.approx(exact, abs=5e-3)
    assert "auroc" in found or scale < 1  # scores of few bins may be in any order


@pytest.mark.parametrize("by", ["confidence", "uncertainty"])
def test_refusing_the_uncertain_is_what_sorting_gives(by):
    p, targets = predictions(1)
    doubt = 1 - p.amax(dim=-1) if by == "confidence" else torch.special.entr(p).sum(dim=-1)
    row = calibration.compute(p, targets, uncertainty=None if by == "confidence" else doubt)
    curve = calibration.risk_coverage(row)
    correct = (p.argmax(dim=-1) == targets)[doubt.argsort()].double()
    exact = correct.cumsum(0) / torch.arange(1, len(correct) + 1)
    at = (curve["coverage"] * len(correct)).round().astype(int) - 1
    assert curve["accuracy"] == pytest.approx(exact[at].numpy(), abs=1e-9)
    assert curve["risk"] == pytest.approx(1 - curve["accuracy"])
    assert curve["coverage"][-1] == 1
    assert len(at) > 20


def test_refusal_leaves_out_what_has_no_uncertainty():
    p, targets = torch.eye(2), torch.tensor([0, 0])
    row = calibration.compute(p, targets, uncertainty=torch.tensor([0.0, math.nan]))
    assert calibration.risk_coverage(row)["accuracy"].tolist() == [1.0]
    row = calibration.compute(p, targets, uncertainty=torch.tensor([0.0, math.inf]))
    assert calibration.risk_coverage(row)["accuracy"].tolist() == [1.0, 0.5]


def test_empty_after_ignore_index_has_no_points():
    row = calibration.compute(torch.rand(4, 3).softmax(-1), torch.full((4,), -100))
    assert calibration.summarise(row) == {"count": 0, "ignored": 4, "invalid": 0}
    for curve in (calibration.reliability, calibration.precision_recall, calibration.roc, calibration.risk_coverage):
        assert curve(row) == {}


def test_one_class_of_two_has_no_ranking():
    row = calibration.compute(torch.rand(5), torch.zeros(5))
    assert "auroc" not in calibration.summarise(row)
    assert calibration.precision_recall(row) == calibration.roc(row) == {}
    positives = calibration.compute(torch.rand(5), torch.ones(5))
    assert calibration.precision_recall(positives)["precision"].min() == 1.0
    assert calibration.roc(positives) == {}


def test_certain_and_wrong_costs_a_bounded_nll():
    found = calibration.summarise(calibration.compute(torch.eye(2), torch.tensor([1, 1])))
    assert found["nll"] == pytest.approx(reference.LARGEST_NLL / 2)
    assert found["brier"] == 1.0


@pytest.mark.parametrize("logits", [[0.0, -math.inf], [3e38, -3e38]])
def test_so_does_a_masked_class_or_one_beyond_float32(logits):
    row = calibration.compute(torch.tensor([logits]), torch.tensor([1]), from_logits=True)
    assert calibration.summarise(row)["nll"] == pytest.approx(reference.LARGEST_NLL)


def test_a_large_nll_of_logits_is_what_it_is():
    row = calibration.compute(torch.tensor([[1000.0, 0.0]]), torch.tensor([1]), from_logits=True)
    assert calibration.summarise(row)["nll"] == 1000.0

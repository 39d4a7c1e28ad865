"""The same numbers as torch-uncertainty: as its documentation defines them, and by itself where it is installed."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from torchprobe.statistics import calibration, intervals, uncertainty

EXAMPLES, CLASSES, BINS = 4000, 7, 15


@pytest.fixture(scope="module")
def peer():
    """torch-uncertainty's metrics; it needs lightning and torchvision."""
    return pytest.importorskip("torch_uncertainty.metrics", reason="needs torch-uncertainty")


@pytest.fixture(scope="module")
def predictions() -> tuple[Tensor, Tensor]:
    """Over-confident probabilities and targets."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(EXAMPLES, CLASSES, generator=generator) * 2
    targets = torch.multinomial((logits / 2).softmax(-1), 1, generator=generator)[:, 0]
    return logits.softmax(-1), targets


@pytest.fixture(scope="module")
def members() -> Tensor:
    """Class probabilities of ten members, (members, examples, classes)."""
    return (torch.randn(10, 500, CLASSES, generator=torch.Generator().manual_seed(1)) * 2).softmax(-1)


@pytest.fixture(scope="module")
def numbers() -> tuple[Tensor, Tensor, Tensor]:
    """Means, variances and targets, which lie 1.3 times as far off as the variances say."""
    generator = torch.Generator().manual_seed(2)
    mean, variance = torch.randn(EXAMPLES, generator=generator), torch.rand(EXAMPLES, generator=generator) + 0.1
    return mean, variance, mean + 1.3 * variance.sqrt() * torch.randn(EXAMPLES, generator=generator)


def ours(predictions: tuple[Tensor, Tensor]) -> dict[str, float]:
    return calibration.summarise(calibration.compute(*predictions).numpy())


def area_under_risk_coverage(predictions: tuple[Tensor, Tensor]) -> float:
    """Of our curve, which has one point a bucket of confidence: each example's, as those of a bucket tie."""
    row = calibration.compute(*predictions)
    curve = calibration.risk_coverage(row.numpy())
    shares = np.diff(curve["coverage"], prepend=0.0)
    return float(curve["risk"] @ shares)


# ---- as published


def adaptive_calibration_error(p: Tensor, targets: Tensor) -> float:
    """Bins of equal mass: cut the sorted confidences into equal parts."""
    confidence, predicted = p.max(-1)
    order = confidence.argsort()
    pairs = zip(
        confidence[order].tensor_split(BINS), (predicted == targets)[order].float().tensor_split(BINS), strict=True
    )
    return sum(abs(c.mean() - a.mean()).item() * len(c) / len(p) for c, a in pairs)


def aurc(p: Tensor, targets: Tensor) -> float:
    """Error rate among the k most confident, mean over k (Geifman & El-Yaniv 2017)."""
    confidence, predicted = p.max(-1)
    errors = (predicted != targets)[confidence.argsort(descending=True)].double()
    return (errors.cumsum(0) / torch.arange(1, len(p) + 1)).mean().item()


def mutual_information(members: Tensor) -> float:
    """Entropy of the mean minus the mean of the entropies (BALD)."""
    of_mean = torch.special.entr(members.mean(0)).sum(-1)
    return (of_mean - torch.special.entr(members).sum(-1).mean(0)).clamp(min=0).mean().item()


def quantile_coverage(numbers: tuple[Tensor, Tensor, Tensor], level: float) -> float:
    """How many targets are between the quantiles (1 - level) / 2 and (1 + level) / 2."""
    inside = 0
    for mean, variance, target in zip(*(x.tolist() for x in numbers), strict=True):
        normal = NormalDist(mean, math.sqrt(variance))
        inside += normal.inv_cdf((1 - level) / 2) <= target <= normal.inv_cdf((1 + level) / 2)
    return inside / EXAMPLES


def test_adaptive_calibration_error(predictions):
    """Ours cuts at 512 fixed edges, so that it needs no example kept: bins hold about as many."""
    assert ours(predictions)["adaptive_ece"] == pytest.approx(adaptive_calibration_error(*predictions), abs=2e-3)


def test_risk_coverage(predictions):
    assert area_under_risk_coverage(predictions) == pytest.approx(aurc(*predictions), abs=2e-3)


def test_mutual_information(members):
    parts = uncertainty.classification(members)
    assert parts.epistemic.mean().item() == pytest.approx(mutual_information(members), rel=1e-5)


def test_brier_and_nll(predictions):
    p, targets = predictions
    one_hot = torch.nn.functional.one_hot(targets, CLASSES)
    assert ours(predictions)["brier"] == pytest.approx((p - one_hot).square().sum(-1).mean().item(), rel=1e-5)
    expected = -p.gather(-1, targets[:, None]).log().mean().item()
    assert ours(predictions)["nll"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_coverage_of_central_intervals(numbers, level):
    found = intervals.summarise(intervals.compute(*numbers).numpy())[f"coverage_{level * 100:.0f}"]
    assert found == pytest.approx(quantile_coverage(numbers, level), abs=1 / EXAMPLES)
    assert found < level - 0.05  # too narrow


# ---- by itself


def value_of(metric, *args: Tensor) -> float:
    metric.update(*args)
    return float(metric.compute())


def test_its_metrics_of_classes_give_the_same(peer, predictions):
    found = ours(predictions)
    ece = value_of(peer.CalibrationError(task="multiclass", num_classes=CLASSES, num_bins=BINS), *predictions)
    assert found["ece"] == pytest.approx(ece, abs=1e-5)
    ace = value_of(peer.AdaptiveCalibrationError(task="multiclass", num_classes=CLASSES, num_bins=BINS), *predictions)
    assert ace == pytest.approx(adaptive_calibration_error(*predictions), abs=1e-5)
    assert found["brier"] == pytest.approx(value_of(peer.BrierScore(num_classes=CLASSES), *predictions), rel=1e-4)
    assert found["nll"] == pytest.approx(value_of(peer.CategoricalNLL(), *predictions), rel=1e-4)
    assert area_under_risk_coverage(predictions) == pytest.approx(value_of(peer.AURC(), *predictions), abs=2e-3)


def test_its_metrics_of_members_give_the_same(peer, members):
    parts, by_example = uncertainty.classification(members), members.transpose(0, 1)
    assert parts.epistemic.mean().item() == pytest.approx(value_of(peer.MutualInformation(), by_example), rel=1e-4)
    assert parts.total.mean().item() == pytest.approx(value_of(peer.Entropy(), members.mean(0)), rel=1e-4)


def test_its_coverage_of_intervals_is_the_same(peer, numbers):
    mean, variance, target = numbers
    found = intervals.summarise(intervals.compute(*numbers).numpy())
    for level, width in (("50", 0.6744897501960817), ("90", 1.6448536269514722)):
        lower, upper = mean - width * variance.sqrt(), mean + width * variance.sqrt()
        covered = value_of(peer.IntervalCoverage(), lower, upper, target)
        assert found[f"coverage_{level}"] == pytest.approx(covered, abs=1 / EXAMPLES)

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from torchprobe.statistics.scoring import class_counts, entropy, judged, same_class


def counts_by_hand(labels: list[int], classes: int) -> list[int]:
    return [labels.count(k) for k in range(classes)]


def entropy_by_hand(counts: list[int]) -> float:
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts if n)


def pairs_by_hand(labels: list[int]) -> float:
    pairs = [(a, b) for i, a in enumerate(labels) for j, b in enumerate(labels) if i != j]
    return sum(a == b for a, b in pairs) / len(pairs)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(7, 9))
def test_how_classes_are_spread(labels, classes):
    counts = class_counts(torch.tensor(labels), torch.ones(len(labels), dtype=torch.bool), classes)
    assert counts.tolist() == counts_by_hand(labels, classes)
    assert entropy(counts).item() == pytest.approx(entropy_by_hand(counts_by_hand(labels, classes)), abs=1e-6)
    assert same_class(counts).item() == pytest.approx(pairs_by_hand(labels), abs=1e-6)


def test_targets_that_do_not_count_are_left_out():
    counts = class_counts(torch.tensor([0, 1, 1]), torch.tensor([True, False, True]), 3)
    assert counts.tolist() == [1, 1, 0]


def test_nothing_is_known_of_none():
    assert entropy(torch.zeros(3)).isnan()
    assert same_class(torch.tensor([1.0, 0.0])).isnan()


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 12), st.booleans())
def test_targets_and_their_likelihood_come_from_the_gradient(seed, classes, rows, smoothing):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, classes, (rows,), generator=generator)
    ignored = torch.rand(rows, generator=generator) < 0.3
    ignored[0] = False
    loss = F.cross_entropy(logits, targets.masked_fill(ignored, -100), label_smoothing=0.1 * smoothing, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    found, counted, nll = judged(logits.detach(), gradient)
    plain = ~ignored
    if not smoothing:  # else the gradient of a target that is nearly sure points the other way
        assert counted.tolist() == plain.tolist()
        assert found[plain].tolist() == targets[plain].tolist()
        by_hand = [-row.log_softmax(0)[y].item() for row, y in zip(logits[plain], targets[plain], strict=True)]
        assert nll[plain].tolist() == pytest.approx(by_hand)
    assert not counted[ignored].any()

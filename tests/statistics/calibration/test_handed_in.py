"""What somebody hands in counts as what it is meant for, or not at all; numbers against slow twins in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchprobe.statistics import calibration

G = torch.Generator().manual_seed(5)
Z, Y = torch.randn(300, 4, generator=G), torch.randint(4, (300,), generator=G)
P, ONE, YES = Z.softmax(-1), F.one_hot(Y, 4), torch.rand(300, generator=G)
ANSWERS = torch.bernoulli(YES, generator=G)


def of(p: Tensor, y: Tensor) -> dict[str, float]:
    return calibration.summarise(calibration.handed_in(p, y).cpu().numpy())


RIGHT = {
    "class numbers": (P, Y),
    "one-hot integers": (P, ONE),
    "one-hot booleans": (P, ONE.bool()),
    "one-hot bytes": (P, ONE.byte()),
    "one-hot floats": (P, ONE.float()),
    "whole floats": (P, Y.float()),
    "doubles": (P.double(), Y),
    "maps": (P.view(3, 100, 4), ONE.view(3, 100, 4)),
}


@pytest.mark.parametrize(("p", "y"), RIGHT.values(), ids=RIGHT)
def test_every_way_to_write_classes_is_the_same(p, y):
    """A slow twin, an example at a time."""
    rows = [(row, k) for row, k in zip(P.double().tolist(), Y.tolist(), strict=True)]
    accuracy = sum(row.index(max(row)) == k for row, k in rows) / len(rows)
    brier = sum(sum((q - (i == k)) ** 2 for i, q in enumerate(row)) for row, k in rows) / len(rows)
    found = of(p, y)
    assert (found["count"], found["invalid"]) == (300, 0)
    assert found["accuracy"] == pytest.approx(accuracy)
    assert found["brier"] == pytest.approx(brier, rel=1e-6)
    assert "auroc" not in found


NOTHING = {
    "logits": (Z, Y),
    "logits with one-hot integers": (Z, ONE),
    "logits with one-hot floats": (Z, ONE.float()),
    "logarithms": (P.log(), Y),
    "percentages": (100 * P, Y),
    "logits of two classes": (Z[:, :2], Y % 2),
    "log-odds": (2 * Z[:, 0], ANSWERS),
    "narrow log-odds": (0.5 * Z[:, :1], ANSWERS.long()),
    "answers -1 and 1": (YES, 2 * ANSWERS.long() - 1),
    "answers 1 and 2": (YES, 1 + ANSWERS),
    "fractions": (P, Y + 0.5),
}


@pytest.mark.parametrize(("p", "y"), NOTHING.values(), ids=NOTHING)
def test_what_is_something_else_is_counted_and_never_judged(p, y):
    found = of(p, y)
    assert found["count"] == 0
    assert found["invalid"] >= 300


def test_rows_that_are_no_classes_do_not_make_answers_of_the_others():
    y = ONE * (Y > 0)[:, None]  # ignored rows of zeros
    found = of(P, y)
    assert (found["count"], found["invalid"]) == ((Y > 0).sum(), (Y == 0).sum())
    assert found["accuracy"] == pytest.approx((P.argmax(-1) == Y)[Y > 0].double().mean().item())


def test_answers_stay_answers():
    p, y = torch.rand(200, 4, generator=G), torch.randint(2, (200, 4), generator=G)
    found = of(p, y)
    assert found["count"] == 800
    assert found["accuracy"] == pytest.approx(((p >= 0.5) == (y > 0)).double().mean().item())


def test_a_few_broken_rows_are_left_out_alone():
    p = P.where(torch.arange(300)[:, None] % 10 > 0, torch.nan)
    assert (of(p, Y)["count"], of(p, Y)["invalid"]) == (270, 30)
    padded, y = P * (Y > 0)[:, None], Y.where(Y > 0, -100)
    assert (of(padded, y)["count"], of(padded, y)["ignored"]) == ((Y > 0).sum(), (Y == 0).sum())
    off = of(P, Y + 2)
    assert (off["count"], off["invalid"]) == ((Y < 2).sum(), (Y >= 2).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_wide_whatever_comes_in(dtype):
    p = P.to(dtype).repeat(200, 1)
    expected = p[:300].double()
    assert of(p, Y.repeat(200))["confidence"] == pytest.approx(expected.amax(-1).mean().item(), rel=1e-5)


SCORES = {
    "spread": lambda u: u,
    "near one half": lambda u: 0.5 + 1e-3 * u,
    "rare": lambda u: 1e-4 * u,
    "nearly sure": lambda u: 1 - 1e-5 * u,
    "a few values": lambda u: (5 * u).floor() / 5,
    "equal": lambda u: 0 * u + 0.3,
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_ranking_is_within_its_bound_of_the_slow_twin_or_left_out(scores):
    y = torch.bernoulli(torch.full((400,), 0.3), generator=G).double()
    p = scores((0.7 * torch.rand(400, generator=G, dtype=torch.float64) + 0.3 * y).clamp(0, 1))
    pairs = (p[y == 1][:, None] - p[y == 0][None]).sign()
    auroc = ((pairs + 1) / 2).mean().item()
    at = [(y[p >= t].mean().item(), (p[y == 1] == t).sum().item()) for t in p.unique().tolist()]
    precision = sum(share * hits for share, hits in at) / y.sum().item()
    found = of(p, y.long())
    for name, exact in (("auroc", auroc), ("average_precision", precision)):
        assert found.get(name, exact) == pytest.approx(exact, abs=calibration.RANKING_BOUND)

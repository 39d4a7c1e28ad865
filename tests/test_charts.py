"""Pictures say what the numbers say, and fit TensorBoard's page."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchprobe import pictures as charts
from torchprobe.statistics import calibration, intervals


def row_of(n: int, sharpness: float = 1.0) -> np.ndarray:
    x = 2 * torch.randn(n, 4)
    targets = torch.multinomial(x.softmax(-1), 1)[:, 0]
    return calibration.compute(sharpness * x, targets, from_logits=True).numpy()


def binary_row(n: int) -> np.ndarray:
    score = torch.rand(n)
    return calibration.compute(score, (torch.arange(n) % 2).float()).numpy()


def area(image, colour) -> int:
    return int((image.pixels == np.array(colour, np.uint8)).all(-1).sum())


DRAWN = {
    "reliability": lambda n: charts.reliability_diagram(calibration.reliability(row_of(n))),
    "risk and coverage": lambda n: charts.risk_coverage_curve(calibration.risk_coverage(row_of(n))),
    "precision and recall": lambda n: charts.precision_recall_curve(calibration.precision_recall(binary_row(n + 1))),
    "pit": lambda n: charts.pit_chart(
        *intervals.pit_histogram(intervals.compute(torch.zeros(n), torch.ones(n), torch.randn(n)))
    ),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("n", [1, 5000])
def test_a_picture_is_labelled_and_no_wider_than_the_page(draw, n):
    pixels = draw(n).pixels
    assert pixels.dtype == np.uint8
    assert pixels.shape[1] <= 320
    assert pixels.shape[2] == 3
    assert (pixels < 100).all(-1).sum() > 100  # text
    assert area(draw(n), charts._BLUE) > 4 or n == 1


def test_an_over_confident_model_shows_red_and_a_modest_one_green():
    confident, modest = (charts.reliability_diagram(calibration.reliability(row_of(20_000, s))) for s in (3.0, 0.4))
    assert area(confident, charts._RED) > 10 * area(confident, charts._GREEN)
    assert area(modest, charts._GREEN) > 10 * area(modest, charts._RED)


def test_a_pit_of_nothing_is_an_empty_chart():
    edges, counts = intervals.pit_histogram(np.zeros(len(intervals.FIELDS)))
    assert area(charts.pit_chart(edges, counts), charts._BLUE) == 0


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1.0k"), (12_345, "12k"), (3_000_000, "3.0M"), (4e10, "40G")]
)
def test_counts_are_short(count, text):
    assert charts._short(count) == text

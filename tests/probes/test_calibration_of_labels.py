"""Calibration in validation, from labels that the model is called with, in other forms than one class a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.probes.calibrated import assert_calibration, watch
from torchprobe.testing import MemoryWriter


class Segmenter(nn.Module):
    """Classes are the second dimension, as `cross_entropy` wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv1d(2, 3, 1)

    def forward(self, x: Tensor, labels: Tensor):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class SeveralLabels(nn.Module):
    """Yes or no for each of several labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(7, 3)

    def forward(self, x: Tensor, labels: Tensor):
        logits = self.net(x)
        return {"loss": F.binary_cross_entropy_with_logits(logits, labels), "logits": logits}


def test_labels_of_a_validation_pass_with_classes_second():
    model, writer = Segmenter(), MemoryWriter()
    x, labels = torch.randn(4, 2, 7), torch.randint(0, 3, (4, 7))
    out = validate(model, writer, x, labels)
    assert_calibration(writer, 1, out.softmax(1).transpose(1, 2).flatten(0, 1), labels.flatten(), "val/")


def test_labels_of_a_validation_pass_that_do_not_exclude_each_other():
    model, writer = SeveralLabels(), MemoryWriter()
    x, labels = torch.randn(16, 7), torch.randint(0, 2, (16, 3)).float()
    yes = validate(model, writer, x, labels).sigmoid().flatten()
    assert_calibration(writer, 1, torch.stack((1 - yes, yes), -1), labels.flatten().long(), "val/")


def validate(model: nn.Module, writer: MemoryWriter, x: Tensor, labels: Tensor) -> Tensor:
    """The logits of a validation pass after a step."""
    with watch(model, writer):
        model(x, labels)["loss"].backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with torch.no_grad():
            return model.eval()(x, labels)["logits"]

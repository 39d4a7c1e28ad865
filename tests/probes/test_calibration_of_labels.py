"""Calibration in validation, from labels that the model is called with, in other forms than one class a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
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


class Masked(nn.Module):
    """Leaves out a class number of its own choice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(7, 3)

    def forward(self, x: Tensor, targets: Tensor):
        logits = self.net(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def test_labels_that_are_left_out_before_training_has_shown_their_number():
    model, writer = Masked(), MemoryWriter()
    x, targets = torch.randn(4, 5, 7), torch.randint(0, 3, (4, 5))
    targets[:, :2] = -1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, writer) as session, torch.no_grad():
        logits, _ = model(x, targets)
        session.flush()
        assert optimizer.param_groups
        assert "no probabilities" not in session.summary()
    assert "val/calibration/invalid" not in writer.tags()
    kept = targets.flatten() >= 0
    assert_calibration(writer, 0, logits.flatten(0, 1).softmax(-1)[kept], targets.flatten()[kept], "val/")


class NextToken(nn.Module):
    """As HuggingFace's `Trainer` calls one: its loss is divided by the number of all labels, the first ones too."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        self.net, self.off = nn.Linear(7, 3), off

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None):
        logits = self.net(x)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return {"loss": loss / (num_items_in_batch + self.off), "logits": logits}


@pytest.mark.parametrize("counted", [int, torch.tensor])
def test_labels_whose_loss_is_divided_by_a_number_that_the_model_is_told(counted):
    model, writer = NextToken(), MemoryWriter()
    x, labels = torch.randn(4, 6, 7), torch.randint(0, 3, (4, 6))
    labels[0, 2] = -100
    out = validate(model, writer, x, labels, num_items_in_batch=counted(23))
    assert_calibration(writer, 1, out.softmax(-1)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), "val/")


def test_a_loss_that_is_divided_by_something_else_tells_nothing():
    model, writer = NextToken(off=3.0), MemoryWriter()
    validate(model, writer, torch.randn(4, 6, 7), torch.randint(0, 3, (4, 6)), num_items_in_batch=24)
    assert [tag for tag in writer.tags() if tag.startswith("val/calibration")] == []


def validate(model: nn.Module, writer: MemoryWriter, x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The logits of a validation pass after a step."""
    with watch(model, writer):
        model(x, labels, **options)["loss"].backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with torch.no_grad():
            return model.eval()(x, labels, **options)["logits"]


class OwnLoss(nn.Module):
    """Of its own making, from what nobody would take for labels, or not as they are."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.loss = nn.Linear(7, 3), loss

    def forward(self, x: Tensor, labels: Tensor | None = None, answers: Tensor | None = None) -> Any:
        z = self.net(x)
        return self.loss(z, answers if labels is None else labels)


UNSEEN = {
    "an argument of another name": ("answers", lambda z, y: (F.cross_entropy(z, y), z)),
    "labels that are changed": ("labels", lambda z, y: (F.cross_entropy(z, 2 - y), z)),
    "smoothed": ("labels", lambda z, y: (F.cross_entropy(z, y, label_smoothing=0.1), z)),
    "numbers": (
        "answers",
        lambda z, y: (z[:, :1], z[:, 1:2].exp()),
    ),
}


@pytest.mark.parametrize(("argument", "loss"), UNSEEN.values(), ids=UNSEEN)
def test_that_a_returned_loss_tells_no_targets_in_validation_is_said(argument, loss):
    model, x, y = OwnLoss(loss), torch.randn(32, 7), torch.randint(0, 3, (32,))
    optimizer, writer = torch.optim.SGD(model.parameters(), 0.1), MemoryWriter()
    with watch(model, writer) as session:
        for _ in range(2):
            first, second = model(x.clone(), **{argument: y.clone()})
            (first if first.dim() == 0 else F.gaussian_nll_loss(first, y[:, None] / 2, second)).backward()
            optimizer.step(), optimizer.zero_grad()
        with torch.no_grad():
            model(x.clone(), **{argument: y.clone()})
    known = [tag for tag in writer.tags() if "calibration" in tag]
    assert "calibration/accuracy" in known or "calibration/coverage_50" in known
    assert [tag for tag in known if tag.startswith("val/")] == []
    assert session.summary().count("calibration in validation: no targets were seen") == 1


def test_that_an_output_outside_of_the_graph_tells_nothing_is_said():
    model, x, y = OwnLoss(lambda z, y: (F.cross_entropy(z, y), z.detach())), torch.randn(32, 7), torch.ones(32).long()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, MemoryWriter()) as session:
        for _ in range(2):
            model(x, answers=y)[0].backward()
            optimizer.step(), optimizer.zero_grad()
    assert "outside of its loss's graph" in session.summary()

"""Two or three classes in batches so small that no gradient tells the loss: nothing is claimed, and why is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter


def cross_entropy(z, y):
    return F.cross_entropy(z, y)


def binary_cross_entropy(z, y):
    return F.binary_cross_entropy_with_logits(z[:, 0], (y > 0).float())


def trained(outputs: int, rows: int, loss, **options) -> MemoryWriter:
    torch.manual_seed(0)
    model, writer = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probes = [torchprobe.Uncertainty(every=1, **options), torchprobe.Calibration(every=1)]
    with torchprobe.instrument(model, writer=writer, probes=probes, rules=[]):
        for _ in range(4):
            loss(model(torch.randn(rows, 6)), torch.randint(max(2, outputs), (rows,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return writer


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("outputs", "loss"), [(2, cross_entropy), (3, cross_entropy), (1, binary_cross_entropy)])
def test_what_settles_it_is_said(outputs, loss, rows):
    writer = trained(outputs, rows, loss)
    assert {"uncertainty_total/root", "calibration/ece"}.isdisjoint(writer.tags())
    why = f"the gradients of fewer than 4 predictions of {max(2, outputs)} classes may be those of any loss: use a loss"
    for probe, option in (("Uncertainty", "Uncertainty(task='classification')"), ("Calibration", "log_predictions")):
        text = writer.value(f"nothing_captured/{probe}", 3).markdown
        assert why in text
        assert option in text


@pytest.mark.parametrize(("outputs", "loss"), [(2, cross_entropy), (1, binary_cross_entropy)])
def test_the_options_that_it_names_settle_it(outputs, loss):
    assert len(trained(outputs, 3, loss, task="classification").scalars("uncertainty_total/root")) == 4
    module = nn.CrossEntropyLoss() if outputs > 1 else nn.BCEWithLogitsLoss()
    told = trained(outputs, 3, lambda z, y: module(z, y) if outputs > 1 else module(z[:, 0], y.float()))
    assert len(told.scalars("calibration/ece")) == len(told.scalars("uncertainty_total/root")) == 4


@pytest.mark.parametrize(("outputs", "rows", "loss"), [(2, 4, cross_entropy), (5, 1, cross_entropy)])
def test_enough_of_them_need_no_option(outputs, rows, loss):
    writer = trained(outputs, rows, loss)
    assert len(writer.scalars("calibration/ece")) >= 3
    assert not [tag for tag in writer.tags() if tag.startswith("nothing_captured")]


class OwnLoss(nn.Module):
    """Returns what is made of its loss and of its predictions."""

    def __init__(self, give) -> None:
        super().__init__()
        self.net, self.give = nn.Linear(6, 5), give

    def forward(self, x, y):
        logits = self.net(x)
        return self.give(F.cross_entropy(logits, y), logits)


GIVEN = {
    "the loss": (lambda loss, logits: loss, True),
    "in a tuple": (lambda loss, logits: (loss, None), True),
    "two, by name": (lambda loss, logits: {"loss": loss, "penalty": logits.square().mean()}, True),
    "predictions beside it": (lambda loss, logits: (loss, logits), False),
}


class Features(nn.Module):
    """Returns features of another shape before its logits, or after them."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.body, self.head, self.first = nn.Linear(6, 8), nn.Linear(8, 5), first

    def forward(self, x):
        features = self.body(x).tanh()
        both = features.view(-1, 2, 4), self.head(features)
        return both if self.first else both[::-1]


@pytest.mark.parametrize("first", [True, False])
def test_predictions_behind_an_output_of_another_shape_are_said_to_be_left_out(first):
    model, writer = Features(first), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 6))[first], torch.randint(5, (8,))).backward()
            optimizer.step()
        session.flush()
        said = [line for line in session.summary().splitlines() if "the first alone is looked at" in line]
    assert any("Calibration:" in line for line in said) is first
    assert ("calibration/accuracy" in writer.tags()) is not first


@pytest.mark.parametrize("kind", GIVEN)
def test_a_model_that_returns_its_loss_alone_is_said_to_give_no_predictions(kind):
    give, is_alone = GIVEN[kind]
    model, writer = OwnLoss(give), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for _ in range(3):
            out = model(torch.randn(8, 6), torch.randint(5, (8,)))
            loss = out if isinstance(out, torch.Tensor) else out["loss"] if isinstance(out, dict) else out[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        session.flush()
        said = [line for line in session.summary().splitlines() if "returns its loss, or other numbers" in line]
    assert len(said) == (2 if is_alone else 0)
    assert ("calibration/accuracy" in writer.tags()) is not is_alone

"""A loss module that returns a number for each example does not tell which of them count: a mask may follow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.probes.calibrated import assert_calibration, batch, net, watch
from torchprobe.testing import MemoryWriter

CLASSES = nn.CrossEntropyLoss, lambda y: torch.where(kept(), y, 0)
ANSWERS = nn.BCEWithLogitsLoss, lambda y: nn.functional.one_hot(y, 5).float()


def kept():
    return torch.arange(32) % 3 > 0


def validated(model, criterion, target, inference):
    x, y = batch(1)
    model.eval()
    with torch.set_grad_enabled(not inference):
        each = criterion(model(x), target(y))
        return (each.view(32, -1).mean(-1) * kept()).sum() / kept().sum()


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(("kind", "target"), [CLASSES, ANSWERS], ids=["classes", "answers"])
def test_masked_examples_are_not_judged_in_validation(kind, target, inference):
    model, writer, criterion = net(), MemoryWriter(), kind(reduction="none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, writer) as session:
        x, y = batch(0)
        out = model(x)
        each = criterion(out, target(y)).view(32, -1).mean(-1)
        ((each * kept()).sum() / kept().sum()).backward()
        optimizer.step()
        validated(model, criterion, target, inference)
        session.flush()
        assert "reduction='none'" in session.summary()
        assert "functional loss" not in session.summary()
    if kind is CLASSES[0]:
        assert_calibration(writer, 1, out.softmax(-1)[kept()], y[kept()])
    assert not any(tag.startswith("val/calibration") for tag in writer.tags())
    assert writer.scalars("val/uncertainty_total/root")


class Gaussian(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.spread = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        return {"mean": self.mean(x), "variance": self.spread(x).exp()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_targets_of_numbers_that_a_mask_takes_away_are_in_no_interval(reduction, training):
    model, writer, criterion = Gaussian(), MemoryWriter(), nn.GaussianNLLLoss(reduction=reduction)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(32, 4)
    y = torch.where(kept()[:, None], x.sum(1, keepdim=True), 1e6)  # far from all that is predicted
    with watch(model, writer):
        out = model(x)
        nn.functional.gaussian_nll_loss(out["mean"][:2], y[1:3], out["variance"][:2]).backward()
        optimizer.step()
        with torch.set_grad_enabled(training):
            out = model.train(training)(x)
            each = criterion(out["mean"], y, out["variance"])
            loss = (each * kept()[:, None]).sum() / kept().sum() if reduction == "none" else each
            if training:
                loss.backward()
                optimizer.step()
    tag, step = ("calibration/coverage_90", 2) if training else ("val/calibration/coverage_90", 1)
    found = dict(writer.scalars(tag)).get(step)
    inside = ((y - out["mean"]).abs() <= 1.6448536 * out["variance"].sqrt()).detach()
    if reduction == "mean":
        assert found == pytest.approx(inside.float().mean().item())
    else:
        assert found == (pytest.approx(inside[kept()].float().mean().item()) if training else None)

"""A regression is judged where a variance and targets are known; where one is missing, what settles it is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter


class Gaussian(nn.Module):
    """A mean and a variance."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        return {"mean": self.mean(x), "variance": self.spread(x).exp()}


def trained(model: nn.Module, loss) -> MemoryWriter:
    torch.manual_seed(0)
    writer, optimizer = MemoryWriter(), torch.optim.SGD(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Calibration(every=1)], rules=[]):
        for _ in range(4):
            x = torch.randn(64, 4)
            loss(model(x), x.sum(1, keepdim=True) + torch.randn(64, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return writer


def missed(writer: MemoryWriter) -> list[str]:
    return [tag for tag in writer.tags() if tag.startswith("nothing_captured/")]


@pytest.mark.parametrize("judge", [nn.GaussianNLLLoss(), lambda mean, y, variance: nn.MSELoss()(mean, y)])
def test_a_loss_module_on_a_mean_and_a_variance_is_all_that_it_takes(judge):
    writer = trained(Gaussian(), lambda out, y: judge(out["mean"], y, out["variance"]))
    assert len(writer.scalars("calibration/coverage_50")) == len(writer.scalars("calibration/coverage_90")) == 4
    assert missed(writer) == []


def test_a_functional_loss_on_numbers_tells_no_target():
    writer = trained(Gaussian(), lambda out, y: F.mse_loss(out["mean"], y))
    assert "use nn.GaussianNLLLoss() or nn.MSELoss()" in writer.value("nothing_captured/Calibration", 3).markdown


def test_numbers_without_a_variance_have_no_interval():
    writer = trained(nn.Linear(4, 1), lambda out, y: nn.MSELoss()(out, y))
    assert "without a variance" in writer.value("nothing_captured/Calibration", 3).markdown

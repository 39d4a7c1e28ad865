"""A regression is judged where a variance and targets are known; where one is missing, what settles it is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal

import torchprobe
from torchprobe.testing import MemoryWriter


class Gaussian(nn.Module):
    """A mean, and a variance in one form or another."""

    def __init__(self, says: str = "variance") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean, self.spread, self.says = nn.Linear(4, 1), nn.Linear(4, 1), says

    def forward(self, x):
        mean, log_var = self.mean(x), self.spread(x)
        if self.says == "distribution":
            return Normal(mean, (log_var / 2).exp())
        shown = {"variance": log_var.exp(), "log_var": log_var, "std": (log_var / 2).exp()}
        return {"mean": mean, self.says: shown[self.says]}


HAND_WRITTEN = {
    "variance": lambda out, y: F.gaussian_nll_loss(out["mean"], y, out["variance"]),
    "log_var": lambda out, y: (out["log_var"] + (y - out["mean"]).square() * (-out["log_var"]).exp()).mean() / 2,
    "std": lambda out, y: (out["std"].log() + ((y - out["mean"]) / out["std"]).square() / 2).mean(),
    "distribution": lambda out, y: -out.log_prob(y).mean(),
}


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


SQUARED_ERROR = nn.MSELoss()


@pytest.mark.parametrize("make", [nn.GaussianNLLLoss, lambda: lambda mean, y, variance: SQUARED_ERROR(mean, y)])
def test_a_loss_module_on_a_mean_and_a_variance_is_all_that_it_takes(make):
    judge = make()
    writer = trained(Gaussian(), lambda out, y: judge(out["mean"], y, out["variance"]))
    assert len(writer.scalars("calibration/coverage_50")) == len(writer.scalars("calibration/coverage_90")) == 4
    assert missed(writer) == []


@pytest.mark.parametrize("says", HAND_WRITTEN)
def test_a_gaussian_likelihood_in_any_form_tells_what_the_module_tells(says):
    module = trained(Gaussian(), lambda out, y: nn.GaussianNLLLoss()(out["mean"], y, out["variance"]))
    found = trained(Gaussian(says), HAND_WRITTEN[says])
    for tag in ("calibration/coverage_50", "calibration/coverage_90"):
        expected = [value for _, value in module.scalars(tag)]
        assert [value for _, value in found.scalars(tag)] == pytest.approx(expected, abs=1 / 64)
    assert missed(found) == []


def test_another_functional_loss_on_numbers_tells_no_target():
    writer = trained(Gaussian(), lambda out, y: F.mse_loss(out["mean"], y))
    assert (
        "use nn.GaussianNLLLoss(), or nn.MSELoss() on the mean"
        in writer.value("nothing_captured/Calibration", 3).markdown
    )


def test_a_loss_that_leaves_the_variance_out_trains_undisturbed():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            mean, spread = self.layer(x).unbind(-1)  # one node with two outputs, one of them unused
            return {"mean": mean, "std": spread}

    writer = trained(Both(), lambda out, y: F.mse_loss(out["mean"], y[:, 0]))
    assert "no target was seen" in writer.value("nothing_captured/Calibration", 3).markdown


def test_numbers_without_a_variance_have_no_interval():
    writer = trained(nn.Linear(4, 1), SQUARED_ERROR)
    assert "without a variance" in writer.value("nothing_captured/Calibration", 3).markdown

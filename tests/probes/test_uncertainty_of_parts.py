"""Ensembles, divergences and chosen parts of a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.probes.uncertain import Gives, bald, found, one_step, watch
from torchprobe.testing import MemoryWriter

# ---- ensembles and other parts


class Ensemble(nn.Module):
    def __init__(self, give: str) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(4, 3) for _ in range(4))
        self.give = give

    def forward(self, x):
        out = torch.stack([member(x) for member in self.members])
        return {"logits": out.mean(0), "probabilities": out.softmax(-1).mean(0), "stacked": out}[self.give]


@pytest.mark.parametrize("give", ["logits", "probabilities"])
def test_an_ensemble_inside_the_model(give):
    model, writer = Ensemble(give), MemoryWriter()
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    with watch(model, writer) as session:
        out = model(x)
        (F.cross_entropy(out, y) if give == "logits" else F.nll_loss(out.log(), y)).backward()
        session.next_step()
    p = torch.stack([member(x) for member in model.members]).softmax(-1)
    assert found(writer, "members") == pytest.approx(bald(p), rel=1e-4)
    q = out.softmax(-1) if give == "logits" else out
    assert writer.value("calibration/nll") == pytest.approx(F.nll_loss(q.log(), y).item(), rel=1e-5)


class Gaussian(nn.Linear):
    def forward(self, x):
        mean, log_var = super().forward(x).unbind(-1)
        return {"mean": mean, "variance": log_var.exp()}


class DeepEnsemble(nn.Module):
    """Of Gaussians (Lakshminarayanan et al. 2017), which gives the mixture's mean and variance."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(Gaussian(4, 2) for _ in range(4))

    def forward(self, x):
        given = [member(x) for member in self.members]
        means, variances = (torch.stack([one[key] for one in given]) for key in ("mean", "variance"))
        return {"mean": means.mean(0), "variance": variances.mean(0) + means.var(0, correction=0)}


def test_an_ensemble_of_gaussians_inside_the_model():
    model, x = DeepEnsemble(), torch.randn(16, 4)
    writer = one_step(model, x)
    means, variances = (torch.stack([m(x)[key] for m in model.members]).detach() for key in ("mean", "variance"))
    epistemic, aleatoric = means.var(0, correction=0).mean().item(), variances.mean().item()
    expected = {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}
    assert found(writer, "members") == pytest.approx(expected, rel=1e-4)


def test_layers_and_heads_are_no_ensemble():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return torch.cat([head(x) for head in self.heads], -1)

    model, writer = Layers(), MemoryWriter()
    with watch(model, writer) as session:
        F.cross_entropy(model(torch.randn(16, 4)), torch.randint(0, 6, (16,))).backward()
        session.next_step()
    assert {tag.split("/")[1] for tag in writer.tags() if tag.startswith("uncertainty_")} == {"root"}


def test_modules_that_are_asked_for():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Gives(lambda h: {"mean": h, "variance": h.square()})

        def forward(self, x):
            return self.head(x)["mean"]

    model = Model()
    x = torch.randn(8, 4)
    writer = one_step(model, x, modules="he*")
    assert found(writer, "head")["total"] == pytest.approx(model.head.fc(x).square().mean().item())
    assert found(writer) == {}


def test_a_divergence_beside_the_output_of_bayesian_layers():
    class BayesianLinear(nn.Linear):
        def kl_loss(self):
            return self.weight.square().sum()

        def forward(self, x):
            return super().forward(x), self.kl_loss()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = BayesianLinear(4, 3)

        def forward(self, x):
            return self.fc(x)

    model, writer = Model(), MemoryWriter()
    expected = model.fc.kl_loss().item()
    y = torch.randint(0, 3, (16,))
    with watch(model, writer) as session:
        out, kl = model(torch.randn(16, 4))
        (F.cross_entropy(out, y) + 1e-3 * kl).backward()
        session.next_step()
    assert writer.value("uncertainty_kl/root") == pytest.approx(expected)
    assert set(found(writer)) == {"total"}
    assert writer.value("calibration/count") == 16


def test_a_loss_beside_the_output_is_no_divergence():
    writer = one_step(Gives(lambda h: (h, h.mean())), torch.randn(8, 4))
    assert "uncertainty_kl/root" not in writer.tags()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sample_dim": "first"}, TypeError, "sample_dim='first'"),
        ({"task": "ranking"}, ValueError, "task='ranking'.*'classification'"),
        ({"modules": [3]}, TypeError, "modules: got 3"),
        ({"every": 0}, ValueError, "every=0"),
    ],
)
def test_wrong_arguments_are_named(options, error, words):
    with pytest.raises(error, match=words):
        torchprobe.Uncertainty(**options)

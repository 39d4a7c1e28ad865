"""Outputs of libraries for Bayesian models, as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter


def watch(model: nn.Module, writer: MemoryWriter) -> torchprobe.Session:
    probes = [torchprobe.Uncertainty(), torchprobe.Calibration()]
    return torchprobe.instrument(model, writer=writer, probes=probes, every=1)


@pytest.mark.filterwarnings("ignore")
def test_a_gaussian_process_of_gpytorch():
    gpytorch = pytest.importorskip("gpytorch")
    x = torch.linspace(0, 1, 20)
    y = torch.sin(6 * x) + 0.1 * torch.randn(20)

    class Process(gpytorch.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    class Model(nn.Module):
        """gpytorch's own modules run no hooks: one around them is what can be watched."""

        def __init__(self, process):
            super().__init__()
            self.process = process

        def forward(self, x):
            return self.process(x)

    def train(writer: MemoryWriter | None):
        torch.manual_seed(0)
        likelihood = gpytorch.likelihoods.GaussianLikelihood()
        model = Model(Process(likelihood))
        session = watch(model, writer) if writer else None
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model.process)
        for _ in range(3):
            optimizer.zero_grad()
            (-objective(model(x), y)).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            after = model(torch.linspace(0, 2, 10))
        if session is not None:
            session.detach()
        return after, [p.detach().clone() for p in model.parameters()], torch.get_rng_state()

    writer = MemoryWriter()
    bare, weights, state = train(None)
    seen, weights_seen, state_seen = train(writer)
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_seen, strict=True))
    assert torch.equal(bare.variance, seen.variance)
    assert torch.equal(state, state_seen)
    assert writer.value("val/uncertainty_total/root") == pytest.approx(bare.variance.mean().item(), rel=1e-4)
    entropy = (0.5 * (2 * torch.pi * torch.e * bare.variance).log()).mean().item()
    assert writer.value("val/uncertainty_entropy/root") == pytest.approx(entropy, rel=1e-4)
    assert "latent" in writer.records[-1].descriptions["uncertainty_total"]


@pytest.mark.filterwarnings("ignore")
def test_the_divergence_of_bayesian_torch():
    layers = pytest.importorskip("bayesian_torch.layers")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = layers.LinearReparameterization(4, 16)
            self.last = layers.LinearReparameterization(16, 3)

        def forward(self, x):
            x, kl_first = self.first(x)
            x, kl_last = self.last(x.relu())
            return x, kl_first + kl_last

    model, writer = Net(), MemoryWriter()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.randn(32, 4), torch.randint(0, 3, (32,))
    outs = []
    with watch(model, writer):
        for _ in range(4):
            out, kl = model(x)
            outs.append(out)
            ((nn.functional.cross_entropy(out, y) + kl / 32) / 4).backward()
        optimizer.step()
    p = torch.stack(outs).softmax(-1)
    total = torch.special.entr(p.mean(0)).sum(-1)
    epistemic = (total - torch.special.entr(p).sum(-1).mean(0)).mean().item()
    assert writer.value("uncertainty_kl/root") == pytest.approx(kl.item(), rel=1e-5)
    assert writer.value("uncertainty_epistemic/root") == pytest.approx(epistemic, rel=1e-3)
    assert writer.value("calibration/count") == 4 * 32

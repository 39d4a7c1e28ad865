"""The weights of a mixture are no prediction of classes: which component is responsible is nobody's target."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

from tests.probes.calibrated import assert_calibration, batch, net, watch
from torchprobe.testing import MemoryWriter


class Mixture(nn.Module):
    """Narrow components that lie far apart, so that one alone is responsible for each example."""

    def __init__(self, shares):
        super().__init__()
        torch.manual_seed(0)
        self.weights, self.means, self.shares = nn.Linear(1, 5), nn.Linear(1, 5), shares
        nn.init.zeros_(self.means.weight)
        self.means.bias.data = torch.linspace(-2, 2, 5)

    def forward(self, x):
        logits = self.weights(x)
        return logits.softmax(-1) if self.shares else logits, self.means(x)


LIKELIHOODS = {
    "logarithms": lambda p, means, y: -(p.log_softmax(-1) + Normal(means, 0.02).log_prob(y)).logsumexp(-1).mean(),
    "torch's": lambda p, means, y: (
        -MixtureSameFamily(Categorical(logits=p), Normal(means, 0.02 + 0 * means)).log_prob(y[:, 0]).mean()
    ),
    "products": lambda p, means, y: -(p * Normal(means, 0.1).log_prob(y).exp()).sum(-1).log().mean(),
    "exponentials": lambda p, means, y: -(p.log() + Normal(means, 0.02).log_prob(y)).exp().sum(-1).log().mean(),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_mixture_has_no_targets(name):
    model, writer = Mixture(name in ("products", "exponentials")), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with watch(model, writer) as session:
        for _ in range(3):
            x = torch.randn(64, 1)
            y = torch.randint(-2, 3, (64, 1)) + 0.01 * torch.randn(64, 1)
            LIKELIHOODS[name](*model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        session.flush()
        assert "no targets were seen" in session.summary()
    assert not [tag for tag in writer.tags() if tag.startswith(("calibration", "uncertainty"))]


def test_what_else_is_learned_may_join_the_loss_of_each_example():
    """Or the logarithms of all classes, where nothing but a choice follows."""
    model, other = net(), nn.Linear(4, 3)
    rows = torch.arange(32)
    for loss in (
        lambda p, q, y: (q.square().mean(-1) - p[rows, y]).mean(),
        lambda p, q, y: -(p[:, :, None] + q.log_softmax(-1)[:, None])[rows, y, 0].mean(),
    ):
        writer, (x, y) = MemoryWriter(), batch(0)
        with watch(model, writer) as session:
            loss(model(x).log_softmax(-1), other(x), y).backward()
            session.next_step()
        assert_calibration(writer, 1, model(x).softmax(-1), y)

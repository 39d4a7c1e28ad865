"""A probe of your own: how a mixture of experts shares out its tokens, and how evenly its router would.

`select=` hands this probe the routers alone, and leaves the other probes what they watch.
"""

import argparse

import numpy as np
import torch
from torch import nn

import torchprobe

EXPERTS = 4


class ExpertRouting(torchprobe.Probe):
    """Load: share of tokens that each expert takes. Entropy in nats of the mean routing distribution."""

    source = "outputs"
    fields = (*(f"tokens_{i}" for i in range(EXPERTS)), *(f"mass_{i}" for i in range(EXPERTS)))
    reduce = "sum"
    descriptions = {
        "router_load": "Share of tokens by expert (exact).",
        "router_entropy": f"Entropy of the mean routing distribution in nats, at most {np.log(EXPERTS):.2f} (exact).",
    }

    def compute(self, tensor):
        p = tensor.float().flatten(0, -2).softmax(-1)
        return torch.cat((nn.functional.one_hot(p.argmax(-1), EXPERTS).sum(0), p.sum(0)))

    def report(self, name, values):
        tokens, mass = np.reshape(list(values.values()), (2, EXPERTS))
        p = mass / mass.sum()
        yield f"router_load/{name}", (tokens / tokens.sum()).astype(np.float32)
        yield f"router_entropy/{name}", float(-(p * np.log(np.maximum(p, 1e-30))).sum())


class Experts(nn.Module):
    """The best expert for each token, weighted by the router's probability."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, EXPERTS)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(EXPERTS)])

    def forward(self, x):
        p, best = self.router(x).softmax(-1).max(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return p.unsqueeze(-1) * outputs[torch.arange(len(x)), best]


def main(steps: int = 50, log_dir: str = "runs/expert_routing") -> torchprobe.Session:
    """Train one such layer on noise."""
    torch.manual_seed(0)
    model = nn.Sequential(Experts(8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    probes = [ExpertRouting(every=10, select="*.router"), torchprobe.Gradients(every=10)]
    with torchprobe.instrument(model, log_dir=log_dir, probes=probes) as session:
        for _ in range(steps):
            x = torch.randn(64, 8)
            nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return session


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--log-dir", default="runs/expert_routing")
    arguments = parser.parse_args()
    print(main(arguments.steps, arguments.log_dir).summary())

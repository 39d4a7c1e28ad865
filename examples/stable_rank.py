"""A probe of your own: the stable rank of every linear layer's weight, which is at most its rank.

The squared Frobenius norm over the squared spectral norm (Rudelson and Vershynin 2007) falls when a few directions take
over.
"""

import argparse

import torch
from torch import nn

import torchprobe


class StableRank(torchprobe.Probe):
    """Of every weight that is a matrix; one of which each rank has a part is left out, for parts do not tell it."""

    source = "parameters"
    fields = ("stable_rank",)
    descriptions = {"stable_rank": "Squared Frobenius norm over squared spectral norm of the weight (exact)."}

    def __init__(self, every=None):
        super().__init__(every, select=lambda name, parameter: parameter.dim() == 2)

    def compute(self, tensor):
        values = torch.linalg.svdvals(tensor.float())
        return (values.square().sum() / values[0].square()).reshape(1)

    def combine(self, a, b):
        return torch.full_like(a, torch.nan)

    def report(self, name, values):
        if values["stable_rank"] == values["stable_rank"]:
            yield f"stable_rank/{name}", values["stable_rank"]


def main(steps: int = 50, log_dir: str = "runs/stable_rank") -> torchprobe.Session:
    """Train a small network on a target of one direction: its weights follow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, log_dir=log_dir, probes=[StableRank(every=10)]) as session:
        for _ in range(steps):
            x = torch.randn(64, 8)
            nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return session


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--log-dir", default="runs/stable_rank")
    arguments = parser.parse_args()
    print(main(arguments.steps, arguments.log_dir).summary())

"""A probe of your own in a dozen lines: the share of tanh units that are saturated.

A probe says what it captures (`source`), computes one value per name in `fields` on the device, and reports
tags on the host. `reduce` says how parts of a step are merged (micro-batches, repeated calls, ranks): here both counts
add up, so that the share is exact however the batch was cut.
"""

import argparse

import torch
from torch import nn

import torchprobe


class SaturatedUnits(torchprobe.Probe):
    """Share of outputs beyond 0.9 in magnitude, where tanh hardly passes a gradient."""

    source = "outputs"
    fields = ("saturated", "count")
    reduce = "sum"
    default_every = 10
    descriptions = {"saturated": "Share of the module's outputs with a magnitude above 0.9 (exact)."}

    def compute(self, tensor):
        saturated = (tensor.abs() > 0.9).sum()
        return torch.stack([saturated, torch.full_like(saturated, tensor.numel())])

    def report(self, name, values):
        yield f"saturated/{name}", values["saturated"] / values["count"]


def main(steps: int = 50, log_dir: str = "runs/custom_probe") -> torchprobe.Session:
    """Train a small tanh network on noise with that probe alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with torchprobe.instrument(model, log_dir=log_dir, probes=[SaturatedUnits(select=["1", "3"])]) as session:
        for _ in range(steps):
            x = 2 * torch.randn(64, 8)
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return session


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--log-dir", default="runs/custom_probe")
    arguments = parser.parse_args()
    print(main(arguments.steps, arguments.log_dir).summary())

"""A probe of your own, of two sources: the gradient noise scale of McCandlish et al. 2018 (An Empirical Model of
Large-Batch Training, appendix A.1), about the batch size up to which more examples still speed training up.

It compares the gradients of micro-batches with their mean, so it needs two or more of them in a step, and gradients
that are not clipped. A ratio of two estimates: look at its mean over many steps.
"""

import argparse

import torch
from torch import nn

import torchprobe


class GradientNoiseScale(torchprobe.Probe):
    """`noise_scale/examples`; examples: in a micro-batch. Any factor of the loss cancels, GradScaler's by `degrees`."""

    source, fields, degrees = ("micro_gradients", "gradients"), ("squares", "batches", "ranks"), (2, 0, 0)

    def __init__(self, examples, every=None):
        super().__init__(every)
        self.examples = examples

    def compute(self, tensor):
        return torch.cat((tensor.float().square().sum().reshape(1), torch.ones(2, device=tensor.device)))

    def combine(self, a, b):  # micro-batches of a rank
        return torch.cat((a[:2] + b[:2], torch.maximum(a[2:], b[2:])))

    def combine_rows(self, a, b):  # those of two ranks
        return a + b

    def report_sources(self, values):
        found = [v for v in values.values() if len(v) == 2]
        small, big = (sum(v[source]["squares"] for v in found) for source in self.source)
        n, ranks = (max((v["micro_gradients"][key] for v in found), default=1) for key in ("batches", "ranks"))
        small, big = small / n, big * (ranks / n) ** 2  # square norm of one gradient, and of the mean of all
        if n > 1 and n * big > small:  # else noise is all there is
            yield "noise_scale/examples", self.examples * n * (small - big) / (n * big - small)


def main(steps: int = 50, log_dir: str = "runs/noise_scale") -> torchprobe.Session:
    """Train a linear model with four micro-batches of eight examples a step."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with torchprobe.instrument(model, log_dir=log_dir, probes=[GradientNoiseScale(8, every=5)]) as session:
        for _ in range(steps):
            for _ in range(4):
                x = torch.randn(8, 8)
                y = x.sum(1, keepdim=True) + torch.randn(8, 1)
                (nn.functional.mse_loss(model(x), y) / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
    return session


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--log-dir", default="runs/noise_scale")
    arguments = parser.parse_args()
    print(main(arguments.steps, arguments.log_dir).summary())

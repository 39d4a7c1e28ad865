"""The one line, in an ordinary training loop: python examples/quickstart.py, then torchprobe view runs/quickstart."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import torchprobe


def spiral(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on two intertwined spirals, and which of the two each is on."""
    labels = torch.randint(0, 2, (count,))
    angle = torch.rand(count) * 3 * torch.pi + 0.5
    points = torch.stack(
        [angle * torch.cos(angle + labels * torch.pi), angle * torch.sin(angle + labels * torch.pi)], 1
    )
    return points / 10 + torch.randn(count, 2) * 0.02, labels


def main(steps: int = 500, log_dir: str = "runs/quickstart") -> float:
    """Train, and return the accuracy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    session = torchprobe.instrument(model, log_dir=log_dir, every=20)  # the only line added

    for _ in range(steps):
        points, labels = spiral(256)
        loss = F.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    session.detach()
    points, labels = spiral(1000)
    return (model(points).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--log-dir", default="runs/quickstart")
    arguments = parser.parse_args()
    print(f"accuracy {main(arguments.steps, arguments.log_dir):.3f}; torchprobe view {arguments.log_dir}")

"""Small models, and the pieces of the training loops that users write around them."""

from __future__ import annotations

import torch
from torch import nn

from tests.setups.reference import gradients, l2
from torchprobe.testing import MemoryWriter

TOTAL = "overview/grad_norm"


class TwoParts(nn.Module):
    """Two parts that the user calls one at a time, as in a GAN: the model itself has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(3, 4)
        self.critic = nn.Linear(4, 1)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def batch(seed: int = 0, size: int = 6, width: int = 4) -> torch.Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int = 0, size: int = 6) -> torch.Tensor:
    return model(batch(seed, size)).square().mean()


def sgd(model: nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    """One plain iteration; the norm of all gradients that the optimizer used."""
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    total = l2(*gradients(model).values())
    optimizer.step()
    return total


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Backward and step; the gradients that were used."""
    optimizer.zero_grad()
    loss.backward()
    used = gradients(model)
    optimizer.step()
    return used


def steps(writer: MemoryWriter, tag: str) -> list[int]:
    return [step for step, _ in writer.scalars(tag)]


def values(writer: MemoryWriter, tag: str) -> list[float]:
    return [value for _, value in writer.scalars(tag)]


def validate(model: nn.Module, seed: int, batches: int = 2) -> float:
    """A validation pass; the mean of the first batch's logits."""
    model.eval()
    with torch.no_grad():
        means = [model(batch(seed + i)).double().mean().item() for i in range(batches)]
    model.train()
    return means[0]

"""A classifier, the ways to write its loss, and the losses that were recorded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchprobe.testing import MemoryWriter

TAG = "overview/loss"


F = nn.functional


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(seed: int = 0, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


CRITERION = nn.CrossEntropyLoss()


MARGIN = nn.MultiMarginLoss()


WAYS = {
    "loss module": lambda out, y: CRITERION(out, y),
    "functional": lambda out, y: F.cross_entropy(out, y),
    "functional by hand": lambda out, y: -out.log_softmax(-1)[torch.arange(len(y)), y].mean(),
    "two loss modules added": lambda out, y: CRITERION(out, y) + 0.5 * MARGIN(out, y),
    "two functional losses added": lambda out, y: F.cross_entropy(out, y) + 0.5 * F.multi_margin_loss(out, y),
    "a module of the user's own": lambda out, y: Focal()(out, y),
}


class Focal(nn.Module):
    """A loss whose class torch does not know."""

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        p = out.softmax(-1)[torch.arange(len(y)), y]
        return (-((1 - p) ** 2) * p.log()).mean()


def losses(writer: MemoryWriter) -> list[float]:
    return [loss for _, loss in writer.scalars(TAG)]

"""A small model with everything in it that probes look at, and how it is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.clocks import reproducible
from torchprobe.testing import MemoryWriter


class Net(nn.Module):
    """Tokens to classes: attention, normalisation, units that may die."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.units = nn.ReLU()
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.units(self.block(self.embed(tokens)).mean(1)))


def batch(device=None, size=8):
    return torch.randint(0, 11, (size, 6), device=device), torch.randint(0, 5, (size,), device=device)


class MicroNorm(torchprobe.Probe):
    """Reads the gradients of each backward pass by itself."""

    source, fields, reduce = "micro_gradients", ("squares",), "sum"

    def compute(self, tensor):
        return tensor.double().square().sum().reshape(1)

    def report(self, name, values):
        yield f"micro/{name}", values["squares"]


def everything():
    """A probe of each kind and of each source, at every step."""
    names = ("ActivationGradients", "Activations", "Attention", "Calibration", "Gradients", "Histograms")
    names += ("LearningRates", "Loss", "Parameters", "Provenance", "Uncertainty", "UnitActivity", "Updates")
    return [*(getattr(torchprobe, name)(every=1) for name in names), MicroNorm(every=1)]


def step(model, optimizer, tokens, targets):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(tokens), targets)
    loss.backward()
    optimizer.step()
    return loss


def values(writer: MemoryWriter) -> dict[int, dict[str, object]]:
    """By step and tag, but for how long things took."""
    found: dict[int, dict[str, object]] = {}
    for record in writer.records:
        timeless = {tag: value for tag, value in record.values.items() if reproducible(tag)}
        found.setdefault(record.step, {}).update(timeless)
    return found


def scalars(writer: MemoryWriter) -> dict[tuple[int, str], float]:
    return {(k, tag): v for k, tags in values(writer).items() for tag, v in tags.items() if isinstance(v, float)}

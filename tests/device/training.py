"""A small model with everything in it that probes look at, and how it is trained."""

from __future__ import annotations

import math

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


def goes_wrong_unsampled(device: torch.device, bad: str, of: str, parts: int = 1) -> None:
    """NaN in step 4, of which nothing else of the run tells: no loss, no statistics. The next are looked at closely."""
    torch.manual_seed(0)
    with device:
        model, writer, now = Net(), MemoryWriter(), [0]
        model.block.register_forward_hook(lambda m, i, out: out * math.nan if now[0] == 4 and bad == "forward" else out)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        probes, rules = [torchprobe.Provenance(every=100)], ["non_finite"]
        with torchprobe.instrument(model, writer=writer, probes=probes, rules=rules) as session:
            for now[0] in range(1, 8):
                optimizer.zero_grad()
                for part in range(parts):
                    tokens, targets = batch()
                    loss = F.cross_entropy(model(tokens), targets)
                    (loss * math.nan if now[0] == 4 and bad == "backward" and part == 0 else loss).backward()
                optimizer.step()
                session.flush()
    assert min(alert.step for alert in session.alerts) == 4
    written = scalars(writer)
    assert (4, f"nonfinite/{of}") in written
    assert not [key for key in written if key[0] < 4 and key[1].startswith("nonfinite/")]
    later = [tag for number, tags in values(writer).items() if number > 4 for tag in tags]
    assert any(tag.startswith("provenance/") for tag in later)

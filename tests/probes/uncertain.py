"""Models that tell of their uncertainty, and how to watch them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.testing import MemoryWriter

KINDS = ("total", "aleatoric", "epistemic")


class Gives(nn.Module):
    """Returns what it is told to."""

    def __init__(self, give) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.give = give

    def forward(self, x: Tensor):
        return self.give(self.fc(x))


def watch(model: nn.Module, writer: MemoryWriter, **options) -> torchprobe.Session:
    probes = [torchprobe.Uncertainty(**options), torchprobe.Calibration()]
    return torchprobe.instrument(model, writer=writer, probes=probes, every=1)


def one_step(model: nn.Module, x: Tensor, **options) -> MemoryWriter:
    writer = MemoryWriter()
    with watch(model, writer, **options) as session, torch.no_grad():
        model(x)
        session.next_step()
    return writer


def found(writer: MemoryWriter, where: str = "root", prefix: str = "", step: int | None = None) -> dict[str, float]:
    tags = {kind: f"{prefix}uncertainty_{kind}/{where}" for kind in KINDS}
    return {kind: writer.value(tag, step) for kind, tag in tags.items() if tag in writer.tags()}


def bald(p: Tensor) -> dict[str, float]:
    """From (members, batch, classes) probabilities, in float64."""
    p = p.detach().double()
    total = torch.special.entr(p.mean(0)).sum(-1)
    aleatoric = torch.special.entr(p).sum(-1).mean(0)
    return {
        "total": total.mean().item(),
        "aleatoric": aleatoric.mean().item(),
        "epistemic": (total - aleatoric).clamp(min=0).mean().item(),
    }

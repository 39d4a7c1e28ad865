"""A model of many modules: what is looked up in it is looked up once a step or validation pass, not at each batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from torchprobe.capture.predictions import hooks
from torchprobe.testing import MemoryWriter


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_modules_are_walked_once_however_many_batches_validation_has(monkeypatch):
    walks, hookable = [], hooks.hookable
    monkeypatch.setattr(hooks, "hookable", lambda *args: walks.append(1) or hookable(*args))
    model, writer = Stack(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    judge = nn.CrossEntropyLoss()
    probes = [torchprobe.Uncertainty(every=1), torchprobe.Calibration(every=1)]
    with torchprobe.instrument(model, writer=writer, probes=probes, rules=[]):
        for _ in range(2):
            F.cross_entropy(model(torch.randn(16, 4)), torch.randint(4, (16,))).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                for _ in range(10):
                    judge(model(torch.randn(16, 4)), torch.randint(4, (16,)))
            model.train()
    assert [count for _, count in writer.scalars("val/calibration/count")] == [160, 160]
    assert len(walks) == 4

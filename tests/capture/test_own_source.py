"""A source of a user's own: what it raises ends its own probes alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.capture import source as sources
from torchprobe.probes import checks
from torchprobe.testing import MemoryWriter

METHODS = ("open", "enter", "leave", "exit", "merge", "rows", "detach")


class Faulty:
    """Raises in one of its methods, and keeps a number of each pass."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, model, reporters):
        return self

    def __getattr__(self, name: str):
        if name not in METHODS:
            raise AttributeError(name)
        return lambda *arguments: self.run(name, arguments)

    def run(self, name, arguments):
        if name == self.where:
            raise RuntimeError("of the user's")
        if name == "leave":
            arguments[0].keep(self, 1)
        return {"merge": 2, "rows": []}.get(name)


@pytest.mark.parametrize("where", METHODS)
def test_a_source_that_raises_ends_its_own_probes_alone(monkeypatch, caplog, where):
    monkeypatch.setattr(sources, "_makers", {"mine": Faulty(where)})
    monkeypatch.setattr(checks, "_registered", {"mine": None})

    class Own(torchprobe.Probe):
        source = "mine"
        fields = ("x",)
        reduce = "sum"

    model, writer = nn.Linear(4, 2), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Gradients(every=1), Own(every=1)]) as session:
        for _ in range(3):
            for _ in range(2):
                model(torch.randn(3, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [step for step, _ in writer.scalars("overview/grad_norm")] == [1, 2, 3]
    assert sum("is switched off" in message for message in caplog.messages) == 1
    assert session.summary().count("Own is left out: its capture raised") == 1

"""Tensors without an address between modules: nothing is told of them, and diagnoses go on."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.scale, self.kind = nn.Parameter(torch.ones(8)), kind

    def forward(self, x):
        y = x * self.scale
        return (
            y.to_sparse()
            if self.kind == "sparse"
            else torch.nested.as_nested_tensor([y[:3], y[3:]], layout=torch.jagged)
        )


@pytest.mark.parametrize("kind", ["sparse", "jagged"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_tensor_without_an_address_switches_no_probe_off(kind, caplog):
    model = nn.Sequential(nn.Linear(4, 8), Odd(kind), nn.Linear(8, 1))
    back = (lambda y: y.to_dense()) if kind == "sparse" else (lambda y: torch.cat(list(y.unbind())))
    model[2].register_forward_pre_hook(lambda module, args: (back(args[0]),))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING), torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        for _ in range(3):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not [line for line in caplog.messages if "switched off" in line]


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.ModuleDict])
def test_a_container_that_holds_none_switches_no_probe_off(kind, caplog):
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Linear(4, 4), None, nn.Linear(4, 4)]
            self.layers = kind(layers if kind is nn.ModuleList else {str(i): one for i, one in enumerate(layers)})

        def forward(self, x):
            for layer in self.layers.children():
                x = layer(x).tanh()
            return x

    model = Holds()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING), torchprobe.instrument(model, writer=MemoryWriter(), every=1) as session:
        for _ in range(3):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert "failed" not in caplog.text
    assert "is left out" not in session.summary()

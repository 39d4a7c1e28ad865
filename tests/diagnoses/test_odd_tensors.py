"""Tensors without an address between modules: nothing is told of them, and diagnoses go on."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.capture.diagnosis.evidence import structure_of
from torchprobe.testing import MemoryWriter

SAID = {"sparse": "torch.sparse_coo", "jagged": "nested", "nested": "nested"}


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.scale, self.kind = nn.Parameter(torch.ones(8)), kind

    def forward(self, x):
        y = x * self.scale
        layout = torch.jagged if self.kind == "jagged" else torch.strided
        return y.to_sparse() if self.kind == "sparse" else torch.nested.as_nested_tensor([y[:3], y[3:]], layout=layout)


@pytest.mark.parametrize("kind", ["sparse", "jagged", "nested"])
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
    said = [line for line in caplog.messages if "tensors are left out" in line]
    assert said == [f"outputs that are {SAID[kind]} tensors are left out: statistics are of dense ones"]


class Complex(nn.Module):
    """Weights whose real parts are all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8, dtype=torch.complex64), nn.Linear(8, 1)
        with torch.no_grad():
            torch.view_as_real(self.first.weight)[..., 0] = 0.5

    def forward(self, x):
        return self.last(self.first(x.to(torch.complex64)).abs())


def test_complex_weights_are_read_by_both_parts(caplog):
    torch.manual_seed(0)
    model, always = Complex(), torch.is_warn_always_enabled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert dict(structure_of(model))["constant/first.weight"] == 0
    torch.set_warn_always(True)
    try:
        with caplog.at_level(logging.WARNING), torchprobe.instrument(model, writer=MemoryWriter(), every=1) as session:
            for _ in range(4):
                model(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.set_warn_always(always)
    assert "failed" not in caplog.text
    assert session.alerts == []


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_model_of_nested_tensors_trains_and_what_has_no_shape_switches_no_probe_off(layout, caplog):
    torch.manual_seed(0)
    model, writer, losses = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), MemoryWriter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING), torchprobe.instrument(model, writer=writer, every=1):
        for _ in range(4):
            x = torch.nested.as_nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=layout)
            loss = torch.cat(list(model(x).unbind())).square().mean()
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            losses.append(loss.item())
            with torch.no_grad():
                model.eval()(x), model.train()
    assert "failed" not in caplog.text
    assert [value for _, value in writer.scalars("overview/loss")] == pytest.approx(losses)


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


class Convolves(nn.Module):
    """As a network of graphs: features and neighbours are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, features, neighbours):
        return torch.sparse.mm(neighbours, torch.sparse.mm(features, self.weight))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr])
def test_sparse_inputs_of_a_classifier_switch_no_probe_off(layout, caplog):
    torch.manual_seed(0)
    model, writer, targets = Convolves(), MemoryWriter(), torch.arange(40) % 3
    inputs = [
        x.to_sparse(layout=layout) if layout is not torch.strided else x for x in (torch.rand(40, 6), torch.eye(40))
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING), torchprobe.instrument(model, writer=writer, every=1):
        for _ in range(3):
            nn.functional.cross_entropy(model(*inputs), targets).backward()
            optimizer.step(), optimizer.zero_grad()
    assert "failed" not in caplog.text
    assert writer.scalars("calibration/count") == [(1, 40.0), (2, 40.0), (3, 40.0)]


def test_a_first_input_of_one_value_draws_no_warning(caplog):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING), torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        for _ in range(3):
            model(torch.ones(1, 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not [line for line in caplog.messages if "switched off" in line]

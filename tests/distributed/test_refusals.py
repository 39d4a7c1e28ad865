"""DataParallel is refused, and the copies that it makes of an instrumented model are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter


class Wrapping(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: Wrapping(nn.DataParallel(m)), lambda m: nn.DataParallel(Wrapping(m))]
)
def test_data_parallel_is_refused_with_the_way_out(wrap):
    model = wrap(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: got a DataParallel.* takes DistributedDataParallel"):
        torchprobe.instrument(model, writer=MemoryWriter())


def replica_of(module: nn.Module) -> nn.Module:
    """As DataParallel makes them on several devices: hooks and all, with parameters that are no leaves."""
    replica = module._replicate_for_data_parallel()
    replica._modules = {name: replica_of(child) for name, child in module._modules.items()}
    for name, parameter in module._parameters.items():
        setattr(replica, name, parameter.clone())
    return replica


def test_replicas_of_an_instrumented_model_are_not_seen():
    model, writer = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probes = [torchprobe.Activations(every=1), torchprobe.Gradients(every=1), torchprobe.UnitActivity(every=1)]
    with torchprobe.instrument(model, writer=writer, probes=probes) as session:
        first, second = replica_of(model), replica_of(model)
        (first(torch.ones(2, 3)).sum() + second(torch.ones(50, 3)).sum()).backward()
        optimizer.step()
        assert session.step == 1
    tags = writer.tags()
    assert "grad_norm/0.weight" in tags
    assert not [tag for tag in tags if tag.startswith(("activation", "dead_units"))]


def test_the_model_itself_is_seen_beside_its_replicas():
    model, writer = nn.Sequential(nn.Linear(3, 4)), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Activations(every=1)]):
        replica_of(model)(torch.full((2, 3), 100.0))
        out = model(torch.ones(2, 3))
        out.sum().backward()
        optimizer.step()
    assert writer.scalars("activation_mean/0") == [(1, pytest.approx(out.mean().item()))]

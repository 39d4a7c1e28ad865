"""Sessions that began without other ranks, and what `summary()` says of those that there are."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchprobe
from tests.distributed.launch import need_sharding
from torchprobe.distributed.world import World, world
from torchprobe.testing import MemoryWriter


@pytest.fixture
def group(tmp_path):
    """Makes the process group of a rank that need not wait for the others."""

    def make(rank: int, size: int) -> None:
        dist.init_process_group("fake", rank=rank, world_size=size, store=dist.HashStore())

    pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def trained(session: torchprobe.Session, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    session.flush()


def test_a_rank_that_began_alone_says_once_that_every_rank_writes(group, caplog):
    model, writer = nn.Linear(3, 1), MemoryWriter()
    with torchprobe.instrument(model, writer=writer) as session:
        group(1, 2)
        trained(session, model)
        trained(session, model)
    said = [r.getMessage() for r in caplog.records if "init_process_group" in r.getMessage()]
    assert len(said) == 1
    assert "each rank writes a run of its own, rank 1 too" in said[0]
    assert session.step == 2
    assert {record.step for record in writer.records} == {1, 2}


@pytest.mark.parametrize("rank", [None, 0])
def test_rank_0_and_a_process_without_ranks_say_nothing(group, caplog, rank):
    model = nn.Linear(3, 1)
    with torchprobe.instrument(model, writer=MemoryWriter()) as session:
        if rank is not None:
            group(rank, 2)
        trained(session, model)
    assert "init_process_group" not in caplog.text
    assert "ranks" not in session.summary()


@pytest.mark.parametrize("zeroed", [True, False])
def test_diagnoses_look_at_what_a_rank_has_of_sharded_parameters(group, caplog, zeroed):
    """Asking no other rank: the parts are no plain tensors, which once ended the probe."""
    need_sharding()
    group(0, 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    mesh = init_device_mesh("cpu", (1,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)  # not the first layer's
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1) as session:
        for _ in range(5):
            model(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
            if zeroed:
                model.zero_grad()
    assert "failed" not in caplog.text
    found = {alert.rule for alert in session.alerts}
    assert found == {"unoptimized_parameters"} | (set() if zeroed else {"missing_zero_grad"})


def test_torchruns_environment_says_the_rank_before_the_group_is_there(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world() == World(3, 8)
    monkeypatch.setenv("RANK", "three")
    assert world() == World(0, 1)


def test_the_summary_names_ranks_that_are_absent(group, monkeypatch):
    monkeypatch.setattr("torchprobe.distributed.gatherer.GRACE", 0.0)
    group(0, 3)
    model = nn.Linear(3, 1)
    with torchprobe.instrument(model, writer=MemoryWriter()) as session:
        trained(session, model)
        line = "  ranks             3; absent or late: 1, 2; steps that lack a rank: 1"
        assert line in session.summary().splitlines()


def test_the_summary_of_another_rank_says_where_its_values_go(group):
    group(2, 3)
    model, writer = nn.Linear(3, 1), MemoryWriter()
    with torchprobe.instrument(model, writer=writer) as session:
        trained(session, model)
        line = "  ranks             this is rank 2 of 3, whose values go to rank 0"
        assert line in session.summary().splitlines()
    assert writer.records == []

"""Several ranks: sharded models, and replicated ones whose random numbers differ."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import warm
from tests.distributed.launch import need_sharding
from torchprobe import CheckpointManager

dist = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

START = """
import os, sys, torch, torchprobe
from pathlib import Path
import torch.distributed as dist
from torch import nn
from torchprobe import CheckpointManager
from torchprobe.testing import MemoryWriter

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, directory = dist.get_rank(), sys.argv[1]

def model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))

def train(model, optimizer, steps):
    for _ in range(steps):
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

def weights(model):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]

def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
"""

SHARDED = (
    START
    + """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

mesh = init_device_mesh("cpu", (2,))

def make(seed):
    made = model(seed)
    fully_shard(made[0], mesh=mesh)
    fully_shard(made, mesh=mesh)
    return made, torch.optim.AdamW(made.parameters(), lr=0.05)

manager = CheckpointManager(directory, max_keep=2)
first, optimizer = make(0)
torch.manual_seed(rank)  # every rank draws its own dropout
session = torchprobe.instrument(first, writer=MemoryWriter(), probes=[])
train(first, optimizer, 2)
manager.save_checkpoint(first, optimizer, metrics={"val_loss": 1.0 + rank})
train(first, optimizer, 1)
manager.save_checkpoint(first, optimizer, metrics={"val_loss": 2.0 - rank})
assert session.step == 3, session.step
train(first, optimizer, 2)
expected, drawn = weights(first), torch.rand(3)
session.detach()

second, optimizer = make(5)
session = torchprobe.instrument(second, writer=MemoryWriter(), probes=[])
info = CheckpointManager(directory).restore(second, optimizer)
assert info["step"] == 3, info
assert session.step == 3, session.step
train(second, optimizer, 2)
assert session.step == 5
assert equal(weights(second), expected)
assert torch.equal(torch.rand(3), drawn)
session.detach()

other = nn.Sequential(nn.Linear(6, 4))
fully_shard(other, mesh=mesh)
try:
    manager.restore(other)
except ValueError as error:
    assert "only in the saved one: 2.bias, 2.weight" in str(error), error
else:
    raise AssertionError("another model was restored")

alone = CheckpointManager(directory + "_alone")
alone._rank_file = lambda step: Path(directory) / "missing" / "states.pt"
try:
    alone.save_checkpoint(second, step=9)
except OSError:
    assert rank == 1
else:
    assert rank == 0, "rank 1 did not hear that its random states are lost"
dist.barrier()  # and nobody waits for it

if rank == 0:
    folder = os.path.join(directory, "step_0000000003.sharded")
    for name in os.listdir(folder):
        if name.endswith(".distcp"):
            os.truncate(os.path.join(folder, name), 100)
dist.barrier()
third, optimizer = make(5)
assert manager.restore(third, optimizer)["step"] == 2
dist.destroy_process_group()
"""
)

REPLICATED = (
    START
    + """
from torch.nn.parallel import DistributedDataParallel

def make(seed):
    made = DistributedDataParallel(model(seed))
    return made, torch.optim.AdamW(made.parameters(), lr=0.05)

manager = CheckpointManager(directory, max_keep=1)
first, optimizer = make(0)
torch.manual_seed(rank)
train(first, optimizer, 2)
path = manager.save_checkpoint(first, optimizer, step=2)
assert (path is not None) == (rank == 0)
train(first, optimizer, 2)
expected, drawn = weights(first), torch.rand(3)
second, optimizer = make(5)
dist.barrier()
assert manager.restore(second, optimizer)["step"] == 2
train(second, optimizer, 2)
assert equal(weights(second), expected)
assert torch.equal(torch.rand(3), drawn)
for step in (3, 4):
    manager.save_checkpoint(first, optimizer, step=step)
    dist.barrier()
if rank == 0:
    manager.save_checkpoint(first, optimizer, step=5)
dist.destroy_process_group()
"""
)


def run_on_two_ranks(script: str, directory: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = [
        subprocess.Popen(
            [*warm.python(), "-W", "ignore", "-c", script, str(directory)],
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "WORLD_SIZE": "2",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [(process.communicate(timeout=200)[1], process.returncode) for process in started]
    assert [code for _, code in results] == [0, 0], "\n".join(text for text, _ in results)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    need_sharding()
    directory = tmp_path_factory.mktemp("sharded")
    run_on_two_ranks(SHARDED, directory)
    return directory


def plain_model():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))


def test_a_sharded_run_goes_on_bitwise_on_every_rank(sharded):
    names = {path.name for path in sharded.iterdir()}
    assert names == {
        "step_0000000002.best.sharded",
        "step_0000000002.rank1.pt",
        "step_0000000003.sharded",
        "step_0000000003.rank1.pt",
    }


def test_one_process_reads_it_whole_and_into_a_plain_model(sharded, caplog):
    with caplog.at_level(logging.WARNING, "torchprobe"):
        manager = CheckpointManager(sharded)
        found = manager.load_latest()
        model = plain_model()
        optimizer = torch.optim.AdamW(model.parameters())
        assert manager.restore(model, optimizer)["step"] == found["step"] == 2
    assert "step_0000000003.sharded is damaged and skipped" in caplog.text
    assert found["model"]["0.weight"].shape == (8, 6)
    assert torch.equal(model[0].weight, found["model"]["0.weight"])
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (8, 6)


def test_ranks_of_a_replicated_model_get_their_own_random_numbers_back(tmp_path):
    run_on_two_ranks(REPLICATED, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000000005.pt"]

"""Four ranks that hold parts of a model: FSDP2, FSDP1, tensor parallelism, two-dimensional meshes; run by `test_sharded.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchprobe
from tests.distributed import training as t
from torchprobe.testing import MemoryWriter


def watched(
    model: nn.Module, wrap: Callable[[nn.Module], nn.Module], before: bool, run: Callable[[nn.Module], Any]
) -> Any:
    """What rank 0 records of a run of a wrapped model that is instrumented before or after wrapping."""
    writer = MemoryWriter()
    if before:
        session = torchprobe.instrument(model, writer=writer, probes=t.probes())
        model = wrap(model)
    else:
        model = wrap(model)
        session = torchprobe.instrument(model, writer=writer, probes=t.probes())
    with session:
        run(model)
    found = t.values(writer)
    found["dropped"] = session._outlet.drain.dropped
    return found


def plain_run(ranks: int, rank: int) -> Callable[[nn.Module], Any]:
    batches = [[t.part(t.tokens(k), rank, ranks)] for k in range(t.STEPS)]
    return lambda model: t.train(model, batches, optimizer=t.sgd(model))


def blocks_and_root(**options: Any) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        for block in model.blocks:
            fully_shard(block, **options)
        return fully_shard(model, **options)

    return wrap


def fsdp2() -> dict[str, Any]:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (4,))
    run = plain_run(4, rank)
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return {
        "blocks and root": watched(t.scaled(), blocks_and_root(mesh=mesh), False, run),
        "instrumented before": watched(t.scaled(), blocks_and_root(mesh=mesh), True, run),
        "not resharded": watched(t.scaled(), blocks_and_root(mesh=mesh, reshard_after_forward=False), False, run),
        "root only": watched(t.scaled(), lambda model: fully_shard(model, mesh=mesh), False, run),
        "hybrid": watched(t.scaled(), blocks_and_root(mesh=hybrid), False, run),
        "mixed precision": watched(t.scaled(), blocks_and_root(mesh=mesh, mp_policy=bf16), False, run),
    }


def main(out: Path) -> Any:
    return fsdp2()

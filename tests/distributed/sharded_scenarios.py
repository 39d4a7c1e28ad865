"""Four ranks that hold parts of a model: FSDP2, FSDP1, tensor parallelism, meshes of two dimensions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

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


def plain_run(ranks: int, rank: int, limit: float | None = None) -> Callable[[nn.Module], Any]:
    batches = [[t.part(t.tokens(k), rank, ranks)] for k in range(t.STEPS)]
    return lambda model: t.train(model, batches, optimizer=t.sgd(model), limit=limit)


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
        "clipped": watched(t.scaled(), blocks_and_root(mesh=mesh), False, plain_run(4, rank, t.LIMIT)),
        "mixed precision": watched(t.scaled(), blocks_and_root(mesh=mesh, mp_policy=bf16), False, run),
    }


def accumulated() -> dict[str, Any]:
    """Two micro-batches a step, the first without a reduction, and a validation pass after each step."""
    rank = dist.get_rank()

    def run(model: nn.Module) -> None:
        optimizer = t.sgd(model)
        for k in range(t.STEPS):
            for i, ids in enumerate(t.micro_batches(k)):
                model.set_requires_gradient_sync(i == 1)
                ids = t.part(ids, rank, 4)
                (t.loss_of(model(ids), ids) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            t.validate(model, t.part(t.tokens(100 + k), rank, 4))

    mesh = init_device_mesh("cpu", (4,))
    return {
        "accumulated": watched(t.scaled(), blocks_and_root(mesh=mesh), False, run),
        "accumulated, root only": watched(t.scaled(), lambda model: fully_shard(model, mesh=mesh), False, run),
    }


def fsdp1() -> dict[str, Any]:
    def flat(model: nn.Module, **options: Any) -> nn.Module:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = FSDP(block, use_orig_params=True, device_id=torch.device("cpu"), **options)
        return FSDP(model, use_orig_params=True, device_id=torch.device("cpu"), **options)

    run = plain_run(4, dist.get_rank())
    found = {"FSDP1": watched(t.scaled(), flat, False, run), "FSDP1 before": watched(t.scaled(), flat, True, run)}
    found["FSDP1 clipped"] = watched(t.scaled(), flat, False, plain_run(4, dist.get_rank(), t.LIMIT))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
    hybrid = {"device_mesh": mesh, "sharding_strategy": ShardingStrategy.HYBRID_SHARD}
    found["FSDP1 hybrid"] = watched(t.scaled(), lambda model: flat(model, **hybrid), False, run)
    try:
        torchprobe.instrument(FSDP(t.transformer(), device_id=torch.device("cpu")))
    except ValueError as error:
        found["FSDP1 refused"] = str(error)
    return found


def cut(mesh: Any) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        plan = {
            "attention.q": ColwiseParallel(),
            "attention.k": ColwiseParallel(),
            "attention.v": ColwiseParallel(),
            "attention.proj": RowwiseParallel(),
            "mlp.0": ColwiseParallel(),
            "mlp.2": RowwiseParallel(),
        }
        for block in model.blocks:
            parallelize_module(block, mesh, plan)
        return model

    return wrap


def tensor_parallel() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    run = plain_run(1, 0)
    found = {"tensor parallel": watched(t.split_transformer(), cut(mesh), False, run)}
    found["tensor parallel before"] = watched(t.split_transformer(), cut(mesh), True, run)
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def wrap(model: nn.Module) -> nn.Module:
        return blocks_and_root(mesh=both["dp"])(cut(both["tp"])(model))

    run = plain_run(2, both["dp"].get_local_rank())
    found["fully sharded and tensor parallel"] = watched(t.split_transformer(), wrap, False, run)
    return found


def sequence_parallel() -> dict[str, Any]:
    """Norms on parts of the sequence; layers that return DTensors; a layer whose output is not reduced yet."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))

    def wrap(model: nn.Module) -> nn.Module:
        plan = {
            "0": SequenceParallel(),
            "1": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
            "3": RowwiseParallel(output_layouts=Shard(1)),
            "4": SequenceParallel(),
            "5": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True),
        }
        return parallelize_module(model, mesh, plan)

    def run(model: nn.Module) -> None:
        optimizer = t.sgd(model)
        for k in range(t.STEPS):
            x = t.sequences(k).chunk(4, 1)[dist.get_rank()]
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return {"sequence parallel": watched(t.normed(), wrap, False, run)}


def embedding_split_by_rows() -> dict[str, Any]:
    """Its gradient is whole on each rank, where its output leaves by parts of the sequence. Beside it: what is true."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    plan = {
        "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "1": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))
    norms, placements = [], []

    def run(model: nn.Module) -> None:
        sgds = [torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (whole, model)]
        for k in range(t.STEPS):
            ids = torch.randint(0, 20, (3, 8), generator=torch.Generator().manual_seed(k))
            for one, optimizer in zip((whole, model), sgds, strict=True):
                optimizer.zero_grad()
                one(ids).square().mean().backward()
                optimizer.step()
            norms.append({name: p.grad.norm().item() for name, p in whole.named_parameters()})
            placements.append([p.grad.placements == p.placements for p in model.parameters()])
        momentum = sgds[0].state[whole[0].weight]["momentum_buffer"].norm().item()
        norms[-1]["momentum"] = momentum

    found = watched(copy.deepcopy(whole), lambda model: parallelize_module(model, mesh, plan), False, run)
    return {"embedding split by rows": found, "embedding": norms, "placed alike": placements}


def offloaded() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (4,))
    wrap = blocks_and_root(mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return {"offloaded": watched(t.scaled(), wrap, False, plain_run(4, dist.get_rank()))}


def main(out: Path) -> Any:
    return (
        fsdp2()
        | accumulated()
        | fsdp1()
        | tensor_parallel()
        | sequence_parallel()
        | offloaded()
        | embedding_split_by_rows()
    )

"""Two ranks of DistributedDataParallel in its variants; run by `test_ddp.py`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import torchprobe
from tests.distributed import predicting as p
from tests.distributed import training as t
from torchprobe.capture import gate
from torchprobe.testing import MemoryWriter

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "bucket views": {"gradient_as_bucket_view": True},
}


def batches(rank: int) -> list[list[torch.Tensor]]:
    return [[t.part(t.tokens(k), rank, 2)] for k in range(t.STEPS)]


def variant(options: dict[str, Any], instrument: str, limit: float | None = None) -> Any:
    model, writer, session = t.transformer(), MemoryWriter(), None
    if instrument == "model before":
        session = torchprobe.instrument(model, writer=writer, probes=t.probes())
    ddp = DDP(model, **options)
    if session is None:
        session = torchprobe.instrument(model if instrument == "model" else ddp, writer=writer, probes=t.probes())
    with session:
        t.train(ddp, batches(dist.get_rank()), limit=limit)
    return t.values(writer)


def timed() -> Any:
    """A forward pass that takes one second on rank 0 and two on rank 1, by a clock that nothing else moves."""
    rank, writer, now = dist.get_rank(), MemoryWriter(), [1000.0]

    class Slow(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            now[0] += 1.0 + rank
            return super().forward(x)

    ddp = DDP(Slow(4, 1))
    optimizer = t.sgd(ddp)
    real, gate.perf_counter = gate.perf_counter, lambda: now[0]
    try:
        with torchprobe.instrument(ddp, writer=writer, probes=[torchprobe.Performance(every=2)]):
            for _ in range(4):
                ddp(torch.ones(4, 4)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        gate.perf_counter = real
    return {tag: dict(writer.scalars(tag)) for tag in writer.tags() if tag.startswith("performance/")}


def accumulated() -> Any:
    """Two micro-batches a step, the first without a reduction; metrics of the user's; a validation pass after each."""
    rank, writer = dist.get_rank(), MemoryWriter()
    ddp = DDP(t.transformer())
    optimizer = t.sgd(ddp)
    with torchprobe.instrument(ddp, writer=writer, probes=t.probes()) as session:
        for k in range(t.STEPS):
            for i, ids in enumerate(t.micro_batches(k)):
                ids = t.part(ids, rank, 2)
                with nullcontext() if i else ddp.no_sync():
                    (t.loss_of(ddp(ids), ids) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log_metrics({"rank": float(rank), "tensor": torch.tensor(rank + 10.0)}, prefix="mine")
            t.validate(ddp, t.part(t.tokens(100 + k), rank, 2))
    return t.values(writer)


def unequal() -> Any:
    """Batches of 6 and 2 examples; only rank 1 has one to validate on, and nothing learns."""
    rank, writer = dist.get_rank(), MemoryWriter()
    ddp = DDP(t.transformer())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.0)
    batches = [[t.tokens(k)[:6] if rank == 0 else t.tokens(k)[6:]] for k in range(t.STEPS)]

    def validate(k: int) -> None:
        if rank == 1:
            t.validate(ddp.module, t.tokens(100 + k))

    with torchprobe.instrument(ddp, writer=writer, probes=t.probes()):
        t.train(ddp, batches, validate, optimizer)
    return t.values(writer)


class Forked(nn.Module):
    """Each rank takes a branch of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.branches[dist.get_rank()](x))


def forked() -> Any:
    writer = MemoryWriter()
    ddp = DDP(Forked(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    with torchprobe.instrument(ddp, writer=writer, every=1):
        for _ in range(2):
            ddp(torch.ones(3, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return t.values(writer)


def uneven_steps() -> Any:
    """Rank 0 takes four steps and rank 1 two; each by itself."""
    writer, model = MemoryWriter(), t.transformer()
    with torchprobe.instrument(model, writer=writer, probes=t.probes()):
        t.train(model, [[t.tokens(k)] for k in range(4 - 2 * dist.get_rank())])
    return t.values(writer)


def only_rank_0() -> Any:
    """The line stands under `if rank == 0`."""
    ddp, writer = DDP(t.transformer()), MemoryWriter()
    session = torchprobe.instrument(ddp, writer=writer, probes=t.probes()) if dist.get_rank() == 0 else None
    t.train(ddp, batches(dist.get_rank()))
    if session is not None:
        assert session.detach()
    return t.values(writer)


def predicting() -> dict[str, Any]:
    """Rank 0 has 48 of 96 examples, or 80."""
    rank = dist.get_rank()
    half, unequal = p.split(rank, 48), p.split(rank, 80)
    return {
        "classified": p.classify(half, DDP),
        "classified, unequal": p.classify(unequal, DDP),
        "predictions given": p.classify(half, DDP, log_predictions=True),
        "regressed": p.regress(half, DDP),
        "settled": p.settle(half, DDP),
        "never settled": p.settle(half, DDP, classes=False),
    }


def main(out: Path) -> Any:
    found = {f"{name}": variant(options, "ddp") for name, options in VARIANTS.items()}
    found |= {"model": variant({}, "model"), "model before": variant({}, "model before")}
    found |= {
        "clipped": variant({}, "ddp", t.LIMIT),
        "clipped views": variant(VARIANTS["bucket views"], "ddp", t.LIMIT),
    }
    found |= {
        "accumulated": accumulated(),
        "timed": timed(),
        "unequal": unequal(),
        "forked": forked(),
        "uneven": uneven_steps(),
    }
    return found | predicting() | {"only rank 0": only_rank_0()}

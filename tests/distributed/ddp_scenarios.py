"""Two ranks of DistributedDataParallel in its variants; run by `test_ddp.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import torchprobe
from tests.distributed import training as t
from torchprobe.testing import MemoryWriter

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "bucket views": {"gradient_as_bucket_view": True},
}


def batches(rank: int) -> list[list[torch.Tensor]]:
    return [[t.part(t.tokens(k), rank, 2)] for k in range(t.STEPS)]


def variant(options: dict[str, Any], instrument: str) -> Any:
    model, writer, session = t.transformer(), MemoryWriter(), None
    if instrument == "model before":
        session = torchprobe.instrument(model, writer=writer, probes=t.probes())
    ddp = DDP(model, **options)
    if session is None:
        session = torchprobe.instrument(model if instrument == "model" else ddp, writer=writer, probes=t.probes())
    with session:
        t.train(ddp, batches(dist.get_rank()))
    return t.values(writer)


def main(out: Path) -> Any:
    found = {f"{name}": variant(options, "ddp") for name, options in VARIANTS.items()}
    found |= {"model": variant({}, "model"), "model before": variant({}, "model before")}
    return found

"""A loss that turns NaN on one rank; run by `test_stop.py`. Every step has a collective, as in DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torchprobe

MANY = 1_000_000  # steps: without an end, one rank would wait here for the other


def main(out: Path) -> Any:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, log_dir=out / "run", stop_on={"non_finite"}) as session:
        for step in range(1, MANY):
            loss = model(torch.ones(2, 4)).square().mean()
            optimizer.zero_grad()
            (loss * (float("nan") if rank == 1 and step == 20 else 1.0)).backward()
            try:
                optimizer.step()
            except torchprobe.TrainingAlert as alert:
                return {"step": session.step, "rule": alert.alert.rule, "at": alert.alert.step}
    return None

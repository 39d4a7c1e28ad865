"""Two ranks that each run stages of one model, by the schedules of `torch.distributed.pipelining`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
    SplitPoint,
    pipeline,
)
from torch.nn import functional as F

import torchprobe
from tests.distributed import training as t
from torchprobe.testing import MemoryWriter

MICRO, ROWS, WIDTH, STEPS = 4, 3, 6, 2
CPU = torch.device("cpu")
RUNS_V = not torch.__version__.startswith("2.11.")  # where it ends by itself, closed by gloo


class Block(nn.Module):
    def __init__(self, out: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(self.norm(x)))


def blocks(count: int) -> list[Block]:
    torch.manual_seed(3)
    return [Block() for _ in range(count)]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(MICRO * ROWS, WIDTH, generator=generator)
    return x, torch.randint(WIDTH, (MICRO * ROWS,), generator=generator)


def alone(model: nn.Module, names: Callable[[str], str] = str, scale: int = MICRO, clip: float | None = None) -> Any:
    """What one process records of the whole model, with the loss that the schedules' gradients are of."""
    writer, optimizer = MemoryWriter(), torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=probes()):
        for step in range(STEPS):
            for x, y in zip(*(part.chunk(MICRO) for part in batch(step)), strict=True):
                (F.cross_entropy(model(x), y) / scale).backward()
            if clip is not None:
                nn.utils.clip_grad_value_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return {names(tag): values for tag, values in t.values(writer).items()}


def probes() -> list[torchprobe.Probe]:
    kinds = (torchprobe.Gradients, torchprobe.Parameters, torchprobe.Updates, torchprobe.Activations)
    return [*(kind(every=1) for kind in kinds), torchprobe.Loss()]


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def piped(
    watched: nn.Module,
    parts: list[tuple[int, nn.Module]],
    stages: int,
    schedule: Any,
    clip: float | None = None,
    **options: Any,
) -> Any:
    """What rank 0 records, and what the log of this rank says. clip: the largest element of a gradient that is left."""
    writer, lines, rank = MemoryWriter(), Lines(), dist.get_rank()
    logging.getLogger("torchprobe").addHandler(lines)
    session = torchprobe.instrument(watched, writer=writer, probes=probes())
    optimizer = torch.optim.SGD([p for _, part in parts for p in part.parameters()], lr=0.1)
    made = [PipelineStage(part, index, stages, CPU) for index, part in parts]
    several = schedule not in (ScheduleGPipe, Schedule1F1B)
    run = schedule(made if several else made[0], MICRO, loss_fn=F.cross_entropy, **options)
    with session:
        for step in range(STEPS):
            x, y = batch(step)
            first, last = rank == 0, any(index == stages - 1 for index, _ in parts)
            run.step(*([x] if first else []), **({"target": y} if last else {}))
            if clip is not None:
                nn.utils.clip_grad_value_(watched.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    logging.getLogger("torchprobe").removeHandler(lines)
    return {"values": t.values(writer), "lines": lines.lines, "alerts": [str(alert) for alert in session.alerts]}


def clipped() -> Any:
    """Gradients are clipped after the schedule has divided them."""
    return same_names(clip=0.05)


def same_names(schedule: Any = ScheduleGPipe, **options: Any) -> Any:
    """Both stages call their blocks 0 and 1."""
    rank = dist.get_rank()
    part = nn.Sequential(*blocks(4)[2 * rank : 2 * rank + 2])
    return piped(part, [(rank, part)], 2, schedule, **options)


def whole_names() -> Any:
    """Each stage calls its blocks as the whole model does."""
    rank = dist.get_rank()
    part = nn.Sequential()
    for i in (2 * rank, 2 * rank + 1):
        part.add_module(str(i), blocks(4)[i])
    return piped(part, [(rank, part)], 2, Schedule1F1B)


def whole_model() -> Any:
    """All of it is on each rank, which runs its part."""
    rank = dist.get_rank()
    halves = nn.ModuleList([nn.Sequential(*blocks(4)[:2]), nn.Sequential(*blocks(4)[2:])])
    return piped(halves, [(rank, halves[rank])], 2, ScheduleGPipe)


def interleaved(whole: bool, schedule: Any = ScheduleInterleaved1F1B) -> Any:
    """Two stages a rank, in a list; named as in the whole model inside, or not."""
    rank = dist.get_rank()
    stages = [nn.Sequential() for _ in range(4)]
    for i, (stage, block) in enumerate(zip(stages, blocks(4), strict=True)):
        stage.add_module(str(i) if whole else "block", block)
    mine = [rank, 3 - rank if schedule is ScheduleZBVZeroBubble else rank + 2]
    watched = nn.ModuleList([stages[i] for i in mine])
    return piped(watched, [(i, stages[i]) for i in mine], 4, schedule)


def bare_layers(schedule: Any = ScheduleGPipe) -> Any:
    """A stage is one layer."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    part = [nn.Linear(WIDTH, 1), nn.Linear(1, WIDTH)][rank]  # with a single number between them
    return piped(part, [(rank, part)], 2, schedule)


def traced() -> Any:
    """Cut by `pipeline`."""
    writer, rank = MemoryWriter(), dist.get_rank()
    example = batch(0)[0].chunk(MICRO)[0]
    pipe = pipeline(nn.Sequential(*blocks(4)), (example,), split_spec={"2": SplitPoint.BEGINNING})
    part = pipe.get_stage_module(rank)
    session = torchprobe.instrument(part, writer=writer, probes=probes())
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    run = ScheduleGPipe(pipe.build_stage(rank, CPU), MICRO, loss_fn=F.cross_entropy)
    with session:
        for step in range(STEPS):
            x, y = batch(step)
            run.step(x) if rank == 0 else run.step(target=y)
            optimizer.step()
            optimizer.zero_grad()
    return t.values(writer)


def main(out: Path) -> Any:
    return {
        "gpipe": same_names(),
        "1f1b": same_names(Schedule1F1B),
        "unscaled": same_names(scale_grads=False),
        "whole names": whole_names(),
        "whole model": whole_model(),
        "interleaved": interleaved(whole=False),
        "interleaved, whole names": interleaved(whole=True),
        "zero bubble": interleaved(whole=True, schedule=ScheduleInterleavedZeroBubble),
        "zero bubble, V": interleaved(whole=True, schedule=ScheduleZBVZeroBubble) if RUNS_V else None,
        "zero bubble, bare layers": bare_layers(ScheduleInterleavedZeroBubble),
        "clipped": clipped(),
        "bare layers": bare_layers(),
        "traced": traced(),
    }

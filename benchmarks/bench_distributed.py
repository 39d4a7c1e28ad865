"""What a step of DistributedDataParallel costs with torchprobe, two ranks on one machine, as a ratio to the bare step.

    pytest benchmarks/bench_distributed.py --benchmark-enable -n0 -p no:randomly -s

Each rank is a process with two models of its own, a bare one and an instrumented one, whose steps alternate; both
ranks are in the same kind of step at any time, since the all-reduce makes them wait for each other. Cadences are the
default ones: of 100 steps the last is sampled, sent to rank 0 and written. Ratios are of wall time and of the training
thread's CPU time, which a busy machine disturbs less but which leaves out what the background thread does. Takes a
minute on two busy CPU cores.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torchprobe
from benchmarks.gpt import Run
from tests.distributed.launch import launch

STEPS = 100
WARM_UP = 2
LAYERS = 4


class ReplicatedRun(Run):
    """A smaller model under DDP, with a batch for each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.model.blocks = nn.Sequential(*list(self.model.blocks)[:LAYERS])
        self.model: Any = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.ids = self.ids.roll(dist.get_rank())[:1]

    def measured(self) -> tuple[float, float]:
        """Seconds of a step by the clock, and of the training thread's work."""
        start = thread_time()
        return self.step(), thread_time() - start


def main(out: Path) -> dict[str, Any]:
    """On a rank: pairs of bare and instrumented steps."""
    bare, watched = ReplicatedRun(), ReplicatedRun()
    with torchprobe.instrument(watched.model, log_dir=out / "run") as session:
        for _ in range(WARM_UP):
            bare.step(), watched.step()
        pairs = [(bare.measured(), watched.measured()) for _ in range(STEPS - WARM_UP)]
        flushed = session.flush(60.0)
    return {"pairs": pairs, "steps": session.step, "flushed": flushed, "summary": session.summary()}


def test_two_ranks_at_the_default_cadence(benchmark, tmp_path):
    found = benchmark.pedantic(lambda: launch("benchmarks.bench_distributed", 2, tmp_path, 300.0), rounds=1)
    for rank, of_rank in enumerate(found):
        assert (of_rank["steps"], of_rank["flushed"]) == (STEPS, True)
        for which, clock in enumerate(("wall time", "training thread")):
            pairs = [(plain[which], variant[which]) for plain, variant in of_rank["pairs"]]
            cadence = sum(variant for _, variant in pairs) / sum(plain for plain, _ in pairs)
            idle = median(variant / plain for plain, variant in pairs[:-1])
            sampled = pairs[-1][1] / median(plain for plain, _ in pairs)
            bare_ms = 1e3 * median(plain for plain, _ in pairs)
            numbers = {"cadence": cadence, "idle": idle, "sampled": sampled, "bare_ms": bare_ms}
            benchmark.extra_info.update({f"rank {rank} {clock} {name}": value for name, value in numbers.items()})
            print(f"\nrank {rank}, {clock}: ratio {cadence:.4f} over {len(pairs)} steps, idle {idle:.4f}", end="")
            print(f", sampled {sampled:.4f}, bare step {bare_ms:.0f} ms", end="")
    assert len([path for path in (tmp_path / "run").iterdir() if "tfevents" in path.name]) == 1

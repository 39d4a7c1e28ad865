"""What a step of DistributedDataParallel costs with torchprobe, two ranks on one machine, as a ratio to the bare step.

    pytest benchmarks/bench_distributed.py --benchmark-enable -n0 -p no:randomly -s

Each rank is a process with two models of its own, a bare one and an instrumented one. Every third instrumented step has
a bare one beside it; both ranks are in the same kind of step at any time, since the all-reduce makes them wait for each
other. Cadences are the default ones: of 100 steps the last is sampled, sent to rank 0 and written. Ratios are of wall
time and of the training thread's CPU time, which a busy machine disturbs less but which leaves out what the background
thread does: its CPU time is told as a share of the same number of bare steps. `cadence` is what 100 steps cost: 99 idle
ones, by their median ratio, and the sampled one. Takes a minute on two CPU cores, three on busy ones.
"""

from __future__ import annotations

import threading
from pathlib import Path
from statistics import median
from time import clock_gettime, pthread_getcpuclockid, thread_time
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
PAIR_EVERY = 3
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
        pairs = []
        for number in range(WARM_UP + 1, STEPS + 1):
            beside = bare.measured() if number % PAIR_EVERY == STEPS % PAIR_EVERY else None
            measured = watched.measured()
            pairs += [] if beside is None else [(beside, measured)]
        flushed = session.flush(60.0)
        background = background_time()
    return {"pairs": pairs, "steps": session.step, "flushed": flushed, "background": background}


def background_time() -> float:
    """Seconds of CPU time that the drain thread has used."""
    [drain] = [thread for thread in threading.enumerate() if thread.name == "torchprobe-drain"]
    return clock_gettime(pthread_getcpuclockid(drain.ident))


def numbers_of(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Ratios of instrumented to bare, and the seconds of a bare step."""
    bare = median(plain for plain, _ in pairs)
    idle = median(variant / plain for plain, variant in pairs[:-1])
    sampled = pairs[-1][1] / bare
    cadence = (idle * (STEPS - 1) + sampled) / STEPS
    return {"cadence": cadence, "idle": idle, "sampled": sampled, "bare": bare}


def test_two_ranks_at_the_default_cadence(benchmark, tmp_path):
    found = benchmark.pedantic(lambda: launch("benchmarks.bench_distributed", 2, tmp_path, 300.0), rounds=1)
    for rank, of_rank in enumerate(found):
        assert (of_rank["steps"], of_rank["flushed"]) == (STEPS, True)
        for which, clock in enumerate(("wall time", "training thread")):
            pairs = [(plain[which], variant[which]) for plain, variant in of_rank["pairs"]]
            numbers = numbers_of(pairs)
            benchmark.extra_info.update({f"rank {rank} {clock} {name}": value for name, value in numbers.items()})
            shown = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
            print(f"\nrank {rank}, {clock}: {shown}", end="")
        share = of_rank["background"] / (STEPS * numbers["bare"])
        benchmark.extra_info[f"rank {rank} background"] = share
        print(
            f"\nrank {rank}, background thread: {1e3 * of_rank['background']:.0f} ms, {share:.4f} of bare steps", end=""
        )
    assert len([path for path in (tmp_path / "run").iterdir() if "tfevents" in path.name]) == 1

"""Whether `overhead_budget=0.01` holds where a step's time changes fivefold midway: the share of time that was added.

    pytest benchmarks/bench_budget.py --benchmark-enable -n0 -p no:randomly -s

A watched run and a bare one take turns, some steps each; `added` is what the watched one took more, in CPU time of the
training thread and in wall time, as shares of the bare run's, for each half. Of each model there are steps so short
that idle ones alone are more than the budget, and longer ones, a quarter as many. BENCHMARK=long takes ten times the
steps.
"""

from __future__ import annotations

import os
from time import perf_counter, thread_time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchprobe

LONG = os.environ.get("BENCHMARK") == "long"
BUDGET = 0.01
BLOCK, BLOCKS = 25, 80 if LONG else 8

pytestmark = pytest.mark.timeout(3600)


class Run:
    """A model that is trained on small batches, then on five times as much."""

    def __init__(self, model: nn.Module, small: Tensor) -> None:
        self.model, self.x = model, small
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def grow(self) -> None:
        self.x = torch.cat([self.x] * 5)

    def block(self) -> tuple[float, float]:
        """CPU seconds of this thread, and seconds, of some steps."""
        wall, cpu = perf_counter(), thread_time()
        for _ in range(BLOCK):
            self.optimizer.zero_grad()
            output = self.model(self.x)
            F.cross_entropy(output, torch.zeros(len(output), dtype=torch.long)).backward()
            self.optimizer.step()
        return thread_time() - cpu, perf_counter() - wall


def mlp(batch: int = 256) -> Run:
    return Run(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)),
               torch.randn(batch, 256))  # fmt: skip


def cnn(batch: int = 8) -> Run:
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AvgPool2d(28))
    return Run(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10)), torch.randn(batch, 3, 32, 32))


def encoder(batch: int = 4) -> Run:
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    first = nn.Sequential(nn.Linear(16, 128), nn.TransformerEncoder(layer, 4, enable_nested_tensor=False))
    return Run(nn.Sequential(first, nn.Flatten(), nn.Linear(128 * 16, 10)), torch.randn(batch, 16, 16))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


MADE = {
    "mlp": mlp,
    "cnn": cnn,
    "encoder": encoder,
    "mlp, longer": lambda: mlp(2048),
    "cnn, longer": lambda: cnn(64),
    "encoder, longer": lambda: encoder(48),
}


@pytest.mark.parametrize("make", MADE)
def test_budget(benchmark, make, tmp_path):
    torch.manual_seed(0)
    bare, watched = MADE[make](), MADE[make]()
    taken: list[tuple[float, ...]] = []
    blocks = (BLOCKS // 4 if "longer" in make else BLOCKS) if benchmark.enabled else 1

    def both() -> None:
        with torchprobe.instrument(watched.model, log_dir=tmp_path, overhead_budget=BUDGET):
            for _ in range(2):
                sums = [0.0] * 4
                for _ in range(blocks):
                    for place, run in enumerate((bare, watched)):
                        cpu, wall = run.block()
                        sums[place] += cpu
                        sums[2 + place] += wall
                taken.append(tuple(sums))
                bare.grow(), watched.grow()

    benchmark.pedantic(both, rounds=1)
    for name, (cpu, cpu_watched, wall, wall_watched) in zip(("before", "after"), taken, strict=True):
        steps = BLOCK * blocks
        found = {
            "added_cpu": cpu_watched / cpu - 1,
            "added_wall": wall_watched / wall - 1,
            "bare_ms": 1e3 * cpu / steps,
        }
        benchmark.extra_info[name] = found
        print(f"\n{benchmark.name} {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()), end="")

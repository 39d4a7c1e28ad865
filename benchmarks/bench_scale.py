"""How torchprobe's cost grows with modules, parameters, heads and ranks: a row a size, and the exponent between sizes.

    pytest benchmarks/bench_scale.py --benchmark-enable -n0 -p no:randomly -s

CPU time of the training thread beyond that of a bare step, which leaves out waiting; tags, bytes of the event file a
sampled step, and the drain thread's CPU time. An exponent of 1 is linear. `BENCHMARK=long` goes to 10,000 modules,
1e9 parameters (on the meta device, attached only) and 1,024 ranks; the short form is over in a minute.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from time import process_time, thread_time
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchprobe
from benchmarks.bench_overhead import every_step_except
from torchprobe.distributed.mailbox import Part
from torchprobe.distributed.merge import Combiner

LONG = os.environ.get("BENCHMARK") == "long"
NEVER = 10**9
IDLE, SAMPLED = (50, 2) if LONG else (10, 1)
WARM_UP = 10  # steps, thrice
MODULES = (10, 100, 1_000, 10_000) if LONG else (10, 100)
PARAMETERS = (10**5, 10**6, 10**7, 10**8) if LONG else (10**5, 10**6)
ATTACHED = (10**7, 10**8, 10**9)
HEADS = (1, 4, 16, 64) if LONG else (1, 4)
RANKS = (1, 8, 64, 1_024) if LONG else (1, 8)

pytestmark = pytest.mark.timeout(3600)


def show(benchmark, what: str, rows: dict[int, dict[str, float]]) -> None:
    """A line a size, then for each measure by which power it grew between the last two sizes."""
    print(f"\n{benchmark.name}")
    for size, row in rows.items():
        print(f"  {size:>13,} {what}: " + ", ".join(f"{name} {value:,.4g}" for name, value in row.items()))
    (before, first), (after, last) = list(rows.items())[-2:]
    grown = {name: exponent(first[name], last[name], after / before) for name in last}
    print("  grows by the power of: " + ", ".join(f"{name} {power:.2f}" for name, power in grown.items()))
    benchmark.extra_info.update(what=what, rows={str(size): row for size, row in rows.items()}, exponents=grown)


def exponent(before: float, after: float, ratio: float) -> float:
    return math.log(after / before) / math.log(ratio) if before > 0 and after > 0 else math.nan


class Loop:
    """A model, its optimizer, and a step."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()

    def seconds(self, steps: int) -> float:
        """Of this thread, a step: the least of three."""
        taken = []
        for _ in range(3):
            start = thread_time()
            for _ in range(steps):
                self.step()
            taken.append((thread_time() - start) / steps)
        return min(taken)


def costs(make: Callable[[], Loop], folder: Path) -> dict[str, float]:
    """Of one size: attaching, an idle step, a sampled one, what it writes."""
    bare, idle, sampled = make(), make(), make()
    gc.collect()
    start = thread_time()
    session = torchprobe.instrument(idle.model, log_dir=folder / "idle", every=NEVER)
    attach = thread_time() - start
    for loop in (bare, idle):
        loop.seconds(WARM_UP)
    idle_us = 1e6 * (idle.seconds(IDLE) - bare.seconds(IDLE))
    assert session.detach(600)
    writer, files = torchprobe.EventFileWriter(folder / "sampled"), folder / "sampled"
    with torchprobe.instrument(sampled.model, writer=writer, probes=every_step_except()) as session:
        sampled.step()
        assert session.flush(600)
        before, drained = size(files), process_time() - thread_time()
        taken = sampled.seconds(SAMPLED) - bare.seconds(SAMPLED)
        assert session.flush(600)
        steps = 3 * SAMPLED
        written, drained = (size(files) - before) / steps, (process_time() - thread_time() - drained) / steps
    return {
        "attach ms": 1e3 * attach,
        "idle us": idle_us,
        "sampled ms": 1e3 * taken,
        "drain ms": 1e3 * drained,
        "kB": written / 1e3,
        "tags": len(read_tags(files)),
    }


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*tfevents*"))


def read_tags(folder: Path) -> Iterable[str]:
    from torchprobe.reports.run import read_run

    run = read_run(folder)
    return {*run.scalars, *run.tensors, *run.texts}


def measured(benchmark, what: str, sizes: Iterable[int], measure: Callable[[int], dict[str, float]]) -> None:
    rows: dict[int, dict[str, float]] = {}
    benchmark.pedantic(lambda: rows.update({size: measure(size) for size in sizes}), rounds=1)
    show(benchmark, what, rows)


@pytest.fixture(autouse=True)
def one_thread(tmp_path):
    torchprobe.instrument(nn.Linear(1, 1), log_dir=tmp_path / "first").detach()  # what it imports
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the thread's CPU time is then all of a step's
    yield
    torch.set_num_threads(before)


def test_modules(benchmark, tmp_path):
    """Linear layers and ReLUs of width 4 in turn, side by side in blocks so that no gradient vanishes."""

    def make(modules: int) -> Loop:
        layers = [nn.ReLU() if i % 2 else nn.Linear(4, 4) for i in range(modules)]
        return Loop(Side(layers), torch.randn(8, 4))

    measured(benchmark, "modules", MODULES, lambda n: costs(lambda: make(n), tmp_path / str(n)))


class Side(nn.Module):
    """The sum of short branches."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.layers)
        return torch.stack([b(a(x)) for a, b in zip(layers[::2], layers[1::2], strict=True)]).sum(0)


def test_parameters(benchmark, tmp_path):
    """Ten square layers."""

    def make(parameters: int) -> Loop:
        width = round(math.sqrt(parameters / 10))
        return Loop(nn.Sequential(*(nn.Linear(width, width) for _ in range(10))), torch.randn(2, width))

    measured(benchmark, "parameters", PARAMETERS, lambda n: costs(lambda: make(n), tmp_path / str(n)))


def test_attaching_to_parameters_that_are_not_there(benchmark, tmp_path):
    """On the meta device: nothing of it may grow with elements."""

    def measure(parameters: int) -> dict[str, float]:
        width = round(math.sqrt(parameters / 10))
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(width, width) for _ in range(10)))
        start = thread_time()
        session = torchprobe.instrument(model, log_dir=tmp_path / str(parameters))
        attached = thread_time() - start
        session.detach()
        return {"attach ms": 1e3 * attached}

    measured(benchmark, "parameters", ATTACHED, measure)


class Attention(nn.Module):
    """One layer of self-attention, 16 numbers a head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(16 * heads, 48 * heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_heads(benchmark, tmp_path):
    """Of one layer, 128 tokens."""

    def make(heads: int) -> Loop:
        return Loop(Attention(heads), torch.randn(2, 128, 16 * heads))

    measured(benchmark, "heads", HEADS, lambda n: costs(lambda: make(n), tmp_path / str(n)))


def test_ranks(benchmark):
    """Rows of 100 modules from each rank, as rank 0 puts them together: memory and time a step."""
    probe = torchprobe.Activations(every=1)
    row = probe.compute_all([torch.randn(100)]).double().numpy()
    names, rows = [f"layer.{i}" for i in range(100)], np.repeat(row, 100, axis=0)

    def measure(ranks: int) -> dict[str, Any]:
        parts = {rank: [Part("0", "", names, rows.copy())] for rank in range(ranks)}
        combine, groups = Combiner({"0": probe}), [[rank] for rank in range(ranks)]
        taken = []
        for _ in range(3):
            start = thread_time()
            [arrived] = combine(parts, groups)
            taken.append(thread_time() - start)
            assert len(arrived.rows) == 100
        return {"combine ms": 1e3 * min(taken), "kB in": ranks * rows.nbytes / 1e3}

    measured(benchmark, "ranks", RANKS, measure)

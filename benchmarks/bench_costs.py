"""What torchprobe costs beside training: its import, attaching to many modules, and the drain thread's work.

    pytest benchmarks/bench_costs.py --benchmark-enable -n0 -p no:randomly -s

CPU time, as in `bench_idle.py`. The import is that beyond torch's own; attach and detach are of 1,000 modules that no
step has used yet; the drain thread's work is that of 1,000 tags at each of 10,000 steps, in event files. Statistics are
told as the ratio to `torch.sum` of the same tensor, in turn with it, on one thread: a sum is one read of its bytes.
"""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median, stdev
from time import perf_counter, process_time, thread_time

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import histograms, moments, norms

MODULES = 1000
TAGS = 1000
STEPS = 10_000
ROUNDS = 41  # of a statistic
ROOT = Path(torchprobe.__file__).parents[1]

pytestmark = pytest.mark.timeout(1800)


def wide(modules: int) -> nn.Sequential:
    """Linear layers and ReLUs in turn."""
    return nn.Sequential(*(nn.ReLU() if i % 2 else nn.Linear(4, 4) for i in range(modules)))


def show(benchmark, **milliseconds: list[float]) -> None:
    """The least of each, printed and put into the benchmark's table."""
    best = {name: min(values) for name, values in milliseconds.items()}
    benchmark.extra_info.update(best)
    print(f"\n{benchmark.name}: " + ", ".join(f"{name} {value:.1f} ms" for name, value in best.items()), end="")


def test_import(benchmark):
    code = "import torch, time; t = time.process_time(); import torchprobe; print(time.process_time() - t)"
    taken: list[float] = []

    def once() -> None:
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        taken.append(1000 * float(ran.stdout))

    benchmark.pedantic(once, rounds=5)
    show(benchmark, imported=taken)


def test_attach_and_detach(benchmark, tmp_path):
    attached: list[float] = []
    detached: list[float] = []

    def once() -> None:
        model = wide(MODULES)
        gc.collect()
        start = thread_time()
        session = torchprobe.instrument(model, log_dir=tmp_path / str(len(attached)))
        between = thread_time()
        session.detach()
        detached.append(1000 * (thread_time() - between))
        attached.append(1000 * (between - start))

    benchmark.pedantic(once, rounds=7, warmup_rounds=1)
    show(benchmark, attach=attached, detach=detached)


def test_drain(benchmark, tmp_path):
    """Everything that this process does but the training thread."""
    values = {f"tag_{i}": float(i) for i in range(TAGS)}
    taken: list[float] = []

    def once() -> None:
        before = process_time() - thread_time()
        with torchprobe.TrainingLogger(tmp_path / str(len(taken))) as logger:
            for _ in range(STEPS if benchmark.enabled else 10):
                logger.log_metrics(values, prefix="train")
                logger.increment_step()
                if logger.global_step % 1000 == 0:
                    logger.flush()  # the queue is bounded
        taken.append(1000 * (process_time() - thread_time() - before))

    benchmark.pedantic(once, rounds=1)
    show(benchmark, drain=taken)


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "moments": moments.compute,
    "sum of squares": lambda x: norms.sums_of_squares([x]),
    "histogram of magnitudes": histograms.log_histogram,
    "histogram of values": histograms.linear_histogram,
}
"""What is read of activations, of gradients, and into histograms of gradients and of parameters."""


@pytest.mark.parametrize("elements", [2**18, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistic_beside_one_read(benchmark, statistic, dtype, elements):
    compute, x = STATISTICS[statistic], torch.randn(elements, dtype=dtype)
    repeats = max(1, 2**20 // elements)

    def seconds(function: Callable[[Tensor], Tensor]) -> float:
        start = perf_counter()
        for _ in range(repeats):
            function(x)
        return (perf_counter() - start) / repeats

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: pairs.append((seconds(torch.sum), seconds(compute))), rounds=ROUNDS, warmup_rounds=3)
    torch.set_num_threads(threads)
    ratios = [ours / read for read, ours in pairs[3:]]
    error = 1.25 * stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0  # of a median of normal values
    read, ours = (1e9 * median(times) / elements for times in zip(*pairs, strict=True))
    found = {"ratio": median(ratios or [ours / read]), "error": error, "ns": ours, "ns_of_sum": read}
    benchmark.extra_info.update(found)
    print(f"\n{benchmark.name}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()), end="")

"""What the default cadence adds over steps 101 to 1,100 of models with steps from 1 ms to some seconds; its worst step.

    OMP_NUM_THREADS=1 pytest benchmarks/bench_cadence.py --benchmark-enable -n0 -p no:randomly -s

Blocks of bare and of watched steps take turns. `ratio` is the sum of the watched ones over that of the bare ones, in
CPU time of the process, so that the drain thread's work counts, too; `thread` the same of the training thread alone.
`error` is the standard error of the former from block to block; `worst` the dearest watched step over the median one,
`sampled` the median of those in which something is sampled. BENCHMARK=long takes all steps, without it a fifth of them.
"""

from __future__ import annotations

import math
import os
from functools import partial
from statistics import median, stdev
from time import process_time, thread_time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from benchmarks.bench_budget import one_thread  # noqa: F401 - a fixture
from benchmarks.gpt import Training
from benchmarks.recipes import RECIPES, training

LONG = os.environ.get("BENCHMARK") == "long"
BEFORE, BLOCK, BLOCKS = 100, 25, 40 if LONG else 8
WARM_UP = 3  # steps of the bare model, whose numbers mean nothing; the watched one takes all of the first

pytestmark = [
    pytest.mark.timeout(7200),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles
]


def mlp(batch: int) -> Training:
    """Of five layers of width 256."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Linear(256, 10)), torch.randn(batch, 256)
    y = torch.randint(10, (batch,))
    return Training(model, lambda: F.cross_entropy(model(x), y))


RUNS = {
    "MLP, 5 ms": lambda: mlp(64),
    "MLP, 20 ms": lambda: mlp(448),
    **{recipe: partial(training, recipe) for recipe in RECIPES if "transformers" not in recipe},
}
SAID = {"default": {}, "every=1000": {"every": 1000}, "overhead_budget=0.01": {"overhead_budget": 0.01}}
"""What is said to `instrument`; all but the first of the shortest steps alone."""


CASES = [*((run, "default") for run in RUNS), *(("MLP, 5 ms", said) for said in SAID if said != "default")]


@pytest.mark.parametrize(("run", "said"), CASES)
def test_default_cadence(benchmark, run, said, tmp_path):
    bare, watched = RUNS[run](), RUNS[run]()
    steps: list[float] = []
    blocks: list[tuple[tuple[float, float], tuple[float, float]]] = []

    def block(of: Training) -> tuple[float, float]:
        before = process_time(), thread_time()
        for _ in range(BLOCK):
            start = thread_time()
            of.step()
            if of is watched:
                steps.append(thread_time() - start)
        return process_time() - before[0], thread_time() - before[1]

    with torchprobe.instrument(watched.model, log_dir=tmp_path, **SAID[said]) as session:
        for step in range(BEFORE if benchmark.enabled else 1):
            watched.step()
            if step < WARM_UP:
                bare.step()
        assert session.flush()
        number = BLOCKS if benchmark.enabled else 1
        benchmark.pedantic(lambda: blocks.append((block(bare), block(watched))), rounds=number)
    ours, theirs = ([pair[which] for pair in blocks] for which in (1, 0))
    ratio, thread = (sum(b[clock] for b in ours) / sum(b[clock] for b in theirs) for clock in (0, 1))
    added = [mine[0] - plain[0] for mine, plain in zip(ours, theirs, strict=True)]
    error = stdev(added) * math.sqrt(len(added)) / sum(b[0] for b in theirs) if len(added) > 1 else 0.0
    sampled = [t for step, t in enumerate(steps, start=BEFORE + 1) if step % 100 == 0]
    found = {
        "ratio": ratio,
        "error": error,
        "thread": thread,
        "worst": max(steps) / median(steps),
        "sampled": median(sampled or steps) / median(steps),
        "bare_ms": 1e3 * sum(b[1] for b in theirs) / BLOCK / len(blocks),
    }
    benchmark.extra_info.update(found)
    print(f"\n{benchmark.name}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()), end="")

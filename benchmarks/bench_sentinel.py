"""What the look for NaN at every step costs: thread time of it over that of the training step, in one run.

python -m benchmarks.bench_sentinel
"""

from __future__ import annotations

from time import thread_time
from typing import Any

import torch
from torchprobe.capture.sentinel import Sentinel

import torchprobe
from benchmarks.gpt import Run
from torchprobe.testing import MemoryWriter


def main(steps: int = 12) -> float:
    torch.set_num_threads(1)
    spent = [0.0]

    def timed(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            start = thread_time()
            try:
                return method(*arguments)
            finally:
                spent[0] += thread_time() - start

        return call

    for name in ("on_output", "on_gradients", "on_parameters", "take", "looks"):
        setattr(Sentinel, name, timed(getattr(Sentinel, name)))
    run = Run()
    with torchprobe.instrument(run.model, writer=MemoryWriter(), every=10_000):
        run.step()  # sampled
        spent[0], start = 0.0, thread_time()
        for _ in range(steps):
            run.step()
        total = thread_time() - start
    print(f"{1e6 * spent[0] / steps:.0f} µs of {1e3 * total / steps:.0f} ms a step: {spent[0] / total:.4%}")
    return spent[0] / total


if __name__ == "__main__":
    main()

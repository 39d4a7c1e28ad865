"""What a compiled training step costs with torchprobe, as a ratio to the bare compiled step measured in turn with it.

    pytest benchmarks/bench_compile.py --benchmark-enable -n0 -p no:randomly -s

Each variant trains a compiled model of its own; steps alternate bare, variant, bare, variant, ... The first two steps
compile: for the variant the graph of sampled steps, then that of the others. Their seconds are printed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from statistics import median
from time import perf_counter

import pytest
import torch

import torchprobe
import torchprobe.testing
from benchmarks import gpt
from benchmarks.gpt import Run

ROUNDS = 15
pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles
]


class At:
    """A cadence that is decided between steps: step 1, and while `on`."""

    def __init__(self) -> None:
        self.on = False

    def __call__(self, step: int) -> bool:
        return step == 1 or self.on


def compiled_run(kind: Callable[[], Run] = Run) -> Run:
    run = kind()
    run.model.compile(fullgraph=True)
    return run


def bare_run() -> Run:
    """From code of its own: Dynamo keeps graphs by code, and would run the watched model with this one's."""
    spec = importlib.util.spec_from_file_location("bare_gpt", gpt.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return compiled_run(module.Run)


def timed(run: Run) -> float:
    start = perf_counter()
    run.step()
    return perf_counter() - start


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("sampled", [False, True], ids=["not sampled", "every step sampled"])
@pytest.mark.parametrize("probe", ["attention", "activations", "both"])
def test_compiled(benchmark, sampled, probe):
    if not sampled and probe != "both":
        pytest.skip("idle steps do not depend on the probes")
    bare, run, at = bare_run(), compiled_run(), At()
    probes = [torchprobe.Activations(every=at)] if probe != "attention" else []
    probes += [torchprobe.Attention(every=at)] if probe != "activations" else []
    with torchprobe.instrument(run.model, writer=torchprobe.testing.MemoryWriter(), probes=probes):
        compiling = {"bare": timed(bare), "sampled": timed(run)}
        compiling["other"] = timed(run)
        at.on = sampled
        bare.step(), run.step(), bare.step(), run.step()
        pairs: list[tuple[float, float]] = []
        benchmark.pedantic(lambda: pairs.append((bare.step(), run.step())), rounds=ROUNDS)
    ratio = median(variant / plain for plain, variant in pairs)
    benchmark.extra_info.update(ratio=ratio, compiling=compiling)
    first = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in compiling.items())
    bare_ms = 1e3 * median(plain for plain, _ in pairs)
    print(f"\n{benchmark.name}: ratio {ratio:.4f}, bare step {bare_ms:.0f} ms; first steps: {first}")
    assert ratio > 0


def test_bare_against_itself(benchmark):
    """The noise of the measurement."""
    one, other = compiled_run(), compiled_run()
    one.step(), other.step()
    pairs: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: pairs.append((one.step(), other.step())), rounds=ROUNDS)
    print(f"\n{benchmark.name}: ratio {median(b / a for a, b in pairs):.4f}")

"""What a compiled training step costs with torchprobe, as a ratio to the bare compiled step measured in turn with it.

    pytest benchmarks/bench_compile.py --benchmark-enable -n0 -p no:randomly -s

Each variant trains a compiled model of its own; steps alternate bare, variant, bare, variant, ... The first two steps
compile: for the variant the graph of sampled steps, then that of the others. Their seconds are printed.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import pytest
import torch

import torchprobe
import torchprobe.testing
from benchmarks.gpt import Run
from torchprobe.probes.choosing import default_probes

ROUNDS, IDLE_ROUNDS = 15, 60  # the smaller the effect, the more
BATCH = 16  # 4,096 tokens a step
LAYERS = {384: 4, 768: 2}  # of each width: more only take longer to compile
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


def compiled_run(width: int = 384) -> Run:
    run = Run(batch=BATCH, layers=LAYERS[width], width=width)
    run.model.compile(fullgraph=True)
    return run


def timed(run: Run) -> float:
    start = perf_counter()
    run.step()
    return perf_counter() - start


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


PROBES = {
    "attention": (torchprobe.Attention,),
    "gradients": (torchprobe.Gradients,),
    "activations": (torchprobe.Activations,),
    "attention, gradients, activations": (torchprobe.Attention, torchprobe.Gradients, torchprobe.Activations),
    "what step 100 samples": tuple(type(p) for p in default_probes() if not isinstance(p, torchprobe.Histograms)),
    "all defaults": tuple(map(type, default_probes())),
}


def probes_at(cadence: At, kinds: tuple[type, ...]) -> list:
    return [kind(every=cadence) for kind in kinds]


@pytest.mark.parametrize("sampled", [False, True], ids=["not sampled", "every step sampled"])
@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("width", LAYERS)
def test_compiled(benchmark, width, sampled, probes):
    if not sampled and (probes, width) != ("all defaults", 384):
        pytest.skip("idle steps do not depend on the probes")
    bare, run, at = compiled_run(width), compiled_run(width), At()
    watched = {"writer": torchprobe.testing.MemoryWriter(), "probes": probes_at(at, PROBES[probes])}
    with torchprobe.instrument(run.model, **watched):
        compiling = {"bare": timed(bare), "sampled": timed(run)}
        compiling["other"] = timed(run)
        at.on = sampled
        bare.step(), run.step(), bare.step(), run.step()
        pairs: list[tuple[float, float]] = []
        benchmark.pedantic(lambda: pairs.append((bare.step(), run.step())), rounds=ROUNDS if sampled else IDLE_ROUNDS)
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
    benchmark.pedantic(lambda: pairs.append((one.step(), other.step())), rounds=IDLE_ROUNDS)
    print(f"\n{benchmark.name}: ratio {median(b / a for a, b in pairs):.4f}")

"""What torchprobe costs on a CUDA device: a ratio to the bare step, measured in turn with it; waits, kernels, memory.

    pytest benchmarks/bench_gpu.py --benchmark-enable -n0 -p no:randomly -s --benchmark-json=gpu.json

GPT-2's shapes in bf16 with scaled_dot_product_attention. Blocks of bare steps and of watched ones alternate, each
between two synchronisations, so that the time is the device's and the launching thread's together. `-k small` takes
two minutes on an H100.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median, stdev
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from benchmarks.bench_overhead import every_step_except, spine, watched
from benchmarks.bench_peers import NEEDS, PEERS
from benchmarks.gpt import GPT

VOCABULARY, LENGTH = 50304, 1024
SHAPES = {"small": (12, 768), "medium": (24, 1024)}
BLOCK, BLOCKS, WARM_UP = 10, 10, 3
NEVER = 10**9

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("default"),
]

Build = Callable[[], "Loop"]


class Loop:
    """One model with its optimizer and a batch that stays; `step()` is a whole step, nothing of it waited for.

    extra: what a logger does between backward and step.
    """

    def __init__(self, layers: int, width: int, batch: int, compiled: bool, length: int = LENGTH) -> None:
        torch.manual_seed(0)
        self.model = GPT(layers, width, length, VOCABULARY).cuda()
        self.callee: Callable[[torch.Tensor], torch.Tensor] = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(0, VOCABULARY, (batch, length), device="cuda")
        self.extra: Callable[[nn.Module, int], None] | None = None
        self.steps = 0

    def step(self) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(self.callee(self.ids).flatten(0, 1), self.ids.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.steps += 1
        if self.extra is not None:
            self.extra(self.model, self.steps)
        self.optimizer.step()

    def seconds(self, steps: int = BLOCK) -> float:
        """Of a step, of several in a row, with the device's work done before and after."""
        torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(steps):
            self.step()
        torch.cuda.synchronize()
        return (perf_counter() - start) / steps


@pytest.fixture(autouse=True)
def alone() -> None:
    """No graphs and no memory of other tests."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def loop(shape: str, batch: int, compiled: bool) -> Loop:
    return Loop(*SHAPES[shape], batch, compiled)


def in_turn(
    benchmark, bare: Loop | Captured, other: Loop | Captured, blocks: int = BLOCKS
) -> list[tuple[float, float]]:
    """Seconds a step of a bare block and of the other's beside it, each first in every second pair."""
    for _ in range(WARM_UP):
        bare.step(), other.step()
    pairs: list[tuple[float, float]] = []

    def pair() -> None:
        if len(pairs) % 2:
            before, after = bare.seconds(), other.seconds()
        else:
            after, before = other.seconds(), bare.seconds()
        pairs.append((before, after))

    benchmark.pedantic(pair, rounds=blocks)
    return pairs


def report(benchmark, pairs: list[tuple[float, float]], **more: float) -> None:
    """Median and mean ratio, printed and put into the benchmark's table."""
    ratios = [after / before for before, after in pairs]
    error = 1.25 * stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    of_sums = sum(after for _, after in pairs) / sum(before for before, _ in pairs)
    bare = 1e3 * median(before for before, _ in pairs)
    found = {"ratio": median(ratios), "error": error, "ratio of sums": of_sums, "bare_ms": bare, **more}
    benchmark.extra_info.update(found, device=torch.cuda.get_device_name(), torch=torch.__version__)
    print(f"\n{benchmark.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), end="")


def peak(steps: Callable[[], object]) -> int:
    """Bytes of device memory that the steps allocate at most, beyond what there is before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def waits(steps: Callable[[], object]) -> Counter[str]:
    """Where the training thread waited for the device, as torch sees it."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        steps()
    torch.cuda.set_sync_debug_mode("default")
    about_it = [w for w in seen if "synchronizing" in str(w.message)]
    return Counter(f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in about_it)


def kernels(step: Callable[[], object]) -> int:
    """Kernels, copies and fills that one step puts on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def facts(bare: Loop, other: Loop) -> dict[str, float]:
    """What a step of each asks of the device."""
    for one in (bare, other):
        assert not waits(one.step), waits(one.step)
    return {
        "kernels": kernels(other.step),
        "bare kernels": kernels(bare.step),
        "peak MiB": peak(other.step) / 2**20,
        "bare peak MiB": peak(bare.step) / 2**20,
    }


CADENCES = {
    "idle": lambda: {"every": NEVER},
    "default": dict,
    "weights": spine,  # gradients, parameters, updates, activations and their histograms, at every step
    "all": lambda: {"probes": every_step_except()},  # default probes, at every step
    "no_attention": lambda: {"probes": every_step_except(torchprobe.Attention)},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("batch", [4, 16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cadence", CADENCES)
def test_torchprobe(benchmark, cadence, shape, batch, compiled, tmp_path):
    bare, other = loop(shape, batch, compiled), loop(shape, batch, compiled)
    with torchprobe.instrument(other.model, log_dir=tmp_path, **CADENCES[cadence]()) as session:
        pairs = in_turn(benchmark, bare, other, BLOCKS if cadence in ("idle", "default") else 3)
        report(benchmark, pairs, **facts(bare, other))
    assert "failed" not in session.summary()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("peer", [peer for peer in PEERS if not peer.startswith("attention")])
def test_beside_others(benchmark, peer, tmp_path):
    """What others record, by them and by torchprobe, at every step; `waits` of one step, as torch sees them."""
    if peer in NEEDS:
        pytest.importorskip(NEEDS[peer])
    bare, other = loop("small", 4, False), loop("small", 4, False)
    with contextmanager(PEERS[peer])(other, tmp_path):
        other.step(), bare.seconds(BLOCK)
        steps = BLOCK if other.seconds(1) < 1 else 1  # histograms by hand take half a minute a step
        pairs: list[tuple[float, float]] = []
        benchmark.pedantic(lambda: pairs.append((bare.seconds(BLOCK), other.seconds(steps))), rounds=3)
        added = 1e3 * median(after - before for before, after in pairs)
        report(benchmark, pairs, added_ms=added, waits=sum(waits(other.step).values()))
        if torchprobe.session_of(other.model) is not None:
            assert torchprobe.session_of(other.model).flush(120), "something was lost"


class Captured:
    """The whole step of a loop as a CUDA graph of the user's: `step()` replays it, and tells the session, if any."""

    seconds = Loop.seconds

    def __init__(self, loop: Loop, session: torchprobe.Session | None = None) -> None:
        self.loop, self.session = loop, session
        loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-4, fused=True, capturable=True)
        side, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                loop.step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            loop.step()
        self.step()

    def step(self) -> None:
        self.graph.replay()
        if self.session is not None:
            self.session.next_step()


@pytest.mark.parametrize("cadence", ["idle", "weights"])
def test_captured(benchmark, cadence, tmp_path, monkeypatch):
    """Nothing due, and what replays record at each of them: activations, their gradients, and gradients."""
    monkeypatch.setattr(torch, "autocast", partial(torch.autocast, cache_enabled=False))  # a cast would not be replayed
    bare, other = (loop("small", 4, False) for _ in range(2))
    with torchprobe.instrument(other.model, log_dir=tmp_path, **CADENCES[cadence]()) as session:
        pairs = in_turn(benchmark, Captured(bare), Captured(other, session))
        report(benchmark, pairs)
    assert "failed" not in session.summary()


@pytest.mark.parametrize("budget", [None, 0.01], ids=["no_budget", "budget_of_1_percent"])
def test_default_cadence(benchmark, budget, tmp_path):
    """Steps 101 to 501 of the defaults: 100 at a time, of which one is sampled; without and within a budget."""
    bare, other = loop("small", 4, False), loop("small", 4, False)
    with torchprobe.instrument(other.model, log_dir=tmp_path, overhead_budget=budget):
        other.seconds(100)
        pairs: list[tuple[float, float]] = []
        benchmark.pedantic(lambda: pairs.append((bare.seconds(100), other.seconds(100))), rounds=4)
        report(benchmark, pairs)


@contextmanager
def hooks(model: nn.Module) -> Iterator[None]:
    handles = list(watched(model))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("shape", SHAPES)
def test_hooks_by_hand(benchmark, shape):
    """What trackers do: a hook on every module and gradient, norms and histograms, `.item()` in each."""
    bare, other = loop(shape, 4, False), loop(shape, 4, False)
    with hooks(other.model):
        pairs = in_turn(benchmark, bare, other, 2)
        report(benchmark, pairs, waits=sum(waits(other.step).values()))


@pytest.mark.parametrize("shape", SHAPES)
def test_bare_against_itself(benchmark, shape):
    """The noise of the measurement."""
    report(benchmark, in_turn(benchmark, loop(shape, 4, False), loop(shape, 4, False)))


@contextmanager
def determinism() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_weights_are_bitwise_equal(monkeypatch, compiled, tmp_path):
    """After ten steps, everything read at each of them, with deterministic algorithms."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    states = []
    with determinism():
        for watch in (False, True):
            run = Loop(2, 256, 4, compiled, length=256)
            probes = {"probes": every_step_except()}
            session = torchprobe.instrument(run.model, log_dir=tmp_path, **probes) if watch else None
            run.seconds(10)
            if session is not None:
                assert session.detach(60)
            states.append([p.detach().clone() for p in run.model.parameters()] + [torch.cuda.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))

"""What a step costs in which nothing is sampled: CPU time of the training thread that torchprobe adds, in µs.

    pytest benchmarks/bench_idle.py --benchmark-enable -n0 -p no:randomly -s

Blocks of bare steps and of watched ones alternate, on a model each, with all defaults on. The median of the
differences is printed with its standard error and its quartiles, then the difference of the quietest blocks, then the
functions of torchprobe where it goes. CPU time leaves out waiting, but a busy machine's shared caches and cores still
stretch it: then bare steps are longer too, and the quietest blocks say more. Takes four minutes on two CPU cores.
"""

from __future__ import annotations

import cProfile
import gc
import math
import pstats
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles, stdev
from time import thread_time_ns
from types import FunctionType

import pytest
import torch
from torch import Tensor, nn

import torchprobe

WARM_UP = 110  # steps; the 100th is sampled
BLOCK = 10  # steps
BLOCKS = 150
PROFILED = 90  # steps
SHOWN = 14  # functions
WIDTH, ROWS = 16, 8
GOALS = {"plain": 40, "several optimizers": 60, "zeroed in place": 60, "compiled": 100, "compiled inside": 100}
"""µs a step, on models of 5 and of 40 modules. Compiled inside: the model's own call is a part of the graph, too."""

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles
]


class Chain(nn.Sequential):
    """Dynamo traces the calls of torch's own classes, and of others their `forward` alone."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def network(modules: int, torchs: bool) -> nn.Sequential:
    """Linear layers and ReLUs in turn, with a forward of its own: Dynamo keeps graphs by code."""
    forward = nn.Sequential.forward if torchs else Chain.forward
    own = FunctionType(forward.__code__.replace(), forward.__globals__)
    layers = (nn.ReLU() if i % 2 else nn.Linear(WIDTH, WIDTH) for i in range(modules))
    return type("Network", (nn.Sequential,), {"forward": own})(*layers)


class Loop:
    """A training loop of one of the kinds of `GOALS`; `step()` is a whole step."""

    def __init__(self, kind: str, modules: int) -> None:
        self.model = network(modules, torchs=kind == "compiled inside")
        self.callee: Callable[[Tensor], Tensor] = torch.compile(self.model) if "compiled" in kind else self.model
        parameters = list(self.model.parameters())
        halves = (parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :])
        groups = halves if kind == "several optimizers" else (parameters,)
        self.optimizers = [torch.optim.SGD(group, lr=1e-3, momentum=0.9) for group in groups]
        self.set_to_none = kind != "zeroed in place"
        self.x = torch.randn(ROWS, WIDTH)

    def step(self) -> None:
        self.callee(self.x).square().mean().backward()
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=self.set_to_none)

    def block(self) -> float:
        """µs of the thread for a step, of several in a row."""
        start = thread_time_ns()
        for _ in range(BLOCK):
            self.step()
        return (thread_time_ns() - start) / BLOCK / 1000


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """One thread, no garbage collector, no graphs of other loops."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    torch.set_num_threads(threads)


def is_idle(session: torchprobe.Session) -> bool:
    """Whether the block that has just ended had neither a sampled step nor the one after it."""
    return session.step % 100 > BLOCK


Pairs = list[tuple[float, float]]
"""µs a step of a bare block and of the watched one beside it."""


def measured(benchmark, bare: Loop, watched: Loop, is_idle: Callable[[], bool]) -> Pairs:
    """Blocks in turn, those left out in which something was sampled."""
    for _ in range(WARM_UP):
        bare.step(), watched.step()
    pairs: Pairs = []

    def pair() -> None:
        if len(pairs) % 2:
            before, after = bare.block(), watched.block()
        else:
            after, before = watched.block(), bare.block()
        if is_idle():
            pairs.append((before, after))

    benchmark.pedantic(pair, rounds=BLOCKS)
    return pairs


def report(benchmark, pairs: Pairs, goal: str = "") -> None:
    """The median with its standard error, printed and put into the benchmark's table."""
    if len(pairs) < 2:
        return  # benchmarks are disabled: one round
    more = [after - before for before, after in pairs]
    plain, watched = zip(*pairs, strict=True)
    low, middle, high = quantiles(more, n=4)
    error = 1.25 * stdev(more) / math.sqrt(len(more))  # of a median of normal values
    quiet = min(watched) - min(plain)
    benchmark.extra_info.update(us=middle, error=error, low=low, high=high, quiet=quiet)
    print(
        f"\n{benchmark.name}: {middle:.1f} +- {error:.1f} µs a step{goal}, quartiles {low:.1f} and {high:.1f}", end=""
    )
    print(f"; bare {median(plain):.0f}; quietest: {quiet:.1f} beside {min(plain):.0f}; {len(pairs)} blocks of {BLOCK}")


def where(watched: Loop, session: torchprobe.Session) -> Iterator[str]:
    """torchprobe's functions by own time in idle steps, that of what they call elsewhere included: a line each."""
    while session.step % 100 != 2:
        watched.step()
    profile = cProfile.Profile(thread_time_ns, 1e-9)
    profile.enable()
    for _ in range(PROFILED):
        watched.step()
    profile.disable()
    calls, own = shares(pstats.Stats(profile).stats)
    yield f"{sum(calls.values()):.1f} calls into torchprobe a step; under cProfile, which makes calls dear:"
    for name in sorted(own, key=own.__getitem__, reverse=True)[:SHOWN]:
        yield f"{own[name]:8.1f} µs {calls[name]:6.1f} calls  {name}"
    rooms: Counter[str] = Counter()
    for name, microseconds in own.items():
        rooms[name.split(":")[0].rpartition("/")[0]] += microseconds
    yield "by folder: " + ", ".join(f"{room or 'torchprobe'} {spent:.1f}" for room, spent in rooms.most_common())


def shares(stats: dict) -> tuple[dict[str, float], dict[str, float]]:
    """Calls and own µs a step, by function of torchprobe."""
    root = str(Path(torchprobe.__file__).parent)
    calls: dict[str, float] = {}
    own: dict[str, float] = {}
    for function, (_, count, seconds, _, callers) in stats.items():
        if function[0].startswith(root):
            name = _name(function, root)
            calls[name] = count / PROFILED
            own[name] = own.get(name, 0.0) + 1e6 * seconds / PROFILED
            continue
        for caller, (_, _, inside, _) in callers.items():
            if caller[0].startswith(root):
                name = _name(caller, root)
                own[name] = own.get(name, 0.0) + 1e6 * inside / PROFILED
    return calls, own


def _name(function: tuple[str, int, str], root: str) -> str:
    path, line, name = function
    return f"{path.removeprefix(root)[1:]}:{line} {name}"


@pytest.mark.parametrize("modules", [5, 40])
@pytest.mark.parametrize("kind", GOALS)
def test_idle(benchmark, kind, modules, tmp_path):
    bare, watched = Loop(kind, modules), Loop(kind, modules)
    with torchprobe.instrument(watched.model, log_dir=tmp_path) as session:
        report(benchmark, measured(benchmark, bare, watched, lambda: is_idle(session)), f" (goal {GOALS[kind]})")
        assert session.step >= WARM_UP + BLOCK
        print("\n".join(where(watched, session)))


@pytest.mark.parametrize("modules", [5, 40])
def test_bare_against_itself(benchmark, modules):
    """The noise of the measurement."""
    pairs = measured(benchmark, Loop("plain", modules), Loop("plain", modules), lambda: True)
    report(benchmark, pairs)
    assert pairs

"""What seeing attention costs on a sampled step, in time and memory, against bare steps and against the peer.

    OMP_NUM_THREADS=1 pytest benchmarks/bench_attention.py --benchmark-enable -n0 -p no:randomly -s

Processor time of the whole process on one thread, the drain thread included, so that other programs count less. The
layer has the width and heads of GPT-2 (768, 12); a step has 4096 tokens at every length. About nine minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt
from statistics import median, stdev
from time import process_time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from benchmarks.memory import peak_mib
from torchprobe.statistics.attention import QueryKey, compute
from torchprobe.testing import MemoryWriter

TOKENS, WIDTH, HEADS = 4096, 768, 12
WORDS, LAYERS = 50_257, 12  # of GPT-2
ROUNDS = 8

pytestmark = pytest.mark.timeout(900)  # on a machine that others use


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(out.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(x)


class Run:
    def __init__(self, length: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(Block())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.x = torch.randn(TOKENS // length, length, WIDTH)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()


class Ends(Run):
    """What GPT-2 has before and after its layers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        ends = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.model = nn.Sequential(*ends)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.x = torch.randint(WORDS, (TOKENS,))

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.x).backward()
        self.optimizer.step()


def probe() -> torchprobe.Attention:
    return torchprobe.Attention(every=1, maps_every=10**9)


def seconds(call: Callable[[], object]) -> float:
    start = process_time()
    call()
    return process_time() - start


def summary(ratios: list[float]) -> str:
    """The median, and the standard error of a median."""
    return f"{median(ratios):.4f} ± {1.25 * stdev(ratios) / sqrt(len(ratios)):.4f}"


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_a_sampled_step(benchmark, length):
    """Between two steps of bare models, whose ratio to each other says how much of the result is noise."""
    first, seen, second = Run(length), Run(length), Run(length)
    with torchprobe.instrument(seen.model, writer=MemoryWriter(), probes=[probe()]) as session:
        runs = (first, seen, second)
        for run in runs:
            run.step()
        times: list[list[float]] = []
        benchmark.pedantic(lambda: times.append([seconds(run.step) for run in runs]), rounds=ROUNDS)
        assert session.step == ROUNDS + 1
        assert session.flush()
    ratios = [2 * seen / (a + b) for a, seen, b in times]
    benchmark.extra_info["ratio"] = median(ratios)
    print(f"\nlength {length}: ratio {summary(ratios)}, of both bare ones {summary([b / a for a, _, b in times])}")
    print(f"bare step {1e3 * median(a for a, _, _ in times):.0f} ms")
    assert all(time > 0 for round_ in times for time in round_)


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_the_statistic_after_a_bare_step(benchmark, length):
    """The same by itself, which resolves more than the difference of two steps; finding the call is not in it."""
    run, statistic = Run(length), statistic_of(length)
    run.step(), statistic()
    times: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: times.append((seconds(run.step), seconds(statistic))), rounds=7)
    shares = [statistic / step for step, statistic in times]
    benchmark.extra_info["share"] = median(shares)
    print(f"\nlength {length}: {summary(shares)} of a bare step, {1e3 * median(t for _, t in times):.1f} ms")
    assert min(shares) > 0


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_the_statistic_in_a_whole_model(benchmark, length):
    """Twelve such layers between GPT-2's ends, added up from the time of one and of the ends."""
    layer, ends, statistic = Run(length), Ends(), statistic_of(length)
    layer.step(), ends.step(), statistic()
    times: list[list[float]] = []
    parts = (layer.step, statistic, ends.step)
    benchmark.pedantic(lambda: times.append([seconds(part) for part in parts]), rounds=3)
    shares = [LAYERS * statistic / (LAYERS * layer + ends) for layer, statistic, ends in times]
    benchmark.extra_info["share"] = median(shares)
    print(f"\nGPT-2, length {length}: {summary(shares)} of a bare step, ends {median(t for *_, t in times):.1f} s")
    assert min(shares) > 0


def statistic_of(length: int) -> Callable[[], object]:
    """What a layer's attention costs at the default of 512 rows."""
    generator = torch.Generator().manual_seed(0)
    q, k, _ = torch.randn(TOKENS // length, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    source = QueryKey(q, k, scale=0.125, causal=True)
    return lambda: compute(source, 512, generator)


def test_the_measure_of_memory_sees_what_a_process_takes_and_not_what_its_parent_has():
    parents = torch.ones(2**28)  # 1024 MiB
    bare, more = peak_mib("import torch"), peak_mib("import torch; torch.ones(2**26)")
    assert 240 < more - bare < 280, "256 MiB"
    assert bare < 1000 < parents.nbytes / 2**20


def extra_mib(keys: int, rows: str) -> float:
    """Peak memory of the statistic of 12 heads of 64, beyond that of making queries and keys."""
    make = f"""
import torch
from torchprobe.statistics.attention import QueryKey, compute
torch.set_num_threads(1)
q, k = (torch.randn(1, {HEADS}, {keys}, {WIDTH // HEADS}) for _ in range(2))
compute(QueryKey(q[:, :, :64], k[:, :, :64], scale=0.125, causal=True), 64, None)  # what a first call loads
source = QueryKey(q, k, scale=0.125, causal=True)
"""
    return peak_mib(make + f"compute(source, {rows}, None)\n") - peak_mib(make)


@pytest.mark.parametrize(("keys", "rows"), [(131072, "512"), (16384, "512"), (16384, "'all'")])
def test_memory_beyond_queries_and_keys(benchmark, keys, rows):
    """One layer. All rows hold no matrix of queries by keys either, which would take 12 GiB; they take minutes at
    131,072 keys: their time grows with rows times keys."""
    extra = benchmark.pedantic(lambda: extra_mib(keys, rows), rounds=1)
    benchmark.extra_info["extra_mib"] = extra
    print(f"\n{keys} keys, rows {rows}: {extra:.0f} MiB beyond queries and keys")
    assert 0 < extra < 1024


GPT2 = {"n_layer": 2, "n_embd": WIDTH, "n_head": HEADS, "vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # with dropout sdpa on a CPU holds its weights, too

PEER = """
import torch, torchprobe, transformers
from torchprobe.testing import MemoryWriter
torch.set_num_threads(1)
ids = torch.randint(0, 1000, (4, 1024))
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{size}, attn_implementation={kind!r}))
if {seen}:
    probe = torchprobe.Attention(every=1, maps_every=10**9)
    session = torchprobe.instrument(model, writer=MemoryWriter(), probes=[probe])
out = model(ids, labels=ids, output_attentions={weights})
kept = [-(w * (w + 1e-12).log()).sum(-1).mean() for w in out.attentions or ()]
out.loss.backward()
"""


def test_memory_beside_output_attentions(benchmark):
    """Peak of a whole process that takes one training step of GPT-2's width: bare, with torchprobe, the peer."""
    pytest.importorskip("transformers", reason="needs transformers")
    kinds = {"bare": ("sdpa", False, False), "torchprobe": ("sdpa", True, False), "peer": ("eager", False, True)}
    codes = {name: PEER.format(size=GPT2, kind=kind, seen=seen, weights=w) for name, (kind, seen, w) in kinds.items()}
    peaks = benchmark.pedantic(lambda: {name: peak_mib(code) for name, code in codes.items()}, rounds=1)
    benchmark.extra_info.update(peaks)
    print("\npeak MiB: " + ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items()))
    assert peaks["bare"] < peaks["peer"], "or there is nothing to compare"
    assert peaks["torchprobe"] < peaks["peer"]


def test_huggingface_with_output_attentions(benchmark):
    """The peer: GPT-2 with eager attention that returns its weights, against sdpa with torchprobe, and bare sdpa."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    ids = torch.randint(0, 1000, (4, 1024))

    def make(implementation: str) -> nn.Module:
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, attn_implementation=implementation))

    peer, ours, bare = make("eager"), make("sdpa"), make("sdpa")

    def step(model: nn.Module, **options: bool) -> None:
        out = model(ids, labels=ids, **options)
        for weights in out.attentions or ():
            -(weights * (weights + 1e-12).log()).sum(-1).mean()
        out.loss.backward()
        model.zero_grad()

    calls = (lambda: step(peer, output_attentions=True), lambda: step(ours), lambda: step(bare))
    times: list[list[float]] = []
    with torchprobe.instrument(ours, writer=MemoryWriter(), probes=[probe()]) as session:
        benchmark.pedantic(lambda: times.append([seconds(call) for call in calls]), rounds=4, warmup_rounds=1)
        session.flush()
    ratio = median(a / b for a, b, _ in times[1:])
    benchmark.extra_info["ratio"] = ratio
    print(f"\neager with output_attentions and an entropy by hand over sdpa with torchprobe: {ratio:.3f}", end="")
    print(f", over bare sdpa: {median(a / c for a, _, c in times[1:]):.3f}")
    assert ratio > 0

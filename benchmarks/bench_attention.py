"""What seeing attention costs on a sampled step, as a ratio to the bare step measured in turn with it.

    pytest benchmarks/bench_attention.py --benchmark-enable -n0 -p no:randomly -s

The model has the width and heads of GPT-2 (768, 12) and two layers; a step has 4096 tokens at every length.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter

TOKENS, WIDTH, HEADS, LAYERS = 4096, 768, 12, 2


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
        self.model = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.x = torch.randn(TOKENS // length, length, WIDTH)

    def step(self) -> float:
        start = perf_counter()
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        return perf_counter() - start


@pytest.mark.parametrize("rows", [512, 64])
@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_a_sampled_step(benchmark, length, rows):
    bare, seen = Run(length), Run(length)
    probe = torchprobe.Attention(every=1, rows=rows, maps_every=10**9)
    with torchprobe.instrument(seen.model, writer=MemoryWriter(), probes=[probe]):
        bare.step(), seen.step()
        pairs: list[tuple[float, float]] = []
        benchmark.pedantic(lambda: pairs.append((bare.step(), seen.step())), rounds=3 if length == 4096 else 5)
    ratio = median(b / a for a, b in pairs)
    benchmark.extra_info["ratio"] = ratio
    print(f"\nlength {length}, rows {rows}: ratio {ratio:.4f}, bare step {1e3 * median(a for a, _ in pairs):.0f} ms")
    assert ratio > 0


def peak_mib(code: str) -> float:
    """Largest resident memory of a process that runs `code`, in MiB."""
    before = "import resource, torch, torchprobe; from torchprobe.statistics.attention import *; torch.manual_seed(0)\n"
    after = "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    result = subprocess.run(
        [sys.executable, "-c", before + code + "\n" + after], capture_output=True, text=True, check=True
    )
    return float(result.stdout)


def extra_mib(keys: int, rows: str) -> float:
    """Peak memory of the statistic of 12 heads of 64, beyond that of making queries and keys."""
    make = f"x = QueryKey(*(torch.randn(1, 12, {keys}, 64) for _ in range(2)), scale=0.125, causal=True)"
    return peak_mib(f"{make}; compute(x, {rows}, None)") - peak_mib(make)


@pytest.mark.parametrize(("keys", "rows"), [(131072, "512"), (16384, "'all'")])
def test_memory_beyond_queries_and_keys(benchmark, keys, rows):
    """One layer: 512 rows of very many keys, and all rows without a matrix of queries by keys."""
    extra = benchmark.pedantic(lambda: extra_mib(keys, rows), rounds=1)
    benchmark.extra_info["extra_mib"] = extra
    print(f"\n{keys} keys, rows {rows}: {extra:.0f} MiB beyond queries and keys")
    assert extra < 1024


PEER = """
import transformers
from torchprobe.testing import MemoryWriter
ids = torch.randint(0, 1000, (4, 1024))
size = dict(n_layer=2, n_embd=768, n_head=12, vocab_size=1000, attn_implementation={kind!r})
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))
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
    codes = {name: PEER.format(kind=kind, seen=seen, weights=w) for name, (kind, seen, w) in kinds.items()}
    peaks = benchmark.pedantic(lambda: {name: peak_mib(code) for name, code in codes.items()}, rounds=1)
    benchmark.extra_info.update(peaks)
    print("\npeak MiB: " + ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items()))
    assert peaks["torchprobe"] < peaks["peer"]


def test_huggingface_with_output_attentions(benchmark):
    """The peer: GPT-2 with eager attention that returns its weights, against sdpa with torchprobe."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    ids = torch.randint(0, 1000, (4, 1024))

    def make(implementation: str) -> nn.Module:
        torch.manual_seed(0)
        size = {"n_layer": 2, "n_embd": WIDTH, "n_head": HEADS, "vocab_size": 1000}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, attn_implementation=implementation))

    peer, ours = make("eager"), make("sdpa")

    def step(model: nn.Module, **options) -> float:
        start = perf_counter()
        out = model(ids, labels=ids, **options)
        for weights in out.attentions or ():
            -(weights * (weights + 1e-12).log()).sum(-1).mean()
        out.loss.backward()
        model.zero_grad()
        return perf_counter() - start

    pairs: list[tuple[float, float]] = []
    probe = torchprobe.Attention(every=1, maps_every=10**9)
    with torchprobe.instrument(ours, writer=MemoryWriter(), probes=[probe]):
        benchmark.pedantic(lambda: pairs.append((step(peer, output_attentions=True), step(ours))), rounds=3)
    ratio = median(b / a for a, b in pairs)
    benchmark.extra_info["ratio"] = ratio
    print(f"\nsdpa with torchprobe over eager with output_attentions and an entropy by hand: {ratio:.3f}")
    assert ratio > 0

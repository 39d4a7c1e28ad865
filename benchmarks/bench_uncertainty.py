"""What uncertainty and calibration cost on a sampled step, as a ratio to the bare step measured in turn with it.

    OMP_NUM_THREADS=1 pytest benchmarks/bench_uncertainty.py --benchmark-enable -n0 -p no:randomly -s

Processor time of the whole process, the drain thread included, so that other programs do not count. A classifier of 256
images by 1,000 classes, and a language model's logits of 8 x 1,024 tokens by 50,257 words, which take 1.6 GB; with
their gradient and the loss's own copy, 6 GB.
"""

from __future__ import annotations

from statistics import median
from time import process_time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.modes import Largest
from torchprobe.statistics import calibration, uncertainty
from torchprobe.testing import MemoryWriter

WORDS = 50_257


class Classifier:
    """A perceptron of 12 million weights on 256 examples."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 1000)
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.x, self.targets = torch.randn(256, 3072), torch.randint(1000, (256,))

    def step(self) -> float:
        start = process_time()
        F.cross_entropy(self.model(self.x), self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return process_time() - start


class LanguageModel(Classifier):
    """The embedding and the output of a language model, without the blocks between them: the least there can be."""

    def __init__(self, batch: int = 8, length: int = 1024) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Embedding(WORDS, 256), nn.LayerNorm(256), nn.Linear(256, WORDS, bias=False))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.x, self.targets = torch.randint(WORDS, (batch, length)), torch.randint(WORDS, (batch, length))

    def step(self) -> float:
        start = process_time()
        F.cross_entropy(self.model(self.x).flatten(0, 1), self.targets.flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return process_time() - start


@pytest.mark.parametrize(("make", "rounds"), [(Classifier, 25), (LanguageModel, 2)])
def test_a_sampled_step(benchmark, make, rounds):
    bare = make()
    bare.step()
    seen = make()
    probes = [torchprobe.Uncertainty(every=1), torchprobe.Calibration(every=1)]
    with torchprobe.instrument(seen.model, writer=MemoryWriter(), probes=probes) as session:
        seen.step()
        pairs: list[tuple[float, float]] = []
        benchmark.pedantic(lambda: pairs.append((bare.step(), seen.step())), rounds=rounds)
        session.flush()
    ratio = median(b / a for a, b in pairs)
    benchmark.extra_info["ratio"] = ratio
    print(f"\n{make.__name__}: ratio {ratio:.4f}, bare step {1e3 * median(a for a, _ in pairs):.0f} ms")
    assert ratio > 0


@pytest.mark.parametrize("name", ["predictive_entropy", "calibration", "classification of 10 members"])
def test_nanoseconds_a_logit(benchmark, name):
    logits, targets = torch.randn(256, 1000), torch.randint(1000, (256,))
    members = torch.randn(10, 256, 1000).softmax(-1)
    runs = {
        "predictive_entropy": lambda: uncertainty.predictive_entropy(logits),
        "calibration": lambda: calibration.compute(logits, targets, from_logits=True),
        "classification of 10 members": lambda: uncertainty.classification(members),
    }
    size = members.numel() if "members" in name else logits.numel()
    times: list[float] = []

    def measured() -> None:
        start = process_time()
        runs[name]()
        times.append(process_time() - start)

    benchmark.pedantic(measured, rounds=30, warmup_rounds=3)
    cost = 1e9 * median(times) / size
    benchmark.extra_info["ns_a_logit"] = cost
    print(f"\n{name}: {cost:.2f} ns a logit, {1e3 * median(times):.2f} ms in all")
    assert cost > 0


def test_a_language_models_logits_are_not_copied(benchmark):
    """All of (8, 1024, 50257), a row sample of 512 and none of it at once: the largest temporary, in elements."""
    logits = torch.zeros(1, 1, WORDS).expand(8, 1024, WORDS)
    targets = torch.randint(WORDS, (8, 1024))

    def largest() -> int:
        with Largest() as mode:
            uncertainty.predictive_entropy(logits[:, ::16])
            calibration.compute(logits[:, ::16], targets[:, ::16], from_logits=True)
        return mode.elements

    elements = benchmark.pedantic(largest, rounds=1)
    benchmark.extra_info["largest"] = elements
    print(f"\nlargest temporary: {elements:,} elements of {logits.numel():,}")
    assert elements < logits.numel() / 512

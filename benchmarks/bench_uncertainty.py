"""What uncertainty and calibration cost on a sampled step.

    OMP_NUM_THREADS=1 pytest benchmarks/bench_uncertainty.py --benchmark-enable -n0 -p no:randomly -s

As a ratio to the bare step, measured in turn with it, in processor time of the whole process, the drain thread
included, so that other programs do not count. And as torchprobe's own processor time on the training thread over the
rest of that step: a step of seconds is never twice as long to within a percent, so that its ratio does not tell. Alert
rules are off: they watch every step, sampled or not.

256 images by 1,000 classes: a residual network, as is trained on images of 64 x 64, and a perceptron whose step is as
short as can be. And a language model's logits of 8 x 1,024 tokens by 50,257 words, which take 1.6 GB; with their
gradient and the loss's own copy, 6 GB.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import median
from time import process_time, thread_time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchprobe
from tests.modes import Largest
from torchprobe.capture import gate
from torchprobe.statistics import calibration, uncertainty
from torchprobe.testing import MemoryWriter

CLASSES, WORDS = 1000, 50_257


class Training:
    """A model in training, step by step."""

    def __init__(self, model: nn.Module, x: Tensor, targets: Tensor) -> None:
        self.model, self.x, self.targets = model, x, targets
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step(self) -> float:
        """Seconds of the processor."""
        start = process_time()
        F.cross_entropy(self.model(self.x).flatten(0, -2), self.targets.flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return process_time() - start


def perceptron() -> Training:
    """Of 12 million weights."""
    torch.manual_seed(0)
    widths = [3072, 2048, 2048, CLASSES]
    layers = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.ReLU())]
    return Training(nn.Sequential(*layers[:-1]), torch.randn(256, 3072), torch.randint(CLASSES, (256,)))


def residual_network() -> Training:
    """Of 18 layers (He et al. 2015), for 64 x 64 pixels."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Residual(n, m) for n, m in pairwise(widths)]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))
    return Training(model, torch.randn(256, 3, 64, 64), torch.randint(CLASSES, (256,)))


class Residual(nn.Module):
    """Two convolutions beside a short cut; half the resolution where there are more channels."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.first, self.first_norm = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.second, self.second_norm = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        short_cut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.short_cut = nn.Identity() if stride == 1 else short_cut

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first_norm(self.first(x)).relu()
        return (self.second_norm(self.second(inner)) + self.short_cut(x)).relu()


def language_model() -> Training:
    """The embedding and the output of one, without the blocks between them, and narrow: the least there can be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WORDS, 32), nn.LayerNorm(32), nn.Linear(32, WORDS, bias=False))
    return Training(model, torch.randint(WORDS, (8, 1024)), torch.randint(WORDS, (8, 1024)))


@pytest.mark.parametrize(("make", "rounds"), [(perceptron, 25), (residual_network, 7), (language_model, 5)])
def test_a_sampled_step(benchmark, monkeypatch, make, rounds):
    monkeypatch.setattr(gate, "perf_counter", thread_time)
    bare, seen, writer = make(), make(), MemoryWriter()
    probes = [torchprobe.Uncertainty(every=1), torchprobe.Calibration(every=1)]
    with torchprobe.instrument(seen.model, writer=writer, probes=probes, rules=[]) as session:
        for run in (bare, seen, seen):
            run.step()
        session.flush()
        pairs: list[tuple[float, float, float]] = []
        benchmark.pedantic(lambda: pairs.append((bare.step(), *_measured(seen, session))), rounds=rounds)
        session.flush()
    assert len(writer.scalars("calibration/ece")) == len(writer.scalars("uncertainty_total/root")) == rounds + 2
    ratio, share = median(b / a for a, b, _ in pairs), median(own / (b - own) for _, b, own in pairs)
    benchmark.extra_info.update(ratio=ratio, share=share)
    own, step = (1e3 * median(column) for column in ([own for *_, own in pairs], [a for a, *_ in pairs]))
    print(f"\n{make.__name__}: ratio {ratio:.4f}, {own:.1f} ms of our own: {share:.2%} of a step of {step:.0f} ms")


def _measured(run: Training, session: torchprobe.Session) -> tuple[float, float]:
    """Seconds of a step, and those that torchprobe took of it."""
    meter = session._recorder.guard.meter
    before = meter.seconds
    return run.step(), meter.seconds - before


@pytest.mark.parametrize("name", ["calibration", "classification of 10 members"])
def test_nanoseconds_a_logit(benchmark, name):
    logits, targets = torch.randn(256, 1000), torch.randint(1000, (256,))
    members = torch.randn(10, 256, 1000).softmax(-1)
    runs = {
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
            calibration.compute(logits[:, ::16], targets[:, ::16], from_logits=True)
        return mode.elements

    elements = benchmark.pedantic(largest, rounds=1)
    benchmark.extra_info["largest"] = elements
    print(f"\nlargest temporary: {elements:,} elements of {logits.numel():,}")
    assert elements < logits.numel() / 512

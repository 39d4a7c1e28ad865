"""What a training step costs with torchprobe, as a ratio to the bare step measured in turn with it.

    pytest benchmarks/bench_overhead.py --benchmark-enable -n0 -p no:randomly -s

Every variant trains a model of its own, and steps alternate bare, variant, bare, variant, ..., so that a
drift of the machine's speed cancels. `ratio` in the table's extra info is the median of the ratios pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import torchprobe
from benchmarks.gpt import GPT, Run

ROUNDS = 7
WARM_UP = 2


def interleaved(benchmark, run: Run) -> float:
    """Median ratio of the variant's step to the bare step next to it; both go into the benchmark's table."""
    bare = Run()
    for _ in range(WARM_UP):
        bare.step(), run.step()
    pairs: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: pairs.append((bare.step(), run.step())), rounds=ROUNDS)
    ratio = median(variant / plain for plain, variant in pairs)
    benchmark.extra_info["ratio"] = ratio
    benchmark.extra_info["bare_ms"] = 1e3 * median(plain for plain, _ in pairs)
    print(f"\n{benchmark.name}: ratio {ratio:.4f}, bare step {benchmark.extra_info['bare_ms']:.0f} ms")
    return ratio


def every_step_except(*left_out: type) -> list:
    from torchprobe.plan import default_probes

    return [type(probe)(every=1) for probe in default_probes() if type(probe) not in left_out]


VARIANTS: dict[str, Callable[[], dict]] = {
    "idle": lambda: {"every": 10**9},
    "every probe, every step": lambda: {"probes": every_step_except()},
    "every probe but attention, every step": lambda: {"probes": every_step_except(torchprobe.Attention)},
    "neither attention nor histograms, every step": lambda: {
        "probes": every_step_except(torchprobe.Attention, torchprobe.Histograms)
    },
    "attention, every step": lambda: {"probes": [torchprobe.Attention(every=1)]},
    "gradients, every step": lambda: {"probes": [torchprobe.Gradients(every=1)]},
    "activations, every step": lambda: {"probes": [torchprobe.Activations(every=1)]},
    "updates, every step": lambda: {"probes": [torchprobe.Updates(every=1)]},
    "histograms, every step": lambda: {"probes": [torchprobe.Histograms(every=1)]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_torchprobe(benchmark, variant, tmp_path):
    run = Run()
    with torchprobe.instrument(run.model, log_dir=tmp_path, flush_every=10, **VARIANTS[variant]()) as session:
        assert interleaved(benchmark, run) > 0
    assert session.step == ROUNDS + WARM_UP


def test_summary_writer_by_hand(benchmark, tmp_path):
    """What people write themselves: a norm per parameter by `add_scalar`, gradients and weights by `add_histogram`."""
    writer = SummaryWriter(str(tmp_path))

    def by_hand(model: GPT, step: int) -> None:
        for name, parameter in model.named_parameters():
            writer.add_scalar(f"grad_norm/{name}", parameter.grad.norm(), step)
            writer.add_scalar(f"param_norm/{name}", parameter.norm(), step)
            writer.add_histogram(f"gradients/{name}", parameter.grad, step)
            writer.add_histogram(f"parameters/{name}", parameter, step)

    assert interleaved(benchmark, Run(by_hand)) > 0
    writer.close()


def test_scalars_by_hand(benchmark, tmp_path):
    """The frugal version: norms alone, one `add_scalar` each."""
    writer = SummaryWriter(str(tmp_path))

    def by_hand(model: GPT, step: int) -> None:
        for name, parameter in model.named_parameters():
            writer.add_scalar(f"grad_norm/{name}", parameter.grad.norm(), step)

    assert interleaved(benchmark, Run(by_hand)) > 0
    writer.close()


def test_bare_against_itself(benchmark):
    """The noise of the measurement: two bare models in turn."""
    torch.manual_seed(0)
    assert interleaved(benchmark, Run()) > 0

"""What a training step costs with torchprobe, as a ratio to the bare step measured in turn with it.

    pytest benchmarks/bench_overhead.py --benchmark-enable -n0 -p no:randomly -s

Every variant trains a model of its own, and steps alternate bare, variant, bare, variant, ..., so that a
drift of the machine's speed cancels. `ratio` in the table's extra info is the median of the ratios pair by pair,
with the standard error of that median. Takes seven minutes on two quiet CPU cores; on a busy machine the ratios of
wall time say little: BENCHMARK_CLOCK=cpu takes the process's CPU time, of all threads, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from statistics import median, stdev
from time import process_time

import pytest
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import torchprobe
from benchmarks.gpt import GPT, Run

CPU = os.environ.get("BENCHMARK_CLOCK") == "cpu"
ROUNDS = 7
NOISE_ROUNDS = 20
CADENCE_ROUNDS = 100
WARM_UP = 2

Pairs = list[tuple[float, float]]
"""Seconds of a bare step and of the variant's step next to it."""


def measured(benchmark, run: Run, rounds: int = ROUNDS) -> Pairs:
    """Steps of the variant in turn with bare ones, after a warm-up."""
    bare = Run(batch=len(run.ids))
    for _ in range(WARM_UP):
        bare.step(), run.step()
    pairs: Pairs = []
    benchmark.pedantic(lambda: pairs.append((seconds(bare), seconds(run))), rounds=rounds)
    return pairs


def seconds(run: Run) -> float:
    """Of a step, by the clock or of the process's CPU time."""
    start = process_time()
    taken = run.step()
    return process_time() - start if CPU else taken


def report(benchmark, pairs: Pairs, name: str = "") -> float:
    """The median ratio, printed with its standard error and put into the benchmark's table."""
    ratios = [variant / plain for plain, variant in pairs]
    ratio, error = median(ratios), 1.25 * stdev(ratios) / math.sqrt(len(ratios))  # of a median of normal values
    bare_ms = 1e3 * median(plain for plain, _ in pairs)
    key = f"{name} " if name else ""
    benchmark.extra_info.update({f"{key}ratio": ratio, f"{key}error": error, f"{key}bare_ms": bare_ms})
    print(f"\n{name or benchmark.name}: ratio {ratio:.4f} +- {error:.4f}, bare step {bare_ms:.0f} ms", end="")
    return ratio


def every_step_except(*left_out: type) -> list:
    from torchprobe.probes.choosing import default_probes

    return [type(probe)(every=1) for probe in default_probes() if type(probe) not in left_out]


SPINE = (
    *(torchprobe.Gradients, torchprobe.Parameters, torchprobe.Updates, torchprobe.Activations),
    *(torchprobe.Histograms, torchprobe.LearningRates, torchprobe.Loss),
)
"""What watches weights and layers, whatever the model's outputs mean."""


def spine(*left_out: type) -> dict:
    return {"probes": [probe(every=1) for probe in SPINE if probe not in left_out]}


VARIANTS: dict[str, Callable[[], dict]] = {
    "weights, gradients, activations and their histograms, every step": spine,
    "weights, gradients and activations, every step": lambda: spine(torchprobe.Histograms),
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
    watched_at_every_step(benchmark, Run(), variant, tmp_path)


@pytest.mark.parametrize("variant", list(VARIANTS)[:3])
def test_torchprobe_on_4096_tokens(benchmark, variant, tmp_path):
    """Weights cost the same whatever the batch is, so that a step of more tokens has less to pay."""
    watched_at_every_step(benchmark, Run(batch=16), variant, tmp_path)


def watched_at_every_step(benchmark, run: Run, variant: str, tmp_path) -> None:
    with torchprobe.instrument(run.model, log_dir=tmp_path, flush_every=10, **VARIANTS[variant]()) as session:
        assert report(benchmark, measured(benchmark, run)) > 0
    assert session.step == ROUNDS + WARM_UP


def test_default_cadence_and_idle_steps(benchmark, tmp_path):
    """What a user gets who changes nothing: 100 steps with their sampled one; and the 99 others by themselves."""
    run = Run()
    with torchprobe.instrument(run.model, log_dir=tmp_path) as session:
        pairs = measured(benchmark, run, CADENCE_ROUNDS)
        assert session.step == CADENCE_ROUNDS + WARM_UP
    sampled = pairs[100 - WARM_UP - 1]
    cadence = sum(variant for _, variant in pairs) / sum(plain for plain, _ in pairs)
    benchmark.extra_info["default cadence ratio"] = cadence
    print(f"\ndefault cadence: ratio of the sums over {len(pairs)} steps {cadence:.4f}", end="")
    print(f"; the sampled step {sampled[1] / sampled[0]:.4f}", end="")
    assert report(benchmark, [pair for pair in pairs if pair is not sampled], "idle") > 0


def test_summary_writer_by_hand(benchmark, tmp_path):
    """What people write themselves: a norm per parameter by `add_scalar`, gradients and weights by `add_histogram`."""
    writer = SummaryWriter(str(tmp_path))

    def by_hand(model: GPT, step: int) -> None:
        for name, parameter in model.named_parameters():
            writer.add_scalar(f"grad_norm/{name}", parameter.grad.norm(), step)
            writer.add_scalar(f"param_norm/{name}", parameter.norm(), step)
            writer.add_histogram(f"gradients/{name}", parameter.grad, step)
            writer.add_histogram(f"parameters/{name}", parameter, step)

    assert report(benchmark, measured(benchmark, Run(by_hand))) > 0
    writer.close()


def test_scalars_by_hand(benchmark, tmp_path):
    """The frugal version: norms alone, one `add_scalar` each."""
    writer = SummaryWriter(str(tmp_path))

    def by_hand(model: GPT, step: int) -> None:
        for name, parameter in model.named_parameters():
            writer.add_scalar(f"grad_norm/{name}", parameter.grad.norm(), step)

    assert report(benchmark, measured(benchmark, Run(by_hand))) > 0
    writer.close()


def watched(model: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Hooks as trackers of experiments put them on: norms and histograms, read at once."""

    def look(tensor: Tensor) -> tuple[float, list[float]]:
        low, high = tensor.min().item(), tensor.max().item()
        return tensor.norm().item(), torch.histc(tensor, 64, low, high).tolist()

    def on_gradient(parameter: Tensor) -> None:
        look(parameter.grad), look(parameter.detach())

    def on_outputs(module: nn.Module, before: Sequence[Tensor | None], after: Sequence[Tensor]) -> None:
        look(after[0])

    for module in model.modules():
        yield module.register_full_backward_hook(on_outputs)
    for parameter in model.parameters():
        yield parameter.register_post_accumulate_grad_hook(on_gradient)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # an embedding's input has no gradient
def test_hooks_by_hand(benchmark):
    """What trackers do: a backward hook on every module, a hook on every gradient, `.item()` in each."""
    run = Run()
    handles = list(watched(run.model))
    assert report(benchmark, measured(benchmark, run)) > 0
    for handle in handles:
        handle.remove()


def test_bare_against_itself(benchmark):
    """The noise of the measurement: two bare models in turn."""
    assert report(benchmark, measured(benchmark, Run(), NOISE_ROUNDS)) > 0

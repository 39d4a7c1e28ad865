"""What a step costs with torchprobe and with others, as ratios to the bare step measured in turn with it.

    pytest benchmarks/bench_peers.py --benchmark-enable -n0 -p no:randomly -s --benchmark-json=peers.json
    python -m benchmarks.tables peers.json      # benchmarks/results/peers.json, its plot, and the README's table

Blocks of bare steps and of watched ones alternate, on a model each. `ratio` is that of the medians of the blocks, with
the standard error of the median of the blocks' own ratios; `added_ms` the difference of the medians. Every logger is on
at every step unless its name says otherwise. Without an option models of one kind are measured by a few blocks;
BENCHMARK=long takes all. Peers that are not installed are skipped. BENCHMARK_CLOCK=cpu takes the process's CPU time, of
all threads, in place of the time by the clock: for a machine that others use, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, stdev
from time import process_time
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torchprobe
from benchmarks.recipes import RECIPES, Training, training
from torchprobe.probes.choosing import default_probes

LONG = os.environ.get("BENCHMARK") == "long"
CPU = os.environ.get("BENCHMARK_CLOCK") == "cpu"
SECONDS = 3.0 if LONG else 2.0  # of bare steps, about, and of watched ones as many
BLOCK_SECONDS = 0.1
MOST_BLOCKS, FEWEST_BLOCKS = (200, 7) if LONG else (12, 4)

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # of wandb's hooks while they are traced
]

Peer = Callable[[Training, Path], "Iterator[None]"]


def torchprobe_idle(run: Training, folder: Path) -> Iterator[None]:
    """All defaults, between two samples."""
    with torchprobe.instrument(run.model, log_dir=folder) as session:
        session.every(10**9)
        yield


def torchprobe_all(run: Training, folder: Path) -> Iterator[None]:
    """Every default probe."""
    probes = [type(probe)(every=1) for probe in default_probes()]
    with torchprobe.instrument(run.model, log_dir=folder, probes=probes):
        yield


def torchprobe_same(run: Training, folder: Path) -> Iterator[None]:
    """What the loggers by hand and wandb.watch record: norms and histograms of gradients and parameters."""
    probes = [torchprobe.Gradients(every=1), torchprobe.Parameters(every=1), torchprobe.Histograms(every=1)]
    with torchprobe.instrument(run.model, log_dir=folder, probes=probes):
        yield


def torchprobe_norms(run: Training, folder: Path) -> Iterator[None]:
    """Gradient norms alone."""
    with torchprobe.instrument(run.model, log_dir=folder, probes=[torchprobe.Gradients(every=1)]):
        yield


def torchprobe_activations(run: Training, folder: Path) -> Iterator[None]:
    """Activations alone."""
    with torchprobe.instrument(run.model, log_dir=folder, probes=[torchprobe.Activations(every=1)]):
        yield


def by_hand(run: Training, folder: Path) -> Iterator[None]:
    """`add_scalar` of norms, `add_histogram` of gradients and parameters."""
    writer = SummaryWriter(str(folder))

    def log(model: nn.Module, step: int) -> None:
        for name, parameter in model.named_parameters():
            writer.add_scalar(f"grad_norm/{name}", parameter.grad.norm(), step)
            writer.add_scalar(f"param_norm/{name}", parameter.norm(), step)
            writer.add_histogram(f"gradients/{name}", parameter.grad, step)
            writer.add_histogram(f"parameters/{name}", parameter, step)

    run.extra = log
    yield
    writer.close()


def wandb_watch(run: Training, folder: Path) -> Iterator[None]:
    """`wandb.watch(model, log="all", log_freq=1)`, offline."""
    wandb = importlib.import_module("wandb")
    os.environ["WANDB_SILENT"] = "true"
    with wandb.init(mode="offline", dir=str(folder), project="bench") as session:
        wandb.watch(run.model, log="all", log_freq=1)
        run.extra = lambda model, step: session.log({"step": step})
        yield


def lightning_norms(run: Training, folder: Path) -> Iterator[None]:
    """Lightning's `grad_norm(model, 2)`, written by `add_scalar`."""
    utilities = importlib.import_module("pytorch_lightning.utilities")
    writer = SummaryWriter(str(folder))

    def log(model: nn.Module, step: int) -> None:
        for name, norm in utilities.grad_norm(model, norm_type=2).items():
            writer.add_scalar(name, norm, step)

    run.extra = log
    yield
    writer.close()


def forward_hooks(run: Training, folder: Path) -> Iterator[None]:
    """A forward hook on every module: mean, standard deviation, largest, share of zeros, each by `.item()`."""
    writer = SummaryWriter(str(folder))

    def look(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor):
            x = output.detach()
            for what, value in {
                "mean": x.mean(),
                "std": x.std(),
                "max": x.abs().max(),
                "zero": (x == 0).float().mean(),
            }.items():
                writer.add_scalar(f"{what}/{name}", value.item(), run.steps)

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: look(name, output))
        for name, module in run.model.named_modules()
    ]
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):  # else the graph of a like model serves, unhooked
        yield
    for handle in handles:
        handle.remove()
    writer.close()


def torchprobe_attention(run: Training, folder: Path) -> Iterator[None]:
    """Attention alone: entropy, largest weight and logit, distance, sink of every head."""
    with torchprobe.instrument(run.model, log_dir=folder, probes=[torchprobe.Attention(every=1)]):
        yield


def output_attentions(run: Training, folder: Path) -> Iterator[None]:
    """`output_attentions=True`, which needs the eager implementation, and each layer's mean entropy by `add_scalar`."""
    writer = SummaryWriter(str(folder))
    run.model.set_attn_implementation("eager")
    run.model.config.output_attentions = True

    def look(module: nn.Module, args: object, output: Any) -> None:
        for layer, weights in enumerate(output.attentions):
            p = weights.detach()
            writer.add_scalar(f"entropy/{layer}", -(p * p.clamp(min=1e-12).log()).sum(-1).mean(), run.steps)

    handle = run.model.register_forward_hook(look)
    yield
    handle.remove()
    writer.close()


PEERS: dict[str, Peer] = {
    "torchprobe, nothing due": torchprobe_idle,
    "torchprobe, every default probe": torchprobe_all,
    "norms and histograms: torchprobe": torchprobe_same,
    "norms and histograms: by hand": by_hand,
    "norms and histograms: wandb.watch": wandb_watch,
    "gradient norms: torchprobe": torchprobe_norms,
    "gradient norms: Lightning": lightning_norms,
    "activations: torchprobe": torchprobe_activations,
    "activations: forward hooks, .item()": forward_hooks,
    "attention: torchprobe": torchprobe_attention,
    "attention: output_attentions": output_attentions,
}
TRANSFORMERS = "GPT-2 (transformers)"
NEEDS = {"norms and histograms: wandb.watch": "wandb", "gradient norms: Lightning": "pytorch_lightning"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graphs of other recipes."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.mark.parametrize("recipe", RECIPES if LONG else list(RECIPES)[:1])
@pytest.mark.parametrize("peer", PEERS)
def test_a_step(benchmark, recipe, peer, tmp_path):
    if peer in NEEDS:
        pytest.importorskip(NEEDS[peer])
    if recipe == TRANSFORMERS:
        pytest.importorskip("transformers")
    if (recipe == TRANSFORMERS) != peer.startswith("attention"):
        pytest.skip("of this model attention alone is compared, which no peer reads in others")
    bare, watched = training(recipe), training(recipe)
    with contextmanager(PEERS[peer])(watched, tmp_path):
        pairs = benchmark.pedantic(lambda: measured(bare, watched, short=not benchmark.enabled), rounds=1)
    ratios = [theirs / ours for ours, theirs in pairs]
    plain, with_it = (median(times) for times in zip(*pairs, strict=True))
    error = 1.25 * stdev(ratios) / math.sqrt(len(ratios)) if ratios[1:] else math.nan  # of a median of normal values
    found = {"recipe": recipe, "peer": peer, "ratio": with_it / plain, "error": error, "bare_ms": 1e3 * plain}
    benchmark.extra_info.update(
        found,
        added_ms=1e3 * (with_it - plain),
        blocks=len(pairs),
        clock="cpu" if CPU else "wall",
        torch=torch.__version__,
    )
    print(f"\n{recipe}, {peer}: {with_it / plain:.3f} +- {error:.3f}, bare {1e3 * plain:.2f} ms", end="")
    assert watched.steps == bare.steps


def measured(bare: Training, watched: Training, short: bool) -> list[tuple[float, float]]:
    """Median seconds of a step, of blocks in turn; short: of one step, to see that it runs."""
    usual = min(bare.step() + 0 * watched.step() for _ in range(3))  # the first steps compile, or allocate
    block = 1 if short else max(1, round(BLOCK_SECONDS / usual))
    blocks = 1 if short else min(MOST_BLOCKS, max(FEWEST_BLOCKS, round(SECONDS / (block * usual))))

    def timed(run: Training) -> float:
        start = process_time()
        taken = [run.step() for _ in range(block)]
        return (process_time() - start) / block if CPU else median(taken)

    return [(timed(bare), timed(watched)) for _ in range(blocks)]

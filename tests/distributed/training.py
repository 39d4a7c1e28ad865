"""The training that all scenarios share, and what was recorded of it as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchprobe
from tests.models import Transformer
from torchprobe.records import Histogram
from torchprobe.testing import MemoryWriter

STEPS = 3


def transformer() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(dropout=0.0)
    for block in model.blocks:  # the gradient of a key's bias is 0 in exact arithmetic, and all rounding here
        block.attention.qkv.register_parameter("bias", None)
    return model


def tokens(step: int, size: int = 8) -> Tensor:
    """The whole batch of a step."""
    return torch.randint(0, 11, (size, 7), generator=torch.Generator().manual_seed(step))


def part(batch: Tensor, rank: int, ranks: int) -> Tensor:
    return batch.chunk(ranks)[rank]


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids.roll(1, 1).flatten())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def probes(**options: Any) -> list[Any]:
    return [
        torchprobe.Gradients(every=1),
        torchprobe.Parameters(every=1),
        torchprobe.Updates(every=1),
        torchprobe.Activations(every=1),
        torchprobe.Attention(every=1, rows="all", eval=True),
        torchprobe.Histograms(every=1),
        torchprobe.LearningRates(),
        torchprobe.Loss(every=1),
    ]


def train(
    model: nn.Module,
    batches: Iterable[Iterable[Tensor]],
    between: Callable[[int], Any] = lambda k: None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """One optimizer step for each list of micro-batches."""
    optimizer = optimizer or sgd(model)
    for k, micro in enumerate(batches):
        micro = list(micro)
        for ids in micro:
            (loss_of(model(ids), ids) / len(micro)).backward()
        optimizer.step()
        optimizer.zero_grad()
        between(k)


def values(writer: MemoryWriter) -> dict[str, dict[str, Any]]:
    """Values by tag and step."""
    found: dict[str, dict[str, Any]] = {}
    for record in writer.records:
        for tag, value in record.values.items():
            plain = _plain(value)
            if plain is not None and tag not in ("overview/probe_overhead",):
                found.setdefault(tag, {})[str(record.step)] = plain
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Histogram):
        return {"edges": value.edges.tolist(), "counts": value.counts.tolist()}
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, float | int) else None


def alone(batches: Iterable[Iterable[Tensor]], between: Callable[[nn.Module, int], Any] | None = None) -> Any:
    """The same training in one process."""
    model, writer = transformer(), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, probes=probes()):
        train(model, batches, lambda k: between(model, k) if between else None)
    return values(writer)

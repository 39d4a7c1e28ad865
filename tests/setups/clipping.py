"""A loop in which something is done to gradients between backward pass and step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import torchprobe
from tests.setups.loops import loss_of, net, sgd
from tests.setups.reference import gradients, l2
from torchprobe.testing import MemoryWriter

UNCLIPPED, FRACTION = "overview/grad_norm_unclipped", "overview/clipped_fraction"


Change = Callable[[list[nn.Parameter]], object]


def total(model: nn.Module) -> float:
    return l2(*gradients(model).values())


def run(change: Change | None, sizes=(30.0, 80.0, 1e-3, 50.0), **options) -> tuple[MemoryWriter, list[float]]:
    """A loop whose losses have these factors, with `change` between backward pass and step; norms before it."""
    torch.manual_seed(0)
    model, writer = net(), MemoryWriter()
    optimizer, before = sgd(model, lr=1e-4), []
    with torchprobe.instrument(model, writer=writer, every=1, **options):
        for k, size in enumerate(sizes):
            optimizer.zero_grad()
            (size * loss_of(model, k)).backward()
            before.append(total(model))
            if change is not None:
                change(list(model.parameters()))
            optimizer.step()
    return writer, before


def each(parameters: list[nn.Parameter]) -> Iterator[torch.Tensor]:
    return (p.grad for p in parameters)

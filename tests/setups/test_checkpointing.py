"""Activation checkpointing, eager and compiled: each module counts once for each micro-batch, with the same numbers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import torchprobe
from tests.models import Transformer
from tests.setups.compiled import (
    COMPILERS_WARNINGS,
    NEEDS_GRADIENTS,
    Trained,
    assert_same_values,
    assert_same_weights,
    bare,
    train,
    twin,
    wrapper,
)
from torchprobe.capture.attention.observer import Observer

pytestmark = COMPILERS_WARNINGS
STEPS, MICRO_BATCHES = 2, 2


def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


KINDS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, keep_products),
    },
}


class Checkpointed(nn.Module):
    def __init__(self, part: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = part
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._checkpoint_wrapped_module, x, **self.options)


class Calls(torchprobe.Probe):
    """`calls_<source>/<module>`: how many tensors were seen in a step."""

    source = "outputs"
    fields = ("calls",)

    def compute(self, tensor: Tensor) -> Tensor:
        return tensor.new_ones(1)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def report(self, name, values):
        yield f"calls_{self.source}/{name}", values["calls"]


class GradientCalls(Calls):
    source = "output_gradients"


def made(options: dict[str, Any] | None = None, layers: int = 2) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(dropout=0.0, layers=layers)
    for block in model.blocks:
        block.mlp[1].inplace = False  # selective checkpointing refuses to change what it keeps
    for name, block in list(model.blocks.named_children()) if options else ():
        setattr(model.blocks, name, Checkpointed(block, options))
    return model


PROBES = [torchprobe.Activations(), torchprobe.Gradients(), torchprobe.Attention(), Calls(), GradientCalls()]
WATCHED = {"every": 1, "micro_batches": MICRO_BATCHES, "probes": PROBES}


def run(compiled: Any, model: Transformer, probed: bool = True) -> Trained:
    torch._dynamo.reset()
    backend = None if compiled is bare else "aot_eager"
    return train(compiled, model=model, backend=backend, steps=STEPS, probed=probed, **WATCHED)


@pytest.mark.parametrize(
    "compiled", [pytest.param(bare, id="eager"), pytest.param(wrapper, id="compiled", marks=NEEDS_GRADIENTS)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_each_module_once_for_each_micro_batch_and_the_same_numbers(kind, compiled, monkeypatch):
    attentions: list[str] = []
    record = Observer.record

    def counted(self: Observer, call: Any, *args: Any, **kwargs: Any) -> None:
        attentions.append(call.caller.name)
        record(self, call, *args, **kwargs)

    monkeypatch.setattr(Observer, "record", counted)
    layers = 2 if compiled is bare else 1  # a compiler takes seconds for each
    found = run(compiled, made(KINDS[kind], layers))
    names = [f"blocks.{layer}.attention" for layer in range(layers)]
    assert sorted(attentions) == sorted(names * STEPS * MICRO_BATCHES)
    counts = {v for t in found.writer.tags() if t.startswith("calls_") for _, v in found.writer.scalars(t)}
    assert counts == {float(MICRO_BATCHES)}
    assert_same_weights(found.model, run(compiled, made(KINDS[kind], layers), probed=False).model)
    assert_same_values(found.writer, twin(found, model=made(layers=layers), **WATCHED).writer)

"""torch.compile where graphs take no hooks of tensors inside them: all but activation gradients is there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchprobe
from tests.models import Transformer, inputs
from torchprobe.capture.compiled.tracing import TRACES_GRADIENT_HOOKS, _say_once
from torchprobe.testing import MemoryWriter

pytestmark = pytest.mark.skipif(TRACES_GRADIENT_HOOKS, reason="graphs of this torch take hooks of tensors inside them")


def train(model, step, session=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(3):
        ids = inputs("transformer", seed)
        loss = F.cross_entropy(step(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_is_the_same_and_what_is_missing_is_said_once(caplog):
    _say_once.cache_clear()
    weights = []
    for watched in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Transformer(dropout=0.0)
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        if watched:
            writer = MemoryWriter()
            with torchprobe.instrument(model, writer=writer, every=1):
                weights.append(train(model, step))
        else:
            weights.append(train(model, step))
    torch._dynamo.reset()
    assert all(map(torch.equal, *weights))
    assert {"activation_mean/head", "grad_norm/head.weight"} <= set(writer.tags())
    assert not any(tag.startswith("activation_grad") for tag in writer.tags())
    assert sum("activation gradients inside compiled graphs need torch 2.13" in text for text in caplog.messages) == 1

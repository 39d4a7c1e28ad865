"""Law 1: training is bitwise the same with and without."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import torchprobe
from tests.models import FAMILIES, inputs
from torchprobe.testing import MemoryWriter


def train(
    family: str, probed: bool, steps: int = 5
) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(3)
    model = FAMILIES[family]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    session = torchprobe.instrument(model, writer=MemoryWriter(), every=1) if probed else None
    losses = []
    for step in range(steps):
        logits = model(inputs(family, seed=step))
        logits = logits.flatten(0, -2)
        loss = F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    if session is not None:
        session.detach()
    return copy.deepcopy(model.state_dict()), torch.get_rng_state(), losses


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_losses_and_random_state_are_bitwise_equal(family):
    bare, bare_rng, bare_losses = train(family, probed=False)
    seen, seen_rng, seen_losses = train(family, probed=True)
    assert all(torch.equal(bare[name], seen[name]) for name in bare)
    assert torch.equal(bare_rng, seen_rng)
    assert all(torch.equal(a, b) for a, b in zip(bare_losses, seen_losses, strict=True))


def test_a_transformer_encoder_in_evaluation_keeps_its_fast_path():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=mask)
        with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
            found = [model(x, src_key_padding_mask=mask) for _ in range(3)]
    assert all(torch.equal(expected, output) for output in found)

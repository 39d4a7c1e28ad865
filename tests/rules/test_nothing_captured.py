"""Whoever trains without an optimizer of torch is told what that hides; whoever only infers is not bothered."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter


def ten_passes(model: nn.Module, train: bool) -> None:
    for _ in range(10):
        with contextlib.nullcontext() if train else torch.no_grad():
            loss = model(torch.randn(6, 4)).square().mean()
        if train:
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None


@pytest.mark.parametrize("train", [True, False])
def test_gradients_of_weights_that_are_updated_by_hand(train):
    model = nn.Linear(4, 2)
    probes = [torchprobe.Gradients(every=1), torchprobe.Updates(every=1), torchprobe.Activations(every=1)]
    with torchprobe.instrument(model, writer=MemoryWriter(), probes=probes) as session:
        ten_passes(model, train)
        session.flush()
        told = {alert.where: alert.message for alert in session.alerts}
    assert set(told) == ({"Gradients", "Updates"} if train else set())
    assert all("torch.optim optimizer" in message for message in told.values())

"""What activations of a module are held against."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.setups.reference import moments
from torchprobe.testing import MemoryWriter


def batch(seed: int = 0, size: int = 6) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def assert_moments(writer: MemoryWriter, where: str, elements: Tensor, step: int = 1, prefix: str = "") -> None:
    for key, value in moments(elements).items():
        found = writer.value(f"{prefix}activation_{key}/{where}", step=step)
        cancels = {"mean": 1e-7 * elements.abs().max().item(), "kurtosis": 1e-6 * (value + 3)}
        rounding = cancels.get(key, 1e-12)
        assert found == pytest.approx(value, rel=1e-6, abs=rounding), f"{key} of {where} in step {step}"

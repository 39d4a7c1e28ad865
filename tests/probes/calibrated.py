"""A classifier, and its calibration worked out apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import calibration
from torchprobe.testing import MemoryWriter

KEYS = ("ece", "mce", "adaptive_ece", "brier", "nll", "accuracy", "confidence", "confidence_gap")


def net(inputs: int = 4, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, classes))


def batch(seed: int, size: int = 32, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(0, classes, (size,), generator=generator)


def offline(p: Tensor, y: Tensor) -> dict[str, float]:
    return calibration.summarise(calibration.compute(p.detach().float(), y).tolist())


def assert_calibration(writer: MemoryWriter, step: int, p: Tensor, y: Tensor, prefix: str = "", rel=1e-5) -> None:
    expected = offline(p, y)
    assert writer.value(f"{prefix}calibration/count", step) == expected["count"]
    for key in KEYS:
        assert writer.value(f"{prefix}calibration/{key}", step) == pytest.approx(expected[key], rel=rel, abs=1e-6), key
    assert writer.value(f"{prefix}overview/ece", step) == writer.value(f"{prefix}calibration/ece", step)


def watch(model: nn.Module, writer: MemoryWriter, **options) -> torchprobe.Session:
    probes = [torchprobe.Uncertainty(), torchprobe.Calibration()]
    return torchprobe.instrument(model, writer=writer, **{"probes": probes, "every": 1, **options})

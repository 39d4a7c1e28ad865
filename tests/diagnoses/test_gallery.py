"""Healthy recipes raise no alert: false alarms are worse than misses."""

from __future__ import annotations

import pytest
import torch

import torchprobe
from tests.diagnoses.healthy import HEALTHY
from torchprobe.testing import MemoryWriter

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("every", [None, 10])
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_recipe_is_silent(name, every):
    torch.manual_seed(0)
    session = HEALTHY[name](lambda model: torchprobe.instrument(model, writer=MemoryWriter(), every=every))
    session.detach()
    assert [str(alert) for alert in session.alerts if not alert.ended] == []


def test_the_gallery_is_large():
    assert len(HEALTHY) >= 40

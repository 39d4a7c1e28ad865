"""Fixtures of the tests of checkpoints."""

from __future__ import annotations

import pytest

from torchprobe import CheckpointManager


@pytest.fixture
def manager(tmp_path):
    return CheckpointManager(tmp_path / "checkpoints")

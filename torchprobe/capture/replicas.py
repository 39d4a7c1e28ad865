"""Copies of a model that DataParallel makes at every call, one a device, and runs in threads of their own."""

from __future__ import annotations

from torch import nn


def is_replica(module: nn.Module) -> bool:
    """Whether it is such a copy: our hooks and marks are copied with it, and several threads would share them."""
    return "_is_replica" in module.__dict__

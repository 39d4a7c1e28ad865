"""Thin adapters for training frameworks. `instrument(model)` works there without them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_FRAMEWORKS = ("huggingface", "lightning")


def __getattr__(name: str) -> ModuleType:
    if name not in _FRAMEWORKS:
        raise AttributeError(f"module 'torchprobe.integrations' has no attribute {name!r}")
    return import_module(f"torchprobe.integrations.{name}")

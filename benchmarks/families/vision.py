"""Families of timm, tiny and random: one model a module of the library, shrunk by the arguments of its class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, list[Callable[[nn.Module], Any]]]

MOST = 40_000_000  # parameters
TINY = ("tiny", "nano", "atto", "pico", "small", "xxs", "test")
SMALL = ({"embed_dim": 32, "depth": 2, "num_heads": 4}, {"depth": 2}, {})


def names() -> list[str]:
    """Every module with models in it."""
    import timm

    return [name for name in timm.list_modules() if timm.list_models(module=name)]


def builds(name: str) -> Iterator[Callable[[], Built]]:
    """Models and calls of them, to be tried one after the other."""
    import timm

    models = timm.list_models(module=name)
    smallest = sorted(models, key=lambda model: (not any(word in model for word in TINY), len(model)))
    for model in smallest[:3]:
        for small in SMALL:
            for size in ({"img_size": 64}, {}):
                yield partial(_built, model, small | size)


def _built(name: str, given: dict[str, Any]) -> Built:
    import timm

    with torch.device("meta"):
        size = sum(one.numel() for one in timm.create_model(name, pretrained=False, **given).parameters())
    if size > MOST:
        raise ValueError(f"not shrunk enough: {size:,} parameters")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10, **given)
    size = given.get("img_size") or model.default_cfg["input_size"][-1]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    return model, [lambda module: module(images)]

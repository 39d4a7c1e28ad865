"""What a look at the model's modules tells once: lists that hide modules, one module in many places, odd options."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.capture.diagnosis.gradients import held_by_living
from torchprobe.naming import named_modules
from torchprobe.statistics.dtypes import measurable

_LARGE = 2**24  # elements of a weight that is not looked at
_HIGH_DROPOUT = 0.8


def structure_of(model: nn.Module) -> Iterator[tuple[str, float | Tensor]]:
    """Evidence by name, of a model whose first gradients are there."""
    own = {id(p) for p in model.parameters()}
    everyones: set[int] | None = None  # looked for where it matters
    for name, module in named_modules(model):
        for attribute, value in vars(module).items():
            hidden = [p for p in _parameters_in(value) if id(p) not in own and p.requires_grad and p.grad is not None]
            if hidden and everyones is None:
                everyones = held_by_living()
            if any(id(p) not in (everyones or ()) for p in hidden):
                yield f"unregistered/{name}.{attribute}", len(hidden)
        copies = _copies(module)
        if copies:
            yield f"repeated/{name}", copies
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > _HIGH_DROPOUT:
            yield f"dropout/{name}", module.p
    yield from _beginnings(model)


def _beginnings(model: nn.Module) -> Iterator[tuple[str, float | Tensor]]:
    layers = [(n, m) for n, m in named_modules(model) if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    zero = []
    for name, layer in layers:
        weight = dict(layer.named_parameters(recurse=False)).get("weight")  # an attribute may be a computation
        if weight is None:
            continue
        if weight.requires_grad and min(weight.shape[:2]) > 1 and weight.numel() <= _LARGE and measurable(weight):
            rows = weight.detach().reshape(len(weight), -1).float()
            yield f"constant/{name}.weight", ((rows == rows[:1, :1]).all() & (rows[0, 0] != 0)).float()
            zero.append((rows == 0).all().float())
            if weight.grad is not None and measurable(weight.grad):
                yield f"symmetric/{name}.weight", _alike(rows, weight.grad)
    if len(zero) > 1:
        yield "all_zero", torch.stack([one.to(zero[0].device) for one in zero]).amin()


def _parameters_in(value: Any) -> Iterable[nn.Parameter]:
    """Those of modules in a plain list, tuple or dictionary."""
    parts = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    return [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]


def _copies(module: nn.Module) -> int:
    """How often a list of layers has one and the same layer, where it has no other with parameters."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return 0
    layers = [child for child in module if any(True for _ in child.parameters())]
    return len(layers) if len(layers) > 1 and all(layer is layers[0] for layer in layers) else 0


def _alike(weights: Tensor, gradient: Tensor) -> Tensor:
    """Whether units begin alike and are pulled alike: then they stay alike."""
    gradients = gradient.detach().reshape(len(weights), -1).float()
    largest = gradients.abs().amax()
    same = (gradients - gradients[:1]).abs().amax() <= 1e-5 * largest
    return ((weights == weights[:1]).all() & same & (largest > 0)).float()

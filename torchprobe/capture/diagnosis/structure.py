"""What a look at the model's modules tells once: lists that hide modules, one module in many places, odd options."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from torchprobe.naming import named_modules, named_parameters
from torchprobe.statistics.dtypes import measurable

_LARGE = 2**24  # elements of a weight that is not looked at
_HIGH_DROPOUT = 0.8


def structure_of(model: nn.Module) -> Iterator[tuple[str, float | Tensor]]:
    """Evidence by name, of a model whose first gradients are there."""
    held = {id(p) for p in model.parameters()}
    for name, module in named_modules(model):
        for attribute, value in vars(module).items():
            hidden = [p for p in _parameters_in(value) if id(p) not in held and p.requires_grad]
            if any(p.grad is not None for p in hidden):
                yield f"unregistered/{name}.{attribute}", len(hidden)
        copies = _copies(module)
        if copies:
            yield f"repeated/{name}", copies
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > _HIGH_DROPOUT:
            yield f"dropout/{name}", module.p
    for name, parameter in named_parameters(model):
        if parameter.dim() > 1 and min(parameter.shape[:2]) > 1 and parameter.numel() <= _LARGE:
            yield from _symmetry(name, parameter)


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


def _symmetry(name: str, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """Units that begin alike and are pulled alike stay alike; weights of zero that get no gradient stay zero."""
    gradient = parameter.grad
    if gradient is None or not measurable(gradient) or not measurable(parameter):
        return
    weights, gradients = (x.detach().reshape(x.shape[0], -1).float() for x in (parameter, gradient))
    largest = gradients.abs().amax()
    alike = (weights == weights[:1]).all() & ((gradients - gradients[:1]).abs().amax() <= 1e-5 * largest)
    yield f"symmetric/{name}", (alike & (largest > 0)).double()
    yield f"constant/{name}", ((weights == weights[:1, :1]).all() & (weights[0, 0] != 0)).double()
    yield f"zero/{name}", ((weights == 0).all() & (largest == 0)).double()

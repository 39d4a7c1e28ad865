"""Numbers of one step that diagnoses are decided by, until they leave the device; and those that a look at the model's
modules tells once: lists that hide modules, one module in many places, odd options."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece
from torchprobe.capture.optimizers import held_by_living
from torchprobe.capture.sharding import is_distributed
from torchprobe.naming import named_modules
from torchprobe.probes.base import Reporter
from torchprobe.statistics.dtypes import measurable, real, row_dtype


class Evidence:
    """Host facts and scalars on devices by name, `<fact>` or `<fact>/<where>`; of two of a name the later counts."""

    def __init__(self) -> None:
        self._facts: dict[str, float] = {}
        self._scalars: dict[str, Tensor] = {}

    def put(self, name: str, value: float | Tensor) -> None:
        """One number."""
        if isinstance(value, Tensor):
            self._scalars[name] = value.detach()
        else:
            self._facts[name] = float(value)

    def take(self, reporter: Reporter) -> Iterator[Piece]:
        """All of them as rows, a piece for each device; then there are none."""
        facts, scalars = self._facts, self._scalars
        self._facts, self._scalars = {}, {}
        if facts:
            rows = torch.tensor([*facts.values()], dtype=torch.float64, device="cpu")
            yield Piece(reporter, [*facts], rows.unsqueeze(1))
        devices: defaultdict[torch.device, dict[str, Tensor]] = defaultdict(dict)
        for name, scalar in scalars.items():
            devices[scalar.device][name] = scalar.to(row_dtype(scalar.device)).reshape(1)
        for rows_by_name in devices.values():
            yield Piece(reporter, [*rows_by_name], torch.stack([*rows_by_name.values()]))


# ---- of the model itself

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
        if weight is None or is_distributed(weight):  # a part does not tell whether all units begin alike
            continue
        if weight.requires_grad and min(weight.shape[:2]) > 1 and weight.numel() <= _LARGE and measurable(weight):
            rows = _rows(weight)
            yield f"constant/{name}.weight", ((rows == rows[:1, :1]).all() & (rows[0, 0] != 0)).float()
            zero.append((rows == 0).all().float())
            if weight.grad is not None and measurable(weight.grad):
                yield f"symmetric/{name}.weight", _alike(rows, weight.grad)
    if len(zero) > 1:
        yield "all_zero", torch.stack([one.to(zero[0].device) for one in zero]).amin()


def _parameters_in(value: Any) -> Iterable[nn.Parameter]:
    """Those in a plain list, tuple or dictionary, and of modules there. A plain tensor with a gradient may be data."""
    for part in value.values() if type(value) is dict else value if type(value) in (list, tuple) else ():
        if isinstance(part, nn.Parameter):
            yield part
        elif isinstance(part, nn.Module):
            yield from part.parameters()


def _copies(module: nn.Module) -> int:
    """How often a list has one layer running: all of those with parameters, or three and more of them."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return 0
    children = [child for child in module._modules.values() if child is not None]  # each as often as it is there
    layers = [child for child in children if any(True for _ in child.parameters())]
    running = max((len([*same]) for _, same in groupby(layers, key=id)), default=0)
    return running if running > 2 or running == len(layers) > 1 else 0


def _rows(weight: Tensor) -> Tensor:
    """One a unit; complex numbers by their parts."""
    return real(weight).reshape(len(weight), -1).float()


def _alike(weights: Tensor, gradient: Tensor) -> Tensor:
    """Whether units begin alike and are pulled alike: then they stay alike."""
    gradients = _rows(gradient)
    largest = gradients.abs().amax()
    same = (gradients - gradients[:1]).abs().amax() <= 1e-5 * largest
    return ((weights == weights[:1]).all() & same & (largest > 0)).float()

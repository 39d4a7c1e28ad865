"""What a tag should say, computed by hand in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Weights = list[list[Tensor]]
"""Of each parameter, after each step."""


def following(weights: Weights, kind: type[Optimizer]) -> type[Optimizer]:
    """An optimizer class of the same name, whose steps put the weights of another run in place.

    What two compilers or kernels round differently at one step then does not grow over the next ones.
    """
    remaining = iter(weights)

    @torch.no_grad()
    def step(self: Optimizer, closure: None = None) -> None:
        for parameter, weight in zip(self.param_groups[0]["params"], next(remaining), strict=True):
            parameter.copy_(weight)

    return type(kind.__name__, (kind,), {"step": step})


def wide(tensor: Tensor) -> Tensor:
    """Every element as float64; a complex tensor stays complex, a sparse one holds its values."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).clone()


def l2(*tensors: Tensor) -> float:
    """L2 norm of all elements together."""
    return sum(wide(tensor).abs().square().sum().item() for tensor in tensors) ** 0.5


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that are there now, by the parameter's name."""
    return {name: wide(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as they are now."""
    return {name: wide(p) for name, p in model.named_parameters()}


def moments(tensor: Tensor) -> dict[str, float]:
    """The activation statistics of a tensor's elements."""
    x = wide(tensor)
    return {
        "mean": x.mean().item(),
        "std": x.std(correction=0).item(),
        "rms": x.square().mean().sqrt().item(),
        "max_abs": x.abs().max().item(),
        "zero_fraction": (x == 0).double().mean().item(),
        "kurtosis": (x.pow(4).mean() / x.square().mean().square() - 3).item(),
    }

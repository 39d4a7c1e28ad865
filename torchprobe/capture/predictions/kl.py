"""Bayesian layers that return a divergence beside their output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_METHODS = ("kl_loss", "kl_div", "kl_divergence")  # of bayesian-torch's layers, and others'


def divergence_beside(module: nn.Module, output: Any) -> Tensor | None:
    """The scalar after an output, as in bayesian-torch: of a module without Bayesian layers it may be a loss."""
    if not isinstance(output, tuple | list) or len(output) != 2 or not isinstance(output[1], Tensor):
        return None
    scalar = output[1]
    if scalar.numel() != 1 or not _is_bayesian(module):
        return None
    return scalar.detach().to(torch.promote_types(scalar.dtype, torch.float32))


def _is_bayesian(module: nn.Module) -> bool:
    return any(callable(getattr(type(part), name, None)) for part in module.modules() for name in _METHODS)

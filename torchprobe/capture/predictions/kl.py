"""Bayesian layers that return a divergence beside their output."""

from __future__ import annotations

from torch import nn

_METHODS = ("kl_loss", "kl_div", "kl_divergence")  # of bayesian-torch's layers, and others'


def carries_kl(module: nn.Module) -> bool:
    """Whether a module holds Bayesian layers, so that a scalar beside its output is a divergence and not a loss."""
    return any(callable(getattr(type(part), name, None)) for part in module.modules() for name in _METHODS)

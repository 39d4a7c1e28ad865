"""Targets of numbers, from the gradients of a Gaussian likelihood at a predicted mean and at its variance.

With d = mean - target and weight s, -s log N(target) has the gradients s d / v at the mean and s (1 - d²/v) / 2v at the
variance v. Two equations for s and d, so that each number gives its own s; that all give the same one tells that the
loss was such a likelihood at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.capture.compiled.operators import GradientHook
from torchprobe.capture.predictions.forms import FEW_ROWS
from torchprobe.capture.predictions.gradient import TOLERANCE
from torchprobe.statistics.dtypes import row_dtype

_NEARLY_ALL = 0.99


class Spread(NamedTuple):
    """What a model returns in place of a variance: its derivative there is factor · variance ** power."""

    factor: float = 1.0
    power: float = 0.0


STD = Spread(2.0, 0.5)


class Number(NamedTuple):
    """One way to read a mean and a variance: key is empty where the output says so, else it is a hypothesis that a loss
    has to confirm. mean and source, of which convert makes the variance, are still in the graph.
    """

    key: str
    mean: Tensor | None
    source: Tensor
    spread: Spread = Spread()
    convert: Callable[[Tensor], Tensor] = lambda x: x
    is_normal: bool = True

    @property
    def variance(self) -> Tensor:
        """Detached, in float32 or wider; NaN where a number is negative, for then it is none."""
        found = self.convert(wide(self.source))
        return found.where((found >= 0).all(), torch.nan)


def wide(tensor: Tensor) -> Tensor:
    """Detached, and in float32 or wider: a variance must not overflow."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def on_both_gradients(mean: Tensor, spread: Tensor, then: Callable[[Tensor, Tensor], None]) -> None:
    """Hear once of both gradients, if both arrive: autograd hands None to the hook of what the loss leaves out."""
    arrived: dict[str, Tensor] = {}

    def take(name: str, gradient: Tensor | None) -> None:
        if gradient is not None:
            arrived[name] = gradient.detach()  # its own graph may lead back here
        if len(arrived) == 2:
            then(arrived.pop("mean"), arrived.pop("spread"))

    mean.register_hook(GradientHook(partial(take, "mean")))
    spread.register_hook(GradientHook(partial(take, "spread")))


def targets_of(
    mean: Tensor, variance: Tensor, of_mean: Tensor, of_spread: Tensor, spread: Spread
) -> tuple[Tensor, Tensor]:
    """Targets, and a flag: whether these are gradients of a Gaussian likelihood. All of one shape.

    NaN where there is no gradient, as of a number that is left out of the loss.
    """
    tolerance = TOLERANCE.get(of_mean.dtype, 2e-3)
    m, v, g, h = (x.to(row_dtype(x.device)) for x in (mean, variance, of_mean, of_spread))
    a, b = 2 * h * v ** (1 - spread.power) / spread.factor, v * g.square()  # s (1 - d²/v) and s² d²/v
    root = (a.square() + 4 * b).sqrt()
    weight = torch.where(a > 0, (root + a) / 2, 2 * b / (root - a))
    alive = weight.isfinite() & (weight > 0)
    count, known = alive.sum(), weight.where(alive, 0.0)
    common = known.sum() / count
    agree = (alive & ((known - common).abs() <= tolerance * common)).sum()
    return (m - v * g / weight).where(alive, torch.nan), (count >= FEW_ROWS) & (agree >= _NEARLY_ALL * count)

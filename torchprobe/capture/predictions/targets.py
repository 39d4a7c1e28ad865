"""Targets: those that the user's code hands to the model or to a loss module, and those of numbers, by gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.capture.backward import roots
from torchprobe.capture.compiled.operators import GradientHook
from torchprobe.capture.gate import Gate
from torchprobe.capture.predictions.forms import BINARY, FEW_ROWS, IGNORED, LAST, SECOND, Form, rows_of
from torchprobe.capture.predictions.gradient import TOLERANCE
from torchprobe.naming import unwrapped
from torchprobe.statistics.dtypes import row_dtype

_NAMES = ("labels", "targets", "label", "target")
_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_ELEMENTS = (nn.BCEWithLogitsLoss, nn.BCELoss)
_NUMBERS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.GaussianNLLLoss)
KINDS = (*_CLASSES, *_ELEMENTS, *_NUMBERS)
"""The loss modules that are understood."""


# ---- an argument of the model


class Labels(NamedTuple):
    """An argument that may hold the labels; its name confirms nothing. items: by what their loss is divided, if not by
    their own number: HuggingFace's `Trainer` counts those of several batches, and says so to the model.
    """

    values: Tensor
    items: Any = None


def labels_in(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Labels | None:
    """By name or by position."""
    given = {**_by_position(module, args), **kwargs}
    found = next((given[name] for name in _NAMES if isinstance(given.get(name), Tensor)), None)
    items = given.get("num_items_in_batch")
    is_number = type(items) is int or (isinstance(items, Tensor) and items.numel() == 1)
    return None if found is None else Labels(found, items if is_number else None)


def _by_position(module: nn.Module, args: Sequence[Any]) -> dict[str, Any]:
    if len(args) < 2:  # the input alone
        return {}
    try:
        names = list(inspect.signature(unwrapped(module).forward).parameters)
    except (TypeError, ValueError):  # a forward written in C
        return {}
    return dict(zip(names, args, strict=False))


# ---- the call of a loss module


class Call(NamedTuple):
    """What a loss module judged. form is None for numbers, whose variance is known to `GaussianNLLLoss` alone.

    weight, smoothing: of classes. reduced: whether it returned one number, of all examples that count.
    """

    input: Tensor
    target: Tensor
    form: Form | None
    are_probabilities: bool = False
    variance: Tensor | None = None
    weight: Tensor | None = None
    smoothing: float = 0.0
    reduced: bool = True


def read_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """The call of one of `KINDS`; None for shapes that it would not take."""
    given = {**dict(zip(("input", "target", "var"), args, strict=False)), **kwargs}
    x, y = given.get("input"), given.get("target")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None
    reduced = getattr(module, "reduction", "mean") != "none"
    if isinstance(module, _CLASSES):
        call = _of_classes(x, y, module.ignore_index)
        smoothing = float(getattr(module, "label_smoothing", 0.0))
        return call and call._replace(weight=module.weight, smoothing=smoothing, reduced=reduced)
    if isinstance(module, _ELEMENTS):
        same = x.shape == y.shape
        return Call(x, y, BINARY, isinstance(module, nn.BCELoss), reduced=reduced) if same else None
    variance = given.get("var") if isinstance(module, nn.GaussianNLLLoss) else None
    return Call(x, y, None, variance=variance, reduced=reduced)


def _of_classes(x: Tensor, y: Tensor, ignore_index: int) -> Call | None:
    if x.dim() < 2:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    form = LAST if x.dim() == 2 else SECOND
    if y.is_floating_point():
        return Call(x, y, form) if x.shape == y.shape else None
    if y.shape != x.shape[:1] + x.shape[2:]:
        return None
    return Call(x, torch.where(y == ignore_index, IGNORED, y), form)


def by_row(targets: Tensor, form: Form, index: Tensor | None) -> Tensor:
    """Row by row, as the predictions: (n,), or (n, classes) for class probabilities; no view."""
    targets = targets.detach()
    if form.kind == "softmax" and targets.is_floating_point():
        return rows_of(targets, form, index).clone()
    flat = targets.reshape(-1).clone() if index is None else targets.reshape(-1)[index]
    return flat if form.kind == "softmax" else torch.stack((1 - flat, flat), -1).float()


def wanted(targets: Tensor, weight: Tensor | None, smoothing: float, like: Tensor) -> Tensor:
    """What a cross-entropy wants of each class, (n, classes): its targets, smoothed and weighted; 0 of ignored rows."""
    classes = like.shape[-1]
    if targets.dim() == 1:
        valid = ((targets >= 0) & (targets < classes))[:, None]
        b = (torch.arange(classes, device=like.device) == targets[:, None]).to(like.dtype)
    else:
        valid, b = torch.ones_like(targets[:, :1], dtype=torch.bool), targets.to(like.dtype)
    b = (1 - smoothing) * b + smoothing / classes * valid if smoothing else b
    return b if weight is None else b * weight.detach().to(like.dtype)


def direction(p: Tensor, targets: Tensor, weight: Tensor | None, smoothing: float, already: Tensor) -> Tensor:
    """The gradient at logits that a call asks for, up to a factor: p Σb - b with what is wanted of each class, b.
    already: where they are probabilities instead.
    """
    b = wanted(targets, weight, smoothing, p)
    by_logits = p * b.sum(-1, keepdim=True) - b
    return torch.where(already, -b / p.clamp(min=torch.finfo(p.dtype).tiny), by_logits)


def weights_of(directions: Sequence[Tensor], g: Tensor) -> Sequence[Tensor]:
    """By least squares: of one direction a weight a row, of two one for all rows; none is below 0."""
    g = g.nan_to_num(0.0, 0.0, 0.0)
    d = [x.nan_to_num(0.0, 0.0, 0.0) for x in directions]
    tiny = torch.finfo(g.dtype).tiny
    if len(d) == 1:
        one = (d[0] * g).sum(-1, keepdim=True) / d[0].square().sum(-1, keepdim=True).clamp(min=tiny)
        return [one.clamp(min=0)]
    a, b, c = (d[0] * d[0]).sum(), (d[0] * d[1]).sum(), (d[1] * d[1]).sum()
    x, y = (d[0] * g).sum(), (d[1] * g).sum()
    whole = (a * c - b * b).clamp(min=tiny)
    return [((x * c - y * b) / whole).clamp(min=0), ((y * a - x * b) / whole).clamp(min=0)]


# ---- numbers, by the gradients of a Gaussian likelihood at a predicted mean and at its variance
# With d = mean - target and weight s, -s log N(target) has the gradients s d / v at the mean and s (1 - d²/v) / 2v at
# the variance v. Two equations for s and d, so that each number gives its own s; that all give the same one tells that
# the loss was such a likelihood at all.

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


def on_gradient(tensor: Tensor, gate: Gate, then: Callable[[Tensor], None]) -> None:
    """Hear of gradients for parameters: a backward pass for inputs alone is called on no loss that is trained."""
    tensor.register_hook(GradientHook(partial(_take, gate, then)))


def _take(gate: Gate, then: Callable[[Tensor], None], gradient: Tensor) -> None:
    with gate.boundary():
        if not roots().for_parameters:
            return
    then(gradient)


def on_both_gradients(mean: Tensor, spread: Tensor, gate: Gate, then: Callable[[Tensor, Tensor], None]) -> None:
    """Hear once of both, if both arrive."""
    arrived: dict[str, Tensor] = {}

    def take(name: str, gradient: Tensor) -> None:
        arrived[name] = gradient.detach()  # its own graph may lead back here
        if len(arrived) == 2:
            then(arrived.pop("mean"), arrived.pop("spread"))

    on_gradient(mean, gate, partial(take, "mean"))
    on_gradient(spread, gate, partial(take, "spread"))


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

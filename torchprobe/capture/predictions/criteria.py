"""What a loss module was called with: predictions and the targets that they are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.capture.predictions.forms import BINARY, LAST, SECOND, Form
from torchprobe.capture.predictions.gradient import IGNORED

_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_ELEMENTS = (nn.BCEWithLogitsLoss, nn.BCELoss)
_NUMBERS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.GaussianNLLLoss)
KINDS = (*_CLASSES, *_ELEMENTS, *_NUMBERS)


class Call(NamedTuple):
    """One call. form is None for numbers, whose variance is known to `GaussianNLLLoss` alone."""

    input: Tensor
    target: Tensor
    form: Form | None
    are_probabilities: bool = False
    variance: Tensor | None = None


def read_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """What a loss module of torch's judged; None for another module, and for shapes that it would not take."""
    given = {**dict(zip(("input", "target", "var"), args, strict=False)), **kwargs}
    x, y = given.get("input"), given.get("target")
    if not isinstance(module, KINDS) or not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None
    if isinstance(module, _CLASSES):
        return _of_classes(x, y, module.ignore_index)
    if isinstance(module, _ELEMENTS):
        return Call(x, y, BINARY, isinstance(module, nn.BCELoss)) if x.shape == y.shape else None
    return Call(x, y, None, variance=given.get("var") if isinstance(module, nn.GaussianNLLLoss) else None)


def _of_classes(x: Tensor, y: Tensor, ignore_index: int) -> Call | None:
    if x.dim() < 2:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    form = LAST if x.dim() == 2 else SECOND
    if y.is_floating_point():
        return Call(x, y, form) if x.shape == y.shape else None
    if y.shape != x.shape[:1] + x.shape[2:]:
        return None
    return Call(x, torch.where(y == ignore_index, IGNORED, y), form)

"""Targets that the user's code hands to somebody: to the model itself, or to a loss module of torch's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.capture.predictions.forms import BINARY, IGNORED, LAST, SECOND, Form
from torchprobe.naming import unwrapped

_NAMES = ("labels", "targets", "label", "target")
_SHIFTING = re.compile(r"CausalLM|LMHeadModel|DoubleHeadsModel")
_PROBLEMS = {"regression": None, "multi_label_classification": BINARY}
_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_ELEMENTS = (nn.BCEWithLogitsLoss, nn.BCELoss)
_NUMBERS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.GaussianNLLLoss)
KINDS = (*_CLASSES, *_ELEMENTS, *_NUMBERS)
"""The loss modules that are understood."""


# ---- an argument of the model


def labels_in(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The labels that a model was called with, by name or by position."""
    given = {**_by_position(module, args), **kwargs}
    return next((given[name] for name in _NAMES if isinstance(given.get(name), Tensor)), None)


def matched(module: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Form, Tensor, Tensor] | None:
    """The form of the logits, and logits and labels row by row; None where shapes do not go together.

    Logits (batch, time, classes) of a causal language model predict the label one further on.
    """
    if labels.is_floating_point():
        several = _problem(module) == "multi_label_classification" and labels.shape == logits.shape
        return (BINARY, logits, labels) if several else None
    if logits.dim() < 2 or logits.shape[-1] == 1:
        return None
    labels = torch.where(labels < 0, IGNORED, labels)
    if labels.shape == logits.shape[:-1]:
        if labels.dim() == 2 and _shifts(module):
            return LAST, logits[:, :-1], labels[:, 1:]
        return LAST, logits, labels
    return (SECOND, logits, labels) if labels.shape == logits.shape[:1] + logits.shape[2:] else None


def form_is_known(module: nn.Module) -> bool:
    """Whether a field called logits holds those of one class in several; a HuggingFace config may say otherwise."""
    return _problem(module) not in _PROBLEMS


def _shifts(module: nn.Module) -> bool:
    """Whether a model's own loss shifts the labels, as HuggingFace's causal language models do."""
    model = unwrapped(module)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if getattr(model, "loss_type", None) is not None:
        return bool(model.loss_type == "ForCausalLM")
    return any(_SHIFTING.search(cls.__name__) for cls in type(model).__mro__)


def _problem(module: nn.Module) -> str | None:
    return getattr(getattr(unwrapped(module), "config", None), "problem_type", None)


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
    """What a loss module judged. form is None for numbers, whose variance is known to `GaussianNLLLoss` alone."""

    input: Tensor
    target: Tensor
    form: Form | None
    are_probabilities: bool = False
    variance: Tensor | None = None


def read_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """The call of one of `KINDS`; None for shapes that it would not take."""
    given = {**dict(zip(("input", "target", "var"), args, strict=False)), **kwargs}
    x, y = given.get("input"), given.get("target")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
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

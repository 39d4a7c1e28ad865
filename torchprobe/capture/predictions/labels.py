"""Targets that a model is handed together with its input: a `labels=` or `targets=` argument."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.capture.predictions.forms import BINARY, LAST, SECOND, Form
from torchprobe.capture.predictions.gradient import IGNORED
from torchprobe.naming import unwrapped

_NAMES = ("labels", "targets", "label", "target")
_SHIFTING = re.compile(r"CausalLM|LMHeadModel|DoubleHeadsModel")
_PROBLEMS = {"regression": None, "multi_label_classification": BINARY}


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
        if labels.dim() == 2 and shifts(module):
            return LAST, logits[:, :-1], labels[:, 1:]
        return LAST, logits, labels
    if labels.shape == logits.shape[:1] + logits.shape[2:]:
        return SECOND, logits, labels
    return None


def shifts(module: nn.Module) -> bool:
    """Whether a model's own loss shifts the labels, as HuggingFace's causal language models do."""
    model = unwrapped(module)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if getattr(model, "loss_type", None) is not None:
        return bool(model.loss_type == "ForCausalLM")
    return any(_SHIFTING.search(cls.__name__) for cls in type(model).__mro__)


def form_is_known(module: nn.Module) -> bool:
    """Whether a field called logits holds those of one class in several; a HuggingFace config may say otherwise."""
    return _problem(module) not in _PROBLEMS


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

"""Padding masks that modules are called with: `(batch, tokens)` arguments that say which tokens there are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchprobe.capture.attention.handwritten import Handwritten
from torchprobe.capture.source import Pass
from torchprobe.naming import named_modules
from torchprobe.probes.base import Reporter

_KEEPS = "attention_mask"
_WORDS = (_KEEPS, "key_padding_mask", "padding_mask")


class MaskArguments:
    """Looks at the calls of modules that take such a mask, the model's own included.

    `attention_mask` is not 0 for tokens, `padding_mask` is true for padding, whatever stands before; the tokens are
    those of the arguments with the same beginning: `decoder_attention_mask` goes with `decoder_input_ids`.
    """

    in_validation = True

    def __init__(self, reporter: Reporter, handwritten: Handwritten) -> None:
        self.reporter = reporter
        self._handwritten = handwritten

    def chosen(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The modules whose code takes such an argument; PyTorch's own hand theirs on."""
        for name, module in named_modules(model):
            kind: Any = type(module)
            if not kind.__module__.startswith("torch.") and any(_beginning(p) is not None for p in _parameters(kind)):
                yield name, module

    def before(
        self, passing: Pass, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """One of them is called."""
        call = dict(zip(_parameters(cast("Any", type(module))), args, strict=False)) | kwargs
        masks = {name: value for name, value in call.items() if _is_mask(name, value)}
        for each, mask in masks.items():
            padded = mask == 0 if each.endswith(_KEEPS) else mask
            for tokens in _tokens(call, each, mask):
                self._handwritten.say_padded(tokens, padded)

    def after(self, passing: Pass, name: str, output: Any) -> None:
        """It has returned."""

    def unseen(self, reason: str) -> None:
        """A compiled model: what is read inside its graphs goes by masks alone."""


@cache
def _parameters(kind: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(kind.forward).parameters)[1:]
    except (TypeError, ValueError):  # a forward that Python cannot look into
        return ()


def _beginning(name: str) -> str | None:
    """What stands before the word in the name of a mask; None for any other name."""
    return next((name.removesuffix(word).rstrip("_") for word in _WORDS if name.endswith(word)), None)


def _is_mask(name: str, value: Any) -> bool:
    if _beginning(name) is None or not isinstance(value, Tensor) or value.dim() != 2 or value.is_floating_point():
        return False
    return name.endswith(_KEEPS) or value.dtype is torch.bool


def _tokens(call: Mapping[str, Any], mask_name: str, mask: Tensor) -> Iterator[Tensor]:
    """What has an entry for each of the mask's, and a name that begins as that of this mask, and of no longer one."""
    beginning = _beginning(mask_name) or ""
    longer = [other for name in call if (other := _beginning(name)) and len(other) > len(beginning)]
    for name, value in call.items():
        if not isinstance(value, Tensor) or _beginning(name) is not None or value.shape[:2] != mask.shape:
            continue
        of_keys = mask_name.endswith("key_padding_mask") and "key" in call
        if name == "key" if of_keys else name.startswith(beginning) and not name.startswith(tuple(longer)):
            yield value

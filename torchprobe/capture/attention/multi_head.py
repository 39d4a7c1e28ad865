"""`F.multi_head_attention_forward`, which asks for function modes and then hides what it does from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward as FUNCTION

from torchprobe.capture.attention.layout import plain
from torchprobe.capture.attention.observer import Call
from torchprobe.capture.attention.owner import Caller
from torchprobe.capture.attention.padding import blocked
from torchprobe.capture.attention.provenance import same_source

__all__ = ["FUNCTION", "arguments", "call_of", "transparent"]

_PARAMETERS = FUNCTION.__code__.co_varnames[: FUNCTION.__code__.co_argcount]


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return dict(zip(_PARAMETERS, args, strict=False)) | dict(kwargs)


def transparent() -> Callable[..., Any]:
    """The same code, which does not ask: function modes see each step of it."""
    copy = FunctionType(
        FUNCTION.__code__,
        {**FUNCTION.__globals__, "has_torch_function": lambda tensors: False},
        FUNCTION.__name__,
        FUNCTION.__defaults__,
        FUNCTION.__closure__,
    )
    copy.__kwdefaults__ = FUNCTION.__kwdefaults__
    return copy


def call_of(arguments: Mapping[str, Any], caller: Caller) -> Call:
    """What the arguments say: how many heads, whether the queries are the keys, and which of them are padded."""
    query, key = arguments["query"], arguments["key"]
    cross = not _are_same(query, key) and (query.size(0) != key.size(0) or not same_source(query, key))
    padding = arguments.get("key_padding_mask")
    if padding is not None:
        padding = None if cross else _padded(padding)
    return Call(caller._replace(heads=int(arguments["num_heads"])), cross, padding)


def _are_same(query: Tensor, key: Tensor) -> bool:
    """Whether it is one tensor, or two views of it as `batch_first` makes them."""
    return query.data_ptr() == key.data_ptr() and query.shape == key.shape and query.stride() == key.stride()


def _padded(mask: Tensor) -> Tensor:
    mask = plain(mask)
    padded = mask if mask.dtype is torch.bool else blocked(mask)
    return padded if padded.dim() == 2 else padded.unsqueeze(0)

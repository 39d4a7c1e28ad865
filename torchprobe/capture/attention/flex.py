"""`flex_attention` outside of `torch.compile`: its higher-order operator holds what the user wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.capture.attention import stack
from torchprobe.capture.attention.layout import plain
from torchprobe.capture.compat import HigherOrderOperator
from torchprobe.capture.compat import enable_torch_function as _enable_torch_function
from torchprobe.statistics.attention import QueryKey

_PARAMETERS = (
    *("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options"),
    *("score_mod_other_buffers", "mask_mod_other_buffers"),
)


def arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The operator's arguments by name; None for any other function."""
    if not isinstance(func, HigherOrderOperator) or func.name() != "flex_attention":
        return None
    return dict(zip(_PARAMETERS, args, strict=False)) | dict(kwargs)


def query_key(call: Mapping[str, Any]) -> QueryKey:
    """Queries and keys of a call, with its score_mod and mask_mod."""
    query, key = plain(call["query"]), plain(call["key"])
    batch = max(query.size(0), key.size(0))
    score_mod = _with_buffers(call["score_mod"], call.get("score_mod_other_buffers", ()))
    mask_mod = _with_buffers(call["block_mask"][-1], call.get("mask_mod_other_buffers", ()))
    modify = Modifications(score_mod, mask_mod)
    return QueryKey(query.expand(batch, -1, -1, -1), key.expand(batch, -1, -1, -1), call["scale"], modify=modify)


@dataclass(frozen=True)
class Modifications:
    """score_mod (score, batch, head, query, key) -> score and mask_mod (batch, head, query, key) -> bool, which are
    written for one logit each."""

    score_mod: Callable[..., Tensor]
    mask_mod: Callable[..., Tensor]

    def __call__(self, logits: Tensor, *indices: Tensor) -> Tensor:
        """Applies both to many logits."""
        dims = logits.dim()
        full = [index[(None,) * (dims - index.dim())].int() for index in indices]
        with _indexing_by_scalars():
            scores = _everywhere(self.score_mod, [logits, *full], dims)
            return scores.masked_fill(~_everywhere(self.mask_mod, full, dims), -math.inf)


@contextmanager
def _indexing_by_scalars() -> Iterator[None]:
    """`bias[head]` with a tensor for the head is a lookup, and not a read of its value, as `flex_attention` has it."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex  # loaded with flex_attention

    with stack.emptied(), _enable_torch_function(), TransformGetItemToIndex():
        yield


def _everywhere(function: Callable[..., Tensor], tensors: list[Tensor], dims: int) -> Tensor:
    """A function of scalars over tensors that broadcast with each other."""
    if not dims:
        return function(*tensors)
    vary = [tensor.size(0) > 1 for tensor in tensors]
    inner = [tensor if varies else tensor[0] for tensor, varies in zip(tensors, vary, strict=True)]
    if not any(vary):
        return _everywhere(function, inner, dims - 1).unsqueeze(0)
    in_dims = tuple(0 if varies else None for varies in vary)
    mapped = torch.vmap(lambda *rest: _everywhere(function, list(rest), dims - 1), in_dims=in_dims)
    return mapped(*inner)


def _with_buffers(function: Any, buffers: tuple[Any, ...]) -> Callable[..., Tensor]:
    call = function.forward if isinstance(function, nn.Module) else function  # no hook of the user's fires
    return lambda *indices: call(*indices, *buffers)

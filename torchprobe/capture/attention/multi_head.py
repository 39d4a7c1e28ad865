"""`nn.MultiheadAttention`: its function, which hides what it does, and its projections."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, multi_head_attention_forward, pad

from torchprobe.capture.attention.layout import blocked

FUNCTION = multi_head_attention_forward
_PARAMETERS = tuple(inspect.signature(FUNCTION).parameters)


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


class Projected(NamedTuple):
    """query, key: (batch, heads, length, width of a head); mask: added to the logits, broadcastable to them; padding:
    bool (batch, keys); added: how many keys at the end are no tokens."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    padding: Tensor | None
    added: int


def projected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    *others: Any,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    **further: Any,
) -> Projected:
    """From the arguments of `F.multi_head_attention_forward`, as `nn.MultiheadAttention` hands them over: inputs are
    (length, batch, width), or (length, width). The keys that it adds, which everybody sees, are the last ones."""
    if query.dim() == 2:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if in_proj_weight is not None and not use_separate_proj_weight:
        q_proj_weight, k_proj_weight, _ = in_proj_weight.chunk(3)
    q_bias, k_bias = (None, None) if in_proj_bias is None else in_proj_bias.chunk(3)[:2]
    q = _by_head(linear(query.detach(), q_proj_weight, q_bias), num_heads)  # type: ignore[arg-type]
    if static_k is None:
        k = _by_head(linear(key.detach(), k_proj_weight, k_bias), num_heads)  # type: ignore[arg-type]
    else:
        k = static_k.unflatten(0, (-1, num_heads))
    added = [] if bias_k is None else [_by_head(bias_k, num_heads).expand(k.size(0), -1, -1, -1)]
    added += [torch.zeros_like(k[:, :, :1])] if add_zero_attn else []
    mask = _joined(attn_mask, key_padding_mask, num_heads)
    if added:
        k = torch.cat((k, *added), 2)
        mask = None if mask is None else pad(mask, (0, len(added)))
    return Projected(q, k, mask, None if key_padding_mask is None else is_padding(key_padding_mask), len(added))


def is_padding(mask: Tensor) -> Tensor:
    """A `key_padding_mask`, bool or added, as bool (batch, keys): True is padded."""
    padded = mask.detach() if mask.dtype is torch.bool else blocked(mask.detach())
    return padded if padded.dim() == 2 else padded.unsqueeze(0)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(length, batch, width) -> (batch, heads, length, width of a head)."""
    by_head: Tensor = x.unflatten(-1, (heads, x.size(-1) // heads))
    return by_head.permute(1, 2, 0, 3)


def _joined(mask: Tensor | None, padding: Tensor | None, heads: int) -> Tensor | None:
    """Both masks as one that is added: (queries, keys) or (batch · heads, queries, keys), and (batch, keys)."""
    if mask is not None:
        mask = _added(mask)
        mask = mask.unflatten(0, (mask.size(0) // heads, heads)) if mask.dim() == 3 else mask
    if padding is None:
        return mask
    padding = _added(padding)[:, None, None]
    return padding if mask is None else mask + padding


def _added(mask: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.detach()
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -torch.inf)

"""Fused attention operators, as `flash_attn`, `xformers` and PyTorch itself register them.

Their Python functions call an operator of the dispatcher, which a function mode sees whichever way the function was
imported. Arguments are taken by the names of the operator's schema.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchprobe.capture.attention.layout import plain
from torchprobe.capture.compat import OpOverload, OpOverloadPacket
from torchprobe.statistics.attention import QueryKey

OPERATORS = frozenset(
    {
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
        "xformers_flash::flash_fwd",
        "xformers_flash3::flash_fwd",
        "mslk_flash::flash_fwd",
        "mslk_flash3::flash_fwd",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
    }
)

_FROM_TOP_LEFT = 1  # `custom_mask_type` of `aten::_efficient_attention_forward`; 2 is from the bottom right

_NAMES = {
    "query": ("query", "q"),
    "key": ("key", "k"),
    "scale": ("softmax_scale", "scale"),
    "causal": ("is_causal", "causal", "custom_mask_type"),
    "left": ("window_size_left", "window_left"),
    "right": ("window_size_right", "window_right"),
    "query_starts": ("cu_seqlens_q", "cum_seq_q"),
    "key_starts": ("cu_seqlens_k", "cum_seq_k"),
}

_UNREAD = {
    *("k_new", "v_new", "qv", "cu_seqlens_k_new", "seqused_q", "seqused_k", "seqlen_k", "page_table", "block_table"),
    *("block_tables", "kv_batch_idx", "leftpad_k", "rotary_cos", "attention_chunk", "s_aux", "learnable_sink"),
}


def arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments by name of a call of one of the operators; None for any other function."""
    if not isinstance(func, OpOverload | OpOverloadPacket):
        return None
    overload = func if isinstance(func, OpOverload) else getattr(func, "default", None)
    if overload is None or overload._schema.name not in OPERATORS:
        return None
    names = [argument.name for argument in overload._schema.arguments]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def unread(call: Mapping[str, Any]) -> str | None:
    """Why the statistics of a call cannot be had, or None: an argument that changes the keys or the logits."""
    used = sorted(name for name in _UNREAD if isinstance(call.get(name), Tensor) or call.get(name))
    return f"fused kernels with {', '.join(used)}" if used else None


def tensors(call: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Query, key and bias of a call."""
    return _argument(call, "query"), _argument(call, "key"), call.get("bias")


def query_key(call: Mapping[str, Any]) -> QueryKey:
    """Queries and keys of a call. Packed sequences become one sequence in which each sees only itself."""
    query, key, bias = tensors(call)
    query, key, scale = _heads_first(plain(query)), _heads_first(plain(key)), _argument(call, "scale")
    return QueryKey(
        query,
        key,
        1 / math.sqrt(query.size(-1)) if scale is None else float(scale),
        None if bias is None else plain(bias),
        softcap=call.get("softcap") or None,
        modify=_band(call, key.size(2) - query.size(2)),
    )


@dataclass(frozen=True)
class Segments:
    """Packed sequences: where each starts among all tokens, and where the last ends; (sequences + 1,) int64."""

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Band:
    """Which keys a query sees, and ALiBi's bias.

    A query at position p, counted with `offset` (keys - queries where the mask is aligned at the bottom right, which
    packed sequences compute each for itself; 0 where it is aligned at the top left), sees keys p - left … p + right;
    negative is unlimited. slopes: (heads,) or (batch, heads), the bias is -slope · abs(p - key).
    """

    left: int
    right: int
    offset: int
    slopes: Tensor | None
    segments: Segments | None
    bottom_right: bool

    def __call__(self, logits: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Applies it to logits."""
        position, hidden = query + self.offset, torch.zeros((), dtype=torch.bool, device=logits.device)
        if self.segments is not None:
            position, key, hidden = self._within(self.segments, query, key)
        if self.slopes is not None:
            slope = self.slopes[head] if self.slopes.dim() == 1 else self.slopes[batch, head]
            logits = logits - slope * (position - key).abs()
        if self.left >= 0:
            hidden = hidden | (key < position - self.left)
        if self.right >= 0:
            hidden = hidden | (key > position + self.right)
        return logits.masked_fill(hidden, -math.inf)

    def _within(self, segments: Segments, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of queries and keys in their own sequences; and which do not belong to the same."""
        of_query = torch.bucketize(query, segments.queries[1:], right=True)
        of_key = torch.bucketize(key, segments.keys[1:], right=True)
        last = segments.queries.numel() - 2
        lengths = segments.keys.diff() - segments.queries.diff()
        offset = lengths[of_query.clamp(max=last)] if self.bottom_right else 0
        hidden = (of_query != of_key) | (of_query > last)
        return query - segments.queries[of_query] + offset, key - segments.keys[of_key], hidden


def _band(call: Mapping[str, Any], longer: int) -> Band | None:
    causal = _argument(call, "causal") or 0
    left, right = _window(call)
    starts, key_starts = _argument(call, "query_starts"), _argument(call, "key_starts")
    segments = None if starts is None else Segments(plain(starts).long(), plain(key_starts).long())
    slopes = call.get("alibi_slopes")
    bottom_right = not ("custom_mask_type" in call and causal == _FROM_TOP_LEFT)
    if not causal and left < 0 and right < 0 and slopes is None and segments is None:
        return None
    slopes = None if slopes is None else plain(slopes)
    return Band(left, 0 if causal else right, longer if bottom_right else 0, slopes, segments, bottom_right)


def _window(call: Mapping[str, Any]) -> tuple[int, int]:
    size = call.get("window_size")  # of `aten::_efficient_attention_forward`: how many keys, the query's own included
    if size:
        return int(size) - 1, -1
    left, right = _argument(call, "left"), _argument(call, "right")
    return -1 if left is None else int(left), -1 if right is None else int(right)


def _argument(call: Mapping[str, Any], meaning: str) -> Any:
    return next((call[name] for name in _NAMES[meaning] if name in call), None)


def _heads_first(x: Tensor) -> Tensor:
    """(batch, length, heads, width), or packed (length, heads, width), as (batch, heads, length, width)."""
    return (x if x.dim() == 4 else x.unsqueeze(0)).transpose(1, 2)

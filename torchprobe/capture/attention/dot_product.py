"""Calls that name their queries and keys: `F.scaled_dot_product_attention`, fused operators, `flex_attention`.

`flash_attn`, `xformers` and PyTorch itself register fused operators with the dispatcher. A function mode sees them
whichever way a Python function around them was imported; arguments are taken by the names of an operator's schema. The
operator of `flex_attention` holds what the user wrote; here it is met outside of `torch.compile`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from torchprobe.capture.attention import stack
from torchprobe.capture.attention.layout import by_head, by_name, mask_by_head, plain
from torchprobe.capture.attention.places import Places, by_custom, of_dot_product
from torchprobe.statistics.attention import QueryKey

FUNCTIONS: tuple[Callable[..., Any], ...] = (
    scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

Tensors: TypeAlias = "tuple[Tensor, Tensor, Tensor | None]"

OPERATORS = frozenset(
    {
        *("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"),
        *("flash_attn_3::_flash_attn_forward", "xformers_flash::flash_fwd", "xformers_flash3::flash_fwd"),
        *("mslk_flash::flash_fwd", "mslk_flash3::flash_fwd"),
        *("aten::_flash_attention_forward", "aten::_efficient_attention_forward"),
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

_OF_FLEX = (
    *("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options"),
    *("score_mod_other_buffers", "mask_mod_other_buffers"),
)


def query_key(call: Mapping[str, Any], heads: int | None) -> QueryKey:
    """Queries and keys of a call that has succeeded, without its dropout.

    heads: how many the module has, which decides what the first dimension of 3-D inputs is (see `layout.by_head`);
    of more dimensions the third from the right are the heads.
    """
    query, key = _broadcast(plain(call["query"]), plain(call["key"]))
    heads = heads if query.dim() == 3 else None
    mask, causal, modify = call.get("attn_mask"), bool(call.get("is_causal")), None
    if mask is not None and (offset := _causal_offset(mask)) is not None:
        causal, modify, mask = offset == 0, Band(right=0, offset=offset) if offset else None, None
    elif mask is not None:
        mask = mask_by_head(plain(mask), query.shape[:-2], heads)
    scale = 1 / math.sqrt(query.size(-1)) if call.get("scale") is None else float(call["scale"])
    return QueryKey(by_head(query, heads), by_head(key, heads), scale, mask, causal, modify=modify)


def _causal_offset(mask: Tensor) -> int | None:
    """How far a `CausalBias` is from the top-left alignment; None for any other mask."""
    bias = sys.modules.get("torch.nn.attention.bias")  # importing it takes as long as importing torch
    if bias is None or not isinstance(mask, bias.CausalBias):
        return None
    return 0 if mask.variant == bias.CausalVariant.UPPER_LEFT else mask.seq_len_kv - mask.seq_len_q


def _broadcast(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The batch dimensions of both made equal, and the query's heads where only the key has several."""
    if query.shape[:-2] == key.shape[:-2]:
        return query, key
    shared = min(query.dim(), key.dim()) > 3
    kept = 3 if shared else 2
    batch = torch.broadcast_shapes(query.shape[:-kept], key.shape[:-kept])
    if shared and query.size(-3) == 1:
        query = query.expand(*query.shape[:-3], key.size(-3), -1, -1)
    return query.expand(*batch, *query.shape[-kept:]), key.expand(*batch, *key.shape[-kept:])


# ---- operators


class KernelCall(NamedTuple):
    """A call of such an operator: its arguments by name.

    unread: why its statistics cannot be had, or None: an argument that changes the keys or the logits.
    """

    arguments: Mapping[str, Any]
    is_flex: bool
    unread: str | None

    @property
    def tensors(self) -> Tensors:
        """Query, key and bias."""
        return _argument(self.arguments, "query"), _argument(self.arguments, "key"), self.arguments.get("bias")

    def query_key(self) -> QueryKey:
        """Its queries and keys."""
        return _flex(self.arguments) if self.is_flex else _fused(self.arguments, *self.tensors)


def call_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> KernelCall | None:
    """A call of one of the operators; None for any other function."""
    if stack.is_higher_order(func, "flex_attention"):
        unread = None if stack.can_index_by_scalars() else "flex_attention in this version of torch"
        return KernelCall(by_name(_OF_FLEX, args, kwargs), True, unread)
    schema = stack.schema(func)
    if schema is None or schema.name not in OPERATORS:
        return None
    call = by_name((argument.name for argument in schema.arguments), args, kwargs)
    used = sorted(name for name in _UNREAD if isinstance(call.get(name), Tensor) or call.get(name))
    return KernelCall(call, False, f"fused kernels with {', '.join(used)}" if used else None)


# ---- fused kernels


def _fused(call: Mapping[str, Any], query: Tensor, key: Tensor, bias: Tensor | None) -> QueryKey:
    """Packed sequences become one sequence in which each sees only itself."""
    query, key, scale = _heads_first(plain(query)), _heads_first(plain(key)), _argument(call, "scale")
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else float(scale)
    mask, band = None if bias is None else plain(bias), _band(call, key.size(2) - query.size(2))
    return QueryKey(query, key, scale, mask, softcap=call.get("softcap") or None, modify=band)


@dataclass(frozen=True)
class Band:
    """Which keys a query sees, and ALiBi's bias.

    A query at position p, counted with `offset` (keys - queries where the mask is aligned at the bottom right, which
    packed sequences compute each for itself; 0 where it is aligned at the top left), sees keys p - left … p + right;
    negative is unlimited. slopes: (heads,) or (batch, heads), the bias is -slope · abs(p - key). segments: of packed
    sequences, where each starts among all queries, and among all keys, and where the last ends; (sequences + 1,) int64.
    """

    left: int = -1
    right: int = -1
    offset: int = 0
    slopes: Tensor | None = None
    segments: tuple[Tensor, Tensor] | None = None
    bottom_right: bool = True

    def __call__(self, logits: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Applies it to logits."""
        position, hidden = query + self.offset, torch.zeros((), dtype=torch.bool, device=logits.device)
        if self.segments is not None:
            position, key, hidden = self._within(*self.segments, query, key)
        if self.slopes is not None:
            slope = self.slopes[head] if self.slopes.dim() == 1 else self.slopes[batch, head]
            logits = logits - slope * (position - key).abs()
        if self.left >= 0:
            hidden = hidden | (key < position - self.left)
        if self.right >= 0:
            hidden = hidden | (key > position + self.right)
        return logits.masked_fill(hidden, -math.inf)

    def _within(self, queries: Tensor, keys: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of queries and keys in their own sequences; and which do not belong to the same."""
        of_query = torch.bucketize(query, queries[1:], right=True)
        of_key = torch.bucketize(key, keys[1:], right=True)
        last = queries.numel() - 2
        lengths = keys.diff() - queries.diff()
        offset = lengths[of_query.clamp(max=last)] if self.bottom_right else 0
        hidden = (of_query != of_key) | (of_query > last)
        return query - queries[of_query] + offset, key - keys[of_key], hidden


def _band(call: Mapping[str, Any], longer: int) -> Band | None:
    causal = _argument(call, "causal") or 0
    left, right = _window(call)
    starts, key_starts = _argument(call, "query_starts"), _argument(call, "key_starts")
    segments = None if starts is None else (plain(starts).long(), plain(key_starts).long())
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


# ---- flex_attention


def _flex(call: Mapping[str, Any]) -> QueryKey:
    """With its score_mod and mask_mod."""
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
        with stack.indexing_by_scalars():
            scores = _everywhere(self.score_mod, [logits, *full], dims)
            return scores.masked_fill(~_everywhere(self.mask_mod, full, dims), -math.inf)


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


# ---- inside of compiled graphs

Stands: TypeAlias = "dict[tuple[int, int, int], set[Any]]"
"""Where queries stand, by the number of a call's line, of queries and of keys."""


def note_places(graph: Any, node: Any, stands: Stands) -> None:
    """What the queries and keys of a dot product in a graph say of where they stand."""
    query, key = (graph.values.get(one) for one in node.args[1:3])
    added, place = node.args[-2:]
    if added or graph.has_symbols or not (isinstance(query, Tensor) and isinstance(key, Tensor)):
        return
    of_query, of_key = (graph.handwritten.labels.of(graph.handwritten.tape.node(one)) for one in (query, key))
    found = of_dot_product(of_query, of_key, query.size(-2), key.size(-2))
    index = tuple(found.index.tolist()) if isinstance(found.index, np.ndarray) else None  # numpy's, no tensor
    what = found.cross, found.unknown or isinstance(found.index, Tensor), found.open, index, found.alone
    stands.setdefault((place, query.size(-2), key.size(-2)), set()).add(what)


def placed(call: tuple[int, int, int], added: int, stands: Stands) -> Places:
    """What graphs say, where they say one thing; else, that as many queries as keys are the same tokens."""
    where, found = by_custom(call[1], call[2] - added), stands.get(call, set())
    cross = {one[0] for one in found}
    if len(found) != 1:
        return replace(where, cross=cross.pop() if len(cross) == 1 else where.cross, unknown=where.cross and not added)
    ((_, unknown, behind, index, _),) = found
    index = None if index is None else np.array(index)
    return replace(where, cross=cross.pop(), unknown=unknown, open=behind, index=index)

"""`F.scaled_dot_product_attention`: from its arguments to what the statistics take."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from torchprobe.capture.attention.layout import by_head, mask_by_head, plain
from torchprobe.statistics.attention import QueryKey

FUNCTIONS: tuple[Callable[..., Any], ...] = (
    scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return dict(zip(_PARAMETERS, args, strict=False)) | dict(kwargs)


def query_key(call: Mapping[str, Any], heads: int | None) -> QueryKey:
    """Queries and keys of a call that has succeeded, without its dropout.

    heads: how many the module has, which decides what the first dimension of 3-D inputs is (see `layout.by_head`);
    of more dimensions the third from the right are the heads.
    """
    query, key = _broadcast(plain(call["query"]), plain(call["key"]))
    heads = heads if query.dim() == 3 else None
    mask, causal, modify = call.get("attn_mask"), bool(call.get("is_causal")), None
    if mask is not None and (offset := _causal_offset(mask)) is not None:
        causal, modify, mask = offset == 0, LowerRight(offset) if offset else None, None
    elif mask is not None:
        mask = mask_by_head(plain(mask), query.shape[:-2], heads)
    scale = 1 / math.sqrt(query.size(-1)) if call.get("scale") is None else float(call["scale"])
    return QueryKey(by_head(query, heads), by_head(key, heads), scale, mask, causal, modify=modify)


@dataclass(frozen=True)
class LowerRight:
    """A causal mask aligned at the last query and the last key; offset: keys - queries."""

    offset: int

    def __call__(self, logits: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Hides the keys that come after the query."""
        return logits.masked_fill(key > query + self.offset, -math.inf)


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

"""What the tensors of an attention call mean: their dimensions, padded queries, where they come from, given logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchprobe.statistics.attention import Logits, QueryKey, Source
from torchprobe.statistics.attention.keys import NEVER_A_LOGIT

_MASKED = NEVER_A_LOGIT
_PROBES = 16  # rows and columns that stand for all
_DEPTH = 18  # autograd nodes from a query back to its layer's input: projection, norm, rotation, repetition
_PROJECTIONS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Linear", "MkldnnLinear", "Convolution")


def plain(tensor: Tensor) -> Tensor:
    """The same storage without a graph and without a subclass of the user's."""
    return tensor.detach().as_subclass(Tensor)


def unusual(*tensors: Tensor | None) -> str | None:
    """Why statistics of these tensors cannot be computed, or None."""
    return next((reason for tensor in tensors if tensor is not None and (reason := _unusual(tensor))), None)


def _unusual(tensor: Tensor) -> str | None:
    if tensor.is_nested:
        return "nested tensors"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"tensors of type {type(tensor).__name__}"
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return "sparse or meta tensors"
    if not tensor.dtype.is_floating_point and tensor.dtype is not torch.bool:
        return f"tensors of {tensor.dtype}"
    return None


def by_head(tensor: Tensor, heads: int | None) -> Tensor:
    """A tensor (…, rows, columns) as (batch, heads, rows, columns).

    heads: how many the module has, where it says so. It decides what a 3-D tensor's first dimension is: batch times
    heads where divisible, as fairseq and `nn.MultiheadAttention` fold them, otherwise the batch of a single head.
    Of five and more dimensions the heads are the third from the right, or all between the batch and the rows where
    their product is the number of heads, as in grouped attention.
    """
    if tensor.dim() < 4:
        tensor = tensor[(None,) * (3 - tensor.dim())]
        return tensor.unsqueeze(1) if not heads or tensor.size(0) % heads else tensor.unflatten(0, (-1, heads))
    if tensor.dim() == 4:
        return tensor
    grouped = heads is not None and tensor.size(-3) != heads and math.prod(tensor.shape[1:-2]) == heads
    return tensor.flatten(1, -3) if grouped else tensor.flatten(0, -4)


def mask_by_head(mask: Tensor, leading: torch.Size, heads: int | None) -> Tensor:
    """A mask (…, queries, keys) of logits (*leading, queries, keys), for those logits as `by_head` shapes them."""
    if mask.dim() == 3 and len(leading) == 1 and mask.size(0) > 1:
        return by_head(mask, heads)
    if mask.dim() > 3 and len(leading) > 2:
        return mask.expand(*leading[:-1], -1, -1, -1).flatten(0, -4)
    return mask


# ---- padding


def blocked(mask: Tensor) -> Tensor:
    """True where a mask (bool: True takes part; float: added), or a masked logit, hides a key."""
    return ~mask if mask.dtype is torch.bool else mask <= _MASKED


def padded_queries(mask: Tensor, batch: int, length: int) -> Tensor:
    """Padded positions: bool (batch, length). mask: broadcastable to (batch, heads, length, length).

    A padded position is a key that no query sees, and as a query it does not see itself; or it sees everything,
    as libraries let a padded query do whose whole row would be masked. Such rows do not count as seeing. Told from
    the diagonal and 16 rows and columns of the first head, so a mask is not read as a whole. A mask that hides a key
    from everybody for another reason looks the same.
    """
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    mask = mask[:, 0].expand(batch, length, length)
    probes = torch.linspace(0, length - 1, min(length, _PROBES), device=mask.device).long()
    sees_all = ~blocked(mask[:, :, probes]).any(-1)
    seen = ~blocked(mask[:, probes]) & ~sees_all[:, probes, None]
    seen_by_last = ~blocked(mask[:, -1])
    unseen = ~(seen.any(1) | seen_by_last)
    return unseen & (blocked(mask.diagonal(dim1=-2, dim2=-1)) | sees_all)


# ---- self-attention or cross-attention


def same_source(query: Tensor, key: Tensor) -> bool | None:
    """Whether the autograd graphs of both meet a few nodes back; None where there is no graph to tell.

    A decoder's queries descend from the encoder's output too, through the layer before, but not that closely.
    """
    if query.grad_fn is None or key.grad_fn is None:
        return None
    unknown = False
    for of_query, of_key in zip(_ancestors(query.grad_fn), _ancestors(key.grad_fn), strict=True):
        if not of_query.nodes.isdisjoint(of_key.nodes):
            return True
        unknown = of_query.unknown and of_key.unknown
    return None if unknown else False


@dataclass(slots=True)
class _Ancestors:
    """Nodes of an autograd graph; unknown: something without a graph was projected on the way."""

    nodes: set[Any]
    unknown: bool = False


def _ancestors(node: Any) -> Iterator[_Ancestors]:
    """A node with those before it: one step further back each time."""
    found, frontier = _Ancestors({node}), {node}
    yield found
    for _ in range(_DEPTH):
        further = set()
        for after in frontier:
            for behind, _ in after.next_functions:
                before = _beyond_slices(behind)
                if before is None:
                    found.unknown |= after.name().startswith(_PROJECTIONS)
                elif not hasattr(before, "variable"):  # a parameter is shared by everything
                    further.add(before)
        frontier = further - found.nodes
        found.nodes |= frontier
        yield found


def _beyond_slices(node: Any) -> Any:
    """Slices do not count: in torch 2.6, half of the last dimension is one slice for each dimension."""
    while node is not None and node.name().startswith("Slice"):
        node = node.next_functions[0][0]
    return node


def is_cross(query: Tensor, key: Tensor, queries: int, keys: int) -> bool:
    """Cross-attention: as many queries as keys does not hold, or their source differs. Unknown counts as self."""
    return queries != keys or same_source(query, key) is False


# ---- logits that are given


@dataclass(frozen=True)
class Given:
    """Looks logits up instead of computing them, so that only the rows that are read are changed.

    logits: (batch, heads, queries, keys); shift: (batch, heads, queries, 1), to be put on again.
    """

    logits: Tensor
    shift: Tensor | None

    def __call__(self, logits: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The logits of these indices."""
        found = self.logits[batch, head, query, key].to(logits.dtype)
        found = found.masked_fill(found <= NEVER_A_LOGIT, -math.inf)
        if self.shift is None:
            return found
        return found + self.shift[batch, head, query, 0].to(logits.dtype)


def source_of(logits: Tensor, padding: Tensor | None, shift: Tensor | None, sinks: Tensor | None) -> Source:
    """logits: (batch, heads, queries, keys), shift: (batch, heads, queries, 1), sinks: (batch, heads, queries, 1), the
    same of each head everywhere once the shift is put on again."""
    if shift is None and sinks is None:
        return Logits(logits, padding)
    batch, heads, queries, keys = logits.shape
    nothing = logits.new_zeros(1, 1, 1, 1)
    given = Given(logits, shift)
    if sinks is not None:
        sinks = sinks[0, :, 0, 0] if shift is None else (sinks + shift)[0, :, 0, 0]
    return QueryKey(
        nothing.expand(batch, heads, queries, 1),
        nothing.expand(batch, heads, keys, 1),
        scale=1.0,
        padding=padding,
        modify=given,
        sinks=sinks,
    )

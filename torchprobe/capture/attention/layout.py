"""What the tensors of an attention call mean where the data flow does not tell: their dimensions by custom."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchprobe.statistics import dtypes
from torchprobe.statistics.attention.keys import NEVER_A_LOGIT


def by_name(parameters: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments."""
    return dict(zip(parameters, args, strict=False)) | dict(kwargs)


def plain(tensor: Tensor) -> Tensor:
    """The same storage without a graph and without a subclass of the user's."""
    return tensor.detach().as_subclass(Tensor)


def unusual(*tensors: Tensor | None) -> str | None:
    """Why statistics of these tensors cannot be computed, or None."""
    return next((reason for tensor in tensors if tensor is not None and (reason := _unusual(tensor))), None)


def _unusual(tensor: Tensor) -> str | None:
    if tensor.is_nested:
        return "nested tensors"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and type(tensor) not in dtypes.PLAIN:
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


def blocked(mask: Tensor) -> Tensor:
    """True where a mask (bool: True takes part; float: added), or a masked logit, hides a key."""
    return ~mask if mask.dtype is torch.bool else mask <= NEVER_A_LOGIT

"""Which keys a query row sees: how many, which is the first, and what hides the others from the softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchprobe.statistics.attention.parts import Part
from torchprobe.statistics.attention.rows import Rows
from torchprobe.statistics.attention.sources import QueryKey

HIDDEN = -1e30
"""Added to the logit of a key that is not visible: finite, so that no inf - inf makes a NaN of it."""

NEVER_A_LOGIT = -5e8
"""At or below this a logit hides its key: half of the customary -1e9, which a logit is added to."""


@dataclass(frozen=True)
class Visibility:
    """count: visible keys; first: index of the first one, None where it is 0. Broadcastable to (sequences, heads,
    rows), floating."""

    count: Tensor
    first: Tensor | None


def threshold(dtype: torch.dtype) -> float:
    """The number at or below which a logit or a mask of this type hides its key.

    Half of the type's lowest number, for that is what libraries mask with, and adding a logit to it moves it; but
    no less than -5e8. That is -32752 in float16 and -5e8 in the other types. A fully masked row of
    `torch.finfo(dtype).min`, whose softmax is uniform, is recognised by it.
    """
    return max(torch.finfo(dtype).min / 2, NEVER_A_LOGIT)


def offsets(rows: Rows, part: Part, keys: int, source_dtype: torch.dtype, device: torch.device) -> Tensor:
    """key index - query index: (sequences or 1, 1, rows, keys)."""
    position = rows.positions(part, device).to(source_dtype)
    return torch.arange(keys, dtype=source_dtype, device=device) - position[:, None, :, None]


def hiding(source: QueryKey, rows: Rows, part: Part, offset: Tensor) -> Tensor | None:
    """What to add to the logits, about -1e30 for keys that are not visible: broadcastable to them; None for nothing."""
    bias = None if source.mask is None else _of_mask(source.mask, rows, part, offset)
    if not source.causal:
        return bias
    future = offset.clamp(min=0).mul_(HIDDEN)
    return future if bias is None else bias + future


def without_mask(source: QueryKey, rows: Rows, part: Part) -> Visibility:
    """Where `causal` alone decides."""
    keys = source.shape.keys
    position = rows.positions(part, source.device).to(source.dtype)[:, None]
    count = (position + 1).clamp(max=keys) if source.causal else torch.full_like(position, keys)
    return Visibility(count, None)


def of_values(values: Tensor, hidden: float) -> Visibility:
    """From logits, or from what is added to them: (…, keys), visible above `hidden`.

    Written in floating arithmetic, exact up to 2²⁴ keys: comparing and counting booleans costs three times as much.
    """
    keys = values.size(-1)
    seen = (values - hidden).clamp_(0, 1)
    count = seen.sum(-1)
    from_the_end = torch.arange(keys, 0, -1, dtype=values.dtype, device=values.device)
    return Visibility(count, keys - seen.mul_(from_the_end).amax(-1))


def _of_mask(mask: Tensor, rows: Rows, part: Part, offset: Tensor) -> Tensor:
    """The rows of a mask as a finite bias."""
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.size(-1) != 1:
        mask = mask[..., : offset.size(-1)]
    bias = rows.take(mask, part).to(offset.dtype)
    bias = (bias - 1) * -HIDDEN if mask.dtype == torch.bool else bias.clamp(min=HIDDEN)
    return bias.expand(*bias.shape[:-1], offset.size(-1))

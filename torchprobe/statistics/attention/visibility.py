"""Which keys a query row sees: how many, which is the first, how far they are, and what hides the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchprobe.statistics.attention.parts import Part
from torchprobe.statistics.attention.rows import Rows
from torchprobe.statistics.attention.sources import QueryKey, Source

HIDDEN = -1e30
"""Added to the logit of a key that is not visible: finite, so that no inf - inf makes a NaN of it."""

NEVER_A_LOGIT = -5e8
"""At or below this a logit hides its key: half of the customary -1e9, which a logit is added to."""


@dataclass(frozen=True)
class Visible:
    """count: visible keys; first: index of the first one, None where it is 0 and anything where there is none.
    Floating, broadcastable to (sequences, heads, rows)."""

    count: Tensor
    first: Tensor | None

    def narrowed(self, rows: slice) -> Visible:
        """The same for fewer rows."""
        return Visible(_narrowed(self.count, rows), None if self.first is None else _narrowed(self.first, rows))


@dataclass(frozen=True)
class Sight:
    """What some rows see. distance: abs(query index - key index), (sequences or 1, 1, rows, keys). bias: what
    hides keys when added to the logits; None for nothing. visible: None where the logits have to tell."""

    rows: slice
    distance: Tensor
    bias: Tensor | None
    visible: Visible | None

    def narrowed(self, rows: slice, keys: int) -> Sight:
        """The same for fewer rows and for the first keys."""
        if rows == self.rows and keys == self.distance.size(-1):
            return self
        piece = slice(rows.start - self.rows.start, rows.stop - self.rows.start)
        bias = None if self.bias is None else _narrowed(self.bias, piece)[..., :keys]
        visible = None if self.visible is None else self.visible.narrowed(piece)
        return Sight(rows, self.distance[:, :, piece, :keys], bias, visible)


def threshold(dtype: torch.dtype) -> float:
    """The number at or below which a logit or a mask of this type hides its key.

    Half of the type's lowest number, for that is what libraries mask with, and adding a logit to it moves it; but
    no less than -5e8. That is -32752 in float16 and -5e8 in the other types. A fully masked row of
    `torch.finfo(dtype).min`, whose softmax is uniform, is recognised by it.
    """
    return max(torch.finfo(dtype).min / 2, NEVER_A_LOGIT)


def from_afar(source: Source, rows: Rows, part: Part) -> Sight:
    """Distances alone, of all keys."""
    return Sight(part.rows, _offset(source, rows, part).abs_(), None, None)


def see(source: QueryKey, rows: Rows, part: Part) -> Sight:
    """What the rows of a part see, as far as it can be told without the logits; one head where all are alike."""
    offset = _offset(source, rows, part)
    bias = None if source.mask is None else _bias(source.mask, rows, part, offset)
    visible = None
    if source.causal:
        future = offset.clamp(min=0).mul_(HIDDEN)
        bias = future if bias is None else bias + future
    if source.modify is None:
        visible = _behind(source, rows, part) if source.mask is None or bias is None else of_values(bias)
    return Sight(part.rows, offset.abs_(), bias, visible)


def of_values(values: Tensor, hidden: float = NEVER_A_LOGIT) -> Visible:
    """From logits, or from what is added to them: (…, keys), visible above `hidden`.

    Written in floating arithmetic, exact up to 2²⁴ keys: comparing and counting booleans costs three times as much.
    """
    keys = values.size(-1)
    seen = (values - hidden).clamp_(0, 1)
    count = seen.sum(-1)
    from_the_end = torch.arange(keys, 0, -1, dtype=values.dtype, device=values.device)
    return Visible(count, keys - seen.mul_(from_the_end).amax(-1))


def _offset(source: Source, rows: Rows, part: Part) -> Tensor:
    """key index - query index: (sequences or 1, 1, rows, keys)."""
    position = rows.positions(part, source.device).to(source.dtype)
    return torch.arange(source.shape.keys, dtype=source.dtype, device=source.device) - position[:, None, :, None]


def _bias(mask: Tensor, rows: Rows, part: Part, offset: Tensor) -> Tensor:
    """The rows of a mask as something finite to add, HIDDEN for keys that are not visible."""
    mask = mask[(None,) * (4 - mask.dim())]
    bias = rows.take(mask, part).to(offset.dtype)
    if mask.dtype == torch.bool:
        bias = (bias - 1) * -HIDDEN
    elif threshold(mask.dtype) > NEVER_A_LOGIT:
        bias = bias.masked_fill(bias <= threshold(mask.dtype), HIDDEN)
    else:
        bias = bias.clamp(min=HIDDEN)
    return bias.expand(*bias.shape[:-1], offset.size(-1))


def _behind(source: QueryKey, rows: Rows, part: Part) -> Visible:
    """Without a mask: the keys up to the query's own index, or all."""
    keys = source.shape.keys
    position = rows.positions(part, source.device).to(source.dtype)[:, None]
    return Visible((position + 1).clamp(max=keys) if source.causal else torch.full_like(position, keys), None)


def _narrowed(x: Tensor, rows: slice) -> Tensor:
    """Some rows, the third dimension; a single one is for all and stays."""
    return x if x.size(2) == 1 else x[:, :, rows]

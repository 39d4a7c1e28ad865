"""The slow twin of the attention statistics: the whole matrix, in float64, one plain step after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from torchprobe.statistics.attention import FIELDS, Logits, QueryKey, Source

HIDDEN_BELOW = -5000.0


def logits(source: Source) -> Tensor:
    """(batch, heads, queries, keys) in float64, with -inf where a key is not visible."""
    if isinstance(source, Logits):
        s = source.logits.double() + (0 if source.shift is None else source.shift.double())
        return s.masked_fill(s <= HIDDEN_BELOW, -torch.inf)
    return _masked(source, _modified(source, _product(source)))


def probabilities(source: Source) -> Tensor:
    """(batch, heads, queries, keys) as eager attention returns them: a sink's column is dropped after the softmax."""
    s, sinks = logits(source), source.sinks
    if isinstance(source, Logits) and source.as_weights:
        return s.exp()
    if sinks is None:
        return s.softmax(-1)
    if isinstance(source, Logits):
        column = sinks.double() + (0 if source.shift is None else source.shift.double())
    else:
        column = sinks.double()[None, :, None, None].expand(*s.shape[:3], 1)
    return torch.cat((s, column), -1).softmax(-1)[..., :-1]


def rows(source: Source) -> dict[str, Tensor]:
    """Every statistic of every query row, (batch, heads, queries), and which rows are `valid` and have a `choice`."""
    s, p = logits(source), probabilities(source)
    count = (s > -torch.inf).sum(-1)
    valid = (count > 0) & ~s.isnan().any(-1) & ~(s == torch.inf).any(-1)
    if source.padding is not None:
        valid &= ~source.padding[:, None]
    first = (s > -torch.inf).int().argmax(-1, keepdim=True)
    query = (torch.arange(s.size(2)) if source.places is None else source.places)[:, None]
    key = torch.arange(s.size(3))
    entropy = torch.special.entr(p).sum(-1).clamp(min=0)
    return {
        "valid": valid,
        "choice": valid & (count > 1),
        "entropy": entropy,
        "normalized_entropy": (entropy / count.double().log()).clamp(max=1),
        "max_probability": p.amax(-1),
        "max_logit": s.amax(-1),
        "sink": p.gather(-1, first)[..., 0],
        "distance": (p * (query - key).abs()).sum(-1),
    }


def compute(source: Source) -> Tensor:
    """(heads, 8), as `attention.compute` over all rows."""
    of = rows(source)
    return torch.stack([torch.stack([_field(of, name, head) for name in FIELDS]) for head in range(source.shape.heads)])


def _field(of: dict[str, Tensor], name: str, head: int) -> Tensor:
    with_choice = name in ("normalized_entropy", "sink", "rows_with_choice")
    kept = of["choice" if with_choice else "valid"][:, head]
    if name in ("rows", "rows_with_choice"):
        return kept.sum().double()
    values = of[name][:, head][kept]
    if name == "max_logit":
        return values.max() if len(values) else values.sum()
    return values.sum()


def _product(source: QueryKey) -> Tensor:
    group = source.query.size(1) // source.key.size(1)
    key = source.key.double().repeat_interleave(group, dim=1)
    s = source.query.double() @ key.transpose(-1, -2) * source.scale
    return s if source.softcap is None else source.softcap * (s / source.softcap).tanh()


def _modified(source: QueryKey, s: Tensor) -> Tensor:
    if source.modify is None:
        return s
    shapes = ([-1 if i == d else 1 for i in range(4)] for d in range(4))
    batch, head, query, key = (torch.arange(n).view(shape) for n, shape in zip(s.shape, shapes, strict=True))
    return source.modify(s, batch, head, query, key)


def _masked(source: QueryKey, s: Tensor) -> Tensor:
    mask = source.mask
    if mask is not None and mask.dtype == torch.bool:
        s = s.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        s = (s + mask.double()).masked_fill(mask <= HIDDEN_BELOW, -torch.inf)
    if source.causal:
        s = s.masked_fill(torch.ones(s.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    return s

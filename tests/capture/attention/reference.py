"""Attention statistics the slow and obvious way: one query row after the other, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logits_of(query: Tensor, key: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """(batch, heads, queries, keys), with -inf for a key that is not visible; key heads are repeated."""
    query, key = query.detach().double(), key.detach().double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -math.inf)
    return logits + mask.double()


def causal(queries: int, keys: int, offset: int = 0) -> Tensor:
    return torch.arange(keys) <= torch.arange(queries)[:, None] + offset


def per_head(logits: Tensor, padded: Tensor | None = None) -> list[dict[str, float]]:
    """What `summarise` tells of each head."""
    heads = []
    for head in logits.detach().double().transpose(0, 1):
        rows = [_row(row, i) for b, rows in enumerate(head) for i, row in enumerate(rows) if _counts(row, padded, b, i)]
        choice = [row for row in rows if row["keys"] > 1]
        head = {name: _mean(row[name] for row in rows) for name in ("entropy", "max_probability", "distance")}
        head["max_logit"] = max(row["max_logit"] for row in rows)
        head["normalized_entropy"] = _mean(row["entropy"] / math.log(row["keys"]) for row in choice)
        head["sink"] = _mean(row["sink"] for row in choice)
        heads.append(head | {"rows": len(rows), "rows_with_choice": len(choice)})
    return heads


def _counts(row: Tensor, padded: Tensor | None, batch: int, query: int) -> bool:
    return bool(row.isfinite().any()) and not (padded is not None and padded[batch, query])


def _row(row: Tensor, query: int) -> dict[str, float]:
    visible = row.isfinite().nonzero()[:, 0]
    p = row[visible].softmax(0)
    return {
        "keys": len(visible),
        "entropy": -(p * p.log()).nan_to_num(0.0).sum().item(),
        "max_probability": p.max().item(),
        "max_logit": row[visible].max().item(),
        "sink": p[0].item(),
        "distance": (p * (visible - query).abs()).sum().item(),
    }


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        for name, value in want.items():
            if not math.isnan(value):
                assert abs(got[name] - value) <= tolerance * max(1, abs(value)), (name, got[name], value)
            else:
                assert name not in got


def of_weights(
    p: Tensor, rows: Tensor | None = None, seen: Tensor | None = None, position: Tensor | None = None
) -> list[dict[str, float]]:
    """What `summarise` tells of weights (batch, heads, queries, keys) as they are, but for logits.

    rows: which queries count, seen: which keys are visible, both broadcastable; position: of queries among keys.
    """
    p = p.detach().double()
    rows = torch.ones(p.shape[:3], dtype=torch.bool) if rows is None else rows.expand(p.shape[:3])
    seen = p > 0 if seen is None else seen.expand(p.shape)
    position = torch.arange(p.size(2)) if position is None else position
    count, first = seen.sum(-1), seen.double().argmax(-1, keepdim=True)
    entropy = torch.special.entr(p).sum(-1)
    rows, choice = rows & (count > 0), rows & (count > 1)
    values = {
        "entropy": (entropy, rows),
        "max_probability": (p.amax(-1), rows),
        "distance": ((p * (position[:, None] - torch.arange(p.size(3))).abs()).sum(-1), rows),
        "normalized_entropy": ((entropy / count.clamp(min=2).double().log()).clamp(max=1), choice),
        "sink": (p.gather(-1, first)[..., 0], choice),
    }
    return [{name: _mean(v[:, h][r[:, h]].tolist()) for name, (v, r) in values.items()} for h in range(p.size(1))]

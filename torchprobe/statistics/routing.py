"""How a router shares out tokens to experts: what each expert takes, and whether that follows from the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from torchprobe.statistics.dtypes import row_dtype

FIELDS = ("taken", "tokens", "dropped", "softmax_mass", "softmax_fits", "sigmoid_mass", "sigmoid_fits")
"""Columns of a row, one an expert: tokens that it takes, all tokens, those that no expert takes; and, by either reading
of the logits, the sum over tokens of its share of the routing distribution, and the number of tokens whose weights are
those of the distribution, up to a factor of each token. Rows merge by addition."""


def of_choices(logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Rows of top-k routing: shape (experts, 7), `row_dtype`, on the device of `logits`.

    logits: (tokens, experts). weights, chosen: (tokens, k), floating and integer; a number that is no expert's is a
    choice that is dropped. A token fits a reading when the weights of its choices are proportional to softmax or
    sigmoid of their logits, within 1e-3, or 2e-2 in half precision; a single choice must be the largest logit.
    """
    experts = logits.shape[-1]
    known = (chosen >= 0) & (chosen < experts)
    inside = torch.where(known, chosen, 0).long()
    taken = torch.zeros_like(logits, dtype=torch.int64).scatter_add_(-1, inside, known.long())
    log_weights = weights.to(_wide(logits)).log()
    readings = []
    for log_share in _log_shares(logits):
        ratio = log_weights - log_share.gather(-1, inside)
        spread = torch.where(known, ratio, -torch.inf).amax(-1) - torch.where(known, ratio, torch.inf).amin(-1)
        proportional = (spread < _tolerance(logits, weights)) & (ratio.isfinite() | ~known).all(-1)
        best = log_share.gather(-1, inside).squeeze(-1) == log_share.amax(-1) if chosen.shape[-1] == 1 else True
        readings.append((log_share, (proportional | ~known.any(-1)) & best))
    return _rows(taken, known.any(-1), readings)


def of_mask(logits: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """The same of routing to one expert with a capacity: mask (tokens, experts) is 1 where the token is taken.

    weights: (tokens, 1). A token fits a reading when its weight is the largest share, and it goes there or nowhere.
    """
    taken = mask != 0
    readings = []
    for log_share in _log_shares(logits):
        largest, best = log_share.max(-1, keepdim=True)
        elsewhere = taken.sum(-1) - taken.gather(-1, best).squeeze(-1).long()
        near = (weights.to(_wide(logits)).log() - largest).abs().squeeze(-1) < _tolerance(logits, weights)
        readings.append((log_share, near & (elsewhere == 0)))
    return _rows(taken.long(), taken.any(-1), readings)


def _log_shares(logits: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.to(_wide(logits))
    return wide.log_softmax(-1), torch.nn.functional.logsigmoid(wide)


def _rows(taken: Tensor, any_taken: Tensor, readings: list[tuple[Tensor, Tensor]]) -> Tensor:
    dtype, ones = row_dtype(taken.device), torch.ones_like(taken[0])
    columns = [taken.sum(0), ones * len(taken), ones * (~any_taken).sum()]
    for log_share, fits in readings:
        columns += [log_share.softmax(-1).to(dtype).sum(0), ones * fits.sum()]
    return torch.stack([column.to(dtype) for column in columns], dim=-1)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _tolerance(logits: Tensor, weights: Tensor) -> float:
    return 2e-2 if min(logits.dtype.itemsize, weights.dtype.itemsize) < 4 else 1e-3

"""Targets from the gradient at an output: at a row of logits, cross-entropy's is s (p - y).

So the one negative entry is the target, a row of zeros is an ignored one, and the entries beside the target are
proportional to p, which tells that the loss was a cross-entropy at all. Everything is decided on the device: of every
row whether it has a target, from `_A_GLANCE` of its classes, and from more classes of a few rows what share of all
rows is a cross-entropy's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.capture.predictions.forms import Form, are_distributions
from torchprobe.statistics.dtypes import row_dtype

IGNORED = -100
_FEW_CLASSES = 3  # so few that a row alone can be anything
_FEW_ROWS = 4
_A_GLANCE = 64  # of a row's classes
_ENOUGH_CLASSES, _ENOUGH_ROWS = 256, 32
_GOLDEN = 0.6180339887  # its multiples spread evenly between whole numbers
_MOST_SMOOTHING = 0.5
_SURE = 0.99
_EPSILON = 1e-7
_FAINT = 1e-4
_TOLERANCE = {torch.bfloat16: 0.06, torch.float16: 0.02}  # log-probabilities are rounded to the type before exp


class Recovered(NamedTuple):
    """targets: (n,) int64, IGNORED where the gradient is not that of a cross-entropy. evidence: see below."""

    targets: Tensor
    evidence: Tensor
    """(3,): rows with a gradient, those of them that are a cross-entropy's, and rows with none or hardly any whose
    prediction is so sure that it may have been lost in rounding."""


def recover(logits: Tensor, gradient: Tensor, form: Form, precision: torch.dtype) -> Recovered:
    """Targets of rows of logits, (n, classes) or (n, 1), and of their gradients, both float32 or wider.

    precision: the gradient's type before. The loss may be scaled, per row too; labels may be smoothed.
    """
    tolerance = _TOLERANCE.get(precision, 2e-3)
    tiny = torch.finfo(precision).smallest_normal * torch.finfo(precision).eps
    (least, lowest), most = gradient.min(-1), gradient.amax(-1)
    alive = least.isfinite() & most.isfinite() & ((least != 0) | (most != 0))
    rows = _Rows(logits, gradient, alive, least, lowest, most, gradient.sum(-1), tolerance, tiny)
    targets, passed, sure = _elements(rows) if form.kind == "sigmoid" else _classes(rows)
    passed &= alive
    size = torch.where(alive, torch.maximum(-least, most), 0.0)
    faint = ~passed & sure & (size <= _FAINT * size.amax())  # where p - y is lost in rounding
    checked = alive & ~faint
    evidence = torch.stack((checked.sum(), _number_of_cross_entropies(rows, form, checked, passed), faint.sum()))
    return Recovered(torch.where(passed, targets, IGNORED), evidence.to(row_dtype(logits.device)))


def _number_of_cross_entropies(rows: _Rows, form: Form, checked: Tensor, passed: Tensor) -> Tensor:
    """Of the `checked` rows: all that `passed`, or, of many, the share of a few that are looked at closely."""
    n, classes = rows.z.shape
    if form.kind == "sigmoid" or classes <= _FEW_CLASSES or n <= 2 * _ENOUGH_ROWS:
        return passed.sum()
    spread = (torch.arange(n, device=checked.device, dtype=torch.float32) * _GOLDEN).frac()
    some = (checked.to(spread.dtype) + spread).topk(_ENOUGH_ROWS).indices  # spread over those that are checked
    few = rows.at(some)
    p = few.z.softmax(-1)
    close = _judged(few, p, p.argmax(-1), _ENOUGH_CLASSES)[1] & checked[some]
    share = close.sum() / checked[some].sum().clamp(min=1)
    return (share * checked.sum()).round()


class _Rows(NamedTuple):
    z: Tensor
    g: Tensor
    alive: Tensor  # rows with a gradient
    least: Tensor  # of a row's gradient, and where it is
    lowest: Tensor
    most: Tensor
    total: Tensor
    tolerance: float
    tiny: float  # an entry smaller than this is rounded to 0

    def at(self, index: Tensor) -> _Rows:
        """Some of them."""
        return _Rows(*(part[index] if isinstance(part, Tensor) else part for part in self))  # type: ignore[arg-type]

    def cleared(self) -> _Rows:
        """With zeros where the gradient is not finite, for what adds up over rows."""
        return self._replace(g=torch.where(self.alive[:, None], self.g, 0.0))


def _classes(rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, whether a row is a cross-entropy's, whether its prediction is sure."""
    p = rows.z.softmax(-1)
    top, favourite = p.max(-1)
    close = len(p) <= 2 * _ENOUGH_ROWS
    target, passed = _judged(rows, p, favourite, _ENOUGH_CLASSES if close else _A_GLANCE)
    return target, passed, top > _SURE


def _judged(rows: _Rows, p: Tensor, favourite: Tensor, enough: int) -> tuple[Tensor, Tensor]:
    """Targets, and whether a row is a cross-entropy's, from `enough` of its classes."""
    target = rows.lowest
    if p.shape[-1] <= _FEW_CLASSES:
        target, passed = _of_few(rows.cleared(), p, target)
    else:
        passed = _proportional(rows, p, target, False, enough) | _proportional(rows, p, target, True, enough)
        # Where smoothing calls a prediction too sure, its own class is pushed down.
        other = ~passed & _proportional(rows, p, favourite, True, enough)
        target, passed = torch.where(other, favourite, target), passed | other
    alone = _of_log_probabilities(rows, enough)
    return torch.where(alone, rows.lowest, target), passed | alone


def _proportional(rows: _Rows, p: Tensor, target: Tensor, smoothed: bool, enough: int) -> Tensor:
    """Whether a row adds up to 0, and its entries beside the target are a p + b; b only where labels are smoothed.

    Of many classes `enough` are looked at, at equal distances.
    """
    classes = p.shape[-1]
    stride = max(1, classes // enough)
    scale = torch.maximum(-rows.least, rows.most).clamp(min=torch.finfo(p.dtype).tiny)
    total, own = rows.total / scale, rows.g.gather(-1, target[:, None])[:, 0]
    g, p = rows.g[:, ::stride] / scale[:, None], p[:, ::stride]
    others = (torch.arange(0, classes, stride, device=p.device) != target[:, None]).to(p.dtype)
    n, tiny = others.sum(-1), rows.tiny / scale
    mean_p, mean_g = ((x * others).sum(-1) / n for x in (p, g))
    factor, base = mean_g / mean_p, torch.zeros_like(mean_p)
    if smoothed:
        dp, dg = (p - mean_p[:, None]) * others, (g - mean_g[:, None]) * others
        factor = (dp * dg).sum(-1) / dp.square().sum(-1)
        base = mean_g - factor * mean_p
    away = ((g - factor[:, None] * p - base[:, None]).abs() * others).sum(-1)
    fits = away <= rows.tolerance * (g * others).abs().sum(-1) + (tiny + _EPSILON) * n
    balanced = total.abs() <= 0.1 + tiny * classes + 4 * _EPSILON * factor  # p - 1 is rounded where p is near 1
    sane = _smoothing_is_sane(factor, base, classes) if smoothed else own < 0
    return fits & balanced & sane & (factor > 0) & (tiny * classes < 0.1)


def _of_few(rows: _Rows, p: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Targets, and whether rows pass. With two or three classes a row alone can be anything: all rows of a class have
    to agree on the factor, or all rows on factor and smoothing. Class weights and smoothing together are not known.
    """
    classes, g = p.shape[-1], rows.g / rows.g.abs().amax().clamp(min=torch.finfo(p.dtype).tiny)
    others = (~torch.nn.functional.one_hot(target, classes).bool() & rows.alive[:, None]).to(p.dtype)
    enough = rows.alive.sum() >= _FEW_ROWS
    factor = _factor_by_class(g, p, others, target)
    weighted = (_away(g, factor[:, None] * p, others) <= _allowed(rows, g, others)) & (factor > 0) & enough
    slope, base = _common_line(g, p, others)
    misfits = []
    for c in range(classes):
        beside = 1 - torch.nn.functional.one_hot(torch.full_like(target, c), classes).to(p.dtype)
        misfits.append(_away(g, slope * p + base, beside) / _allowed(rows, g, beside))
    misfit, best = torch.stack(misfits, -1).min(-1)
    smoothed = (misfit <= 1) & _smoothing_is_sane(slope, base, classes) & enough
    balanced = g.sum(-1).abs() <= 0.1 * g.abs().amax(-1) + 4 * _EPSILON * torch.maximum(factor.abs(), slope.abs())
    return torch.where(weighted, target, best), (weighted | smoothed) & balanced


def _factor_by_class(g: Tensor, p: Tensor, others: Tensor, target: Tensor) -> Tensor:
    sums = [p.new_zeros(p.shape[-1]).index_add_(0, target, (x * others).sum(-1)) for x in (p * g, p * p)]
    return (sums[0] / sums[1])[target]


def _common_line(g: Tensor, p: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and base of g over p beside the targets; rows far from it, which have another target, are left out."""
    for _ in range(4):
        n = others.sum()
        mean_p, mean_g = (p * others).sum() / n, (g * others).sum() / n
        slope = ((p - mean_p) * (g - mean_g) * others).sum() / ((p - mean_p).square() * others).sum()
        base = mean_g - slope * mean_p
        away = torch.where(others > 0, (g - slope * p - base).abs(), torch.nan)
        others = others * (away <= away.nanmedian())
    return slope, base


def _away(g: Tensor, line: Tensor, others: Tensor) -> Tensor:
    return ((g - line).abs() * others).sum(-1)


def _allowed(rows: _Rows, g: Tensor, others: Tensor) -> Tensor:
    return rows.tolerance * ((g.abs() * others).sum(-1) + 0.01)


def _smoothing_is_sane(slope: Tensor, base: Tensor, classes: int) -> Tensor:
    """base = -slope · smoothing / classes. At 1 it would be the gradient of a squared error near uniform p."""
    smoothing = -base * classes / slope
    return (slope > 0) & (smoothing > 0) & (smoothing <= _MOST_SMOOTHING)


def _of_log_probabilities(rows: _Rows, enough: int) -> Tensor:
    """Whether a row of (log-)probabilities has a gradient at the target alone: that of `nll_loss`."""
    none_above = (rows.most == 0) if rows.g.shape[-1] > 1 else (rows.most < 0)
    alone = none_above & (rows.least < 0) & (rows.total == rows.least)
    stride = max(1, rows.g.shape[-1] // enough)
    alone &= (rows.g[:, ::stride] != 0).sum(-1) <= 1  # the sum may hide what is far smaller
    return alone & ((rows.z.logsumexp(-1).abs() < 1e-2) | are_distributions(rows.z))


def _elements(rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Binary cross-entropy: s (p - y) with one s for y = 0 and one for y = 1; the sign tells y."""
    rows = rows.cleared()
    z = rows.z[:, 0]
    g = rows.g[:, 0] / rows.g.abs().amax().clamp(min=torch.finfo(z.dtype).tiny)
    positive = (g < 0) & rows.alive
    distance = torch.where(positive, -(-z).sigmoid(), z.sigmoid())
    allowed = rows.tolerance * (g.abs() + 0.01)
    agreed = torch.zeros_like(rows.alive)
    for side in (positive, rows.alive & ~positive):
        d = distance * side
        factor = (d * g).sum() / d.square().sum()
        spread = d.abs().amax() - torch.where(side, d.abs(), torch.inf).amin()
        tells = spread > rows.tolerance * d.abs().amax()  # else any equal gradients would do
        agreed |= side & tells & (factor > 0) & ((g - factor * d).abs() <= allowed)
    return positive.long(), agreed & (rows.alive.sum() >= _FEW_ROWS), distance.abs() < 1 - _SURE

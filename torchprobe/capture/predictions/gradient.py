"""Targets from the gradient at an output: at a row of logits, cross-entropy's is s (p - y).

So the one negative entry is the target, a row of zeros is an ignored one, and the entries beside the target are
proportional to p, which tells that the loss was a cross-entropy at all. Everything is decided a row, on the device,
from some of its classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.capture.predictions import forms
from torchprobe.capture.predictions.forms import FEW_CLASSES, FEW_ROWS, IGNORED, Form, Predicted, known
from torchprobe.statistics.dtypes import row_dtype

_ENOUGH_CLASSES, _ENOUGH_ELEMENTS = 64, 2**14
_MOST_SMOOTHING = 0.5
_SURE = 0.99
_NEAR_ZERO = 1e-2
_EPSILON = 1e-7
_FAINT = 1e-4
_COARSE = 256  # of the smallest numbers of a type: below it a gradient has few digits left
TOLERANCE = {torch.bfloat16: 0.06, torch.float16: 0.02}  # log-probabilities are rounded to the type before exp


class Given(NamedTuple):
    """What was predicted, the gradients at its rows, the form of both, and their type: what `recover` takes."""

    predicted: Predicted
    g: Tensor
    form: Form
    precision: torch.dtype


class Recovered(NamedTuple):
    """targets: int64, IGNORED where the gradient is not that of a cross-entropy. favourite: the likeliest class."""

    targets: Tensor
    favourite: Tensor
    evidence: Tensor
    """(3,): rows with a gradient, those of them that are a cross-entropy's, and rows with none or hardly any whose
    prediction is so sure that it may have been lost in rounding."""
    factor: Tensor
    """s of each row that passed."""
    faint: Tensor
    """Rows of the third kind; without any gradient they may be ignored ones as well."""
    alive: Tensor
    """Rows with a gradient."""
    likely: Tensor
    """The targets of all rows, if the loss is a cross-entropy at all."""


def recover(predicted: Predicted, gradient: Tensor, form: Form, precision: torch.dtype) -> Recovered:
    """Targets of predictions, from the gradients at their rows: (samples, n, classes) or (samples, n, 1), float32 or
    wider; targets of shape (samples, n).

    precision: the gradient's type before. The loss may be scaled, per row too; labels may be smoothed.
    """
    shape, p, gradient = gradient.shape[:-1], predicted.softmax.flatten(0, 1), gradient.flatten(0, 1)
    tolerance = TOLERANCE.get(precision, 2e-3)
    rounding = torch.finfo(precision).eps / 2 if precision in TOLERANCE else 0.0
    tiny = torch.finfo(precision).smallest_normal * torch.finfo(precision).eps
    (least, lowest), most = gradient.min(-1), gradient.amax(-1)
    alive = least.isfinite() & most.isfinite() & ((least != 0) | (most != 0))
    raw = predicted.largest.flatten(), predicted.already.flatten()
    q = predicted.probabilities.flatten(0, 1)
    rows = _Rows(p, q, *raw, gradient, alive, least, lowest, most, gradient.sum(-1), tolerance, rounding, tiny)
    top, favourite = p.max(-1)
    found = _classes(rows, top, favourite) if form.kind == "softmax" else _elements(rows, form.kind)
    passed = found.passed & alive
    size = torch.where(alive, torch.maximum(-least, most), 0.0)
    lost = (size <= _FAINT * size.amax()) | (size < _COARSE * tiny)  # where p - y is lost in rounding
    faint = ~passed & found.sure & lost
    evidence = torch.stack(((alive & ~faint).sum(), passed.sum(), faint.sum()))
    targets = torch.where(passed, found.targets, IGNORED)
    # Where an entry of -1 + p is lost in rounding, or smoothing calls for less of it, its class is the likeliest.
    pulled = (form.kind != "softmax") | (-least >= 0.8 * most)
    likely = torch.where(pulled & alive, found.targets, favourite)
    columns = (x.view(shape) for x in (targets, favourite, found.factor, faint, alive, likely))
    targets, favourite, factor, faint, alive, likely = columns
    return Recovered(targets, favourite, evidence.to(row_dtype(p.device)), factor, faint, alive, likely)


class _Found(NamedTuple):
    """Targets, whether a row is a cross-entropy's, its s, and whether its prediction is sure."""

    targets: Tensor
    passed: Tensor
    factor: Tensor
    sure: Tensor


class _Rows(NamedTuple):
    p: Tensor
    q: Tensor  # as predicted
    largest: Tensor  # of what p is the softmax of, and whether that was probabilities already
    already: Tensor
    g: Tensor
    alive: Tensor  # rows with a gradient
    least: Tensor  # of a row's gradient, and where it is
    lowest: Tensor
    most: Tensor
    total: Tensor
    tolerance: float
    rounding: float  # of a log-probability, to which exp is as sensitive as it is large
    tiny: float  # an entry smaller than this is rounded to 0

    def cleared(self) -> _Rows:
        """With zeros where the gradient is not finite, for what adds up over rows."""
        return self._replace(g=torch.where(self.alive[:, None], self.g, 0.0))


def _classes(rows: _Rows, top: Tensor, favourite: Tensor) -> _Found:
    few = rows.p.shape[-1] <= FEW_CLASSES
    target, passed, factor = _of_few(rows.cleared()) if few else _of_many(rows, top, favourite)
    if not known(passed | ~rows.alive):
        alone = _of_log_probabilities(rows, top)
        at_target = rows.q.gather(-1, rows.lowest[:, None])[:, 0].where(rows.already, 1.0)  # d log p = dp / p
        factor = torch.where(alone, -rows.least * at_target, factor)
        target, passed = torch.where(alone, rows.lowest, target), passed | alone
    return _Found(target, passed, factor, top > _SURE)


def _of_many(rows: _Rows, top: Tensor, favourite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, whether rows pass, and their s."""
    some = _Some.of(rows, favourite[:, None])
    beside = some.beside(rows.lowest)
    passed, factor = some.fit(beside)
    if known(passed | ~rows.alive):  # nothing was smoothed
        return rows.lowest, passed, factor
    smoothed, slope = some.fit_smoothed(beside, rows.p.gather(-1, rows.lowest[:, None])[:, 0], rows.least)
    factor, passed = torch.where(passed, factor, slope), passed | smoothed
    # Where smoothing calls a prediction too sure, its own class is pushed down.
    own = top, rows.g.gather(-1, favourite[:, None])[:, 0]
    other, slope = some.fit_smoothed(some.beside(favourite), *own)
    other &= ~passed
    return torch.where(other, favourite, rows.lowest), passed | other, torch.where(other, slope, factor)


class _Others(NamedTuple):
    """Some of the classes beside the target, the rest 0."""

    mask: Tensor
    n: Tensor
    g: Tensor
    p: Tensor
    mean_g: Tensor
    mean_p: Tensor
    allowed: Tensor  # by how much the gradient may miss a line, all in all


class _Some(NamedTuple):
    """Some classes of each row, at equal distances: enough to tell, in a fraction of the time.

    The favourite is among them: where smoothing pushes it down, any other class beside those would pass for the target.
    """

    rows: _Rows
    columns: Tensor
    g: Tensor  # the gradient over its largest element
    p: Tensor
    outweighs: Tensor  # whether the lowest gradient can be what all others add up to
    scale: Tensor
    total: Tensor
    tiny: Tensor

    @classmethod
    def of(cls, rows: _Rows, favourite: Tensor) -> _Some:
        """At least `_ENOUGH_CLASSES` of a row; of few rows more."""
        p, (n, classes) = rows.p, rows.p.shape
        stride = max(1, classes // max(_ENOUGH_CLASSES, _ENOUGH_ELEMENTS // n))
        scale = torch.maximum(-rows.least, rows.most).clamp(min=torch.finfo(p.dtype).tiny)
        columns = torch.arange(0, classes, stride, device=p.device).expand(n, -1)
        g, p_some = rows.g[:, ::stride], p[:, ::stride]
        if stride > 1:
            columns = torch.cat((columns, favourite), -1)
            g, p_some = (torch.cat((few, x.gather(-1, favourite)), -1) for few, x in ((g, rows.g), (p_some, p)))
        total, tiny = (rows.total / scale).abs(), rows.tiny / scale
        outweighs = (rows.least < 0) & (-rows.least >= 0.8 * rows.most)
        return cls(rows, columns, g / scale[:, None], p_some, outweighs, scale, total, tiny)

    def fit(self, beside: _Others) -> tuple[Tensor, Tensor]:
        """Whether a row adds up to 0, and its entries beside the target, the lowest, are a p; and a."""
        factor = beside.mean_g / beside.mean_p
        return self._near(beside, factor, None) & self.outweighs, factor * self.scale

    def fit_smoothed(self, beside: _Others, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The same with entries a p + b, as where labels are smoothed. p, g: at the target, which is far below that."""
        dp, dg = ((x - mean[:, None]) * beside.mask for x, mean in ((self.p, beside.mean_p), (self.g, beside.mean_g)))
        factor: Tensor = torch.linalg.vecdot(dp, dg) / torch.linalg.vecdot(dp, dp)
        base = beside.mean_g - factor * beside.mean_p
        below = factor * p + base - g / self.scale >= _MOST_SMOOTHING * factor
        sane = _smoothing_is_sane(factor, base, self.rows.p.shape[-1])
        return self._near(beside, factor, base) & below & sane, factor * self.scale

    def beside(self, target: Tensor) -> _Others:
        """All but the target."""
        mask = (self.columns != target[:, None]).to(self.p.dtype)
        n, g, p = mask.sum(-1), self.g * mask, self.p * mask
        rounded = self.rows.tolerance - self.rows.rounding * self.p.clamp(min=_EPSILON).log()
        allowed = (rounded * g.abs()).sum(-1) + (self.tiny + _EPSILON) * n
        return _Others(mask, n, g, p, g.sum(-1) / n, p.sum(-1) / n, allowed)

    def _near(self, beside: _Others, factor: Tensor, base: Tensor | None) -> Tensor:
        away = beside.g - factor[:, None] * beside.p
        away = away if base is None else away - base[:, None] * beside.mask
        # p - 1 is rounded where p is near 1
        lost = self.tiny * self.rows.p.shape[-1]
        balanced = self.total <= 0.1 + lost + 4 * _EPSILON * factor
        return (away.abs().sum(-1) <= beside.allowed) & balanced & (factor > 0) & (lost < 0.1)


def _of_few(rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, whether rows pass, and their s. With two or three classes a row alone can be anything: all rows of a
    class have to agree on the factor, or all rows on factor and smoothing. Weights with smoothing are not known.
    """
    p, target, classes = rows.p, rows.lowest, rows.p.shape[-1]
    size = rows.g.abs().amax().clamp(min=torch.finfo(p.dtype).tiny)
    g = rows.g / size
    others = (~torch.nn.functional.one_hot(target, classes).bool() & rows.alive[:, None]).to(p.dtype)
    enough = rows.alive.sum() >= FEW_ROWS
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
    passed = (weighted | smoothed) & balanced
    return torch.where(weighted, target, best), passed, torch.where(weighted, factor, slope) * size


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


def _of_log_probabilities(rows: _Rows, top: Tensor) -> Tensor:
    """Whether a row of (log-)probabilities has a gradient at the target alone: that of `nll_loss`."""
    alone = (rows.most <= 0) & (rows.least < 0) & (rows.total == rows.least)
    stride = max(1, rows.g.shape[-1] // _ENOUGH_CLASSES)
    alone &= (rows.g[:, ::stride] != 0).sum(-1) <= 1  # the sum may hide what is far smaller
    logsumexp = rows.largest - top.log()
    return alone & ((logsumexp.abs() < _NEAR_ZERO) | rows.already)


def _elements(rows: _Rows, kind: str) -> _Found:
    """Binary cross-entropy: s (p - y) at logits, s (p - y) / p (1 - p) at probabilities, with one s for y = 0 and one
    for y = 1; the sign tells y.
    """
    rows = rows.cleared()
    size = rows.g.abs().amax().clamp(min=torch.finfo(rows.p.dtype).tiny)
    g = rows.g[:, 0] / size
    positive = (g < 0) & rows.alive
    no, yes = rows.p.unbind(-1)
    distance = torch.where(positive, -no, yes) if kind == "sigmoid" else torch.where(positive, -1 / yes, 1 / no)
    distance = distance.nan_to_num(0.0, 0.0, 0.0)
    allowed = rows.tolerance * (g.abs() + 0.01)
    agreed, factor = torch.zeros_like(rows.alive), torch.zeros_like(g)
    counts = forms.are_counts(g, yes / no, rows.alive & ~positive, yes) & (kind == "sigmoid")
    lines = [forms.line_of(g, distance, side, rows.tolerance) for side in (positive, rows.alive & ~positive)]
    for (side, of_side, tells), (_, of_other, fits) in zip(lines, lines[::-1], strict=True):
        tells = tells | (fits & ((of_side - of_other).abs() <= rows.tolerance * of_other))  # as a side of one row
        agreed |= side & tells & (of_side > 0) & ((g - of_side * distance).abs() <= allowed)
        factor = torch.where(side, of_side * size, factor)
    sure = torch.maximum(no, yes) > _SURE
    return _Found(positive.long(), agreed & ~counts & (rows.alive.sum() >= FEW_ROWS), factor, sure)

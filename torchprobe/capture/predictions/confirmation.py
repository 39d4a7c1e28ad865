"""The one place where a hypothesis about an output becomes a claim: recomputing it gives what the user's code did.

Candidates come from the gradient itself, from calls of loss modules, from the graph of a loss that the model returns,
from its arguments. Every answer is a flag or a count on the device; the host decides by the counts beside the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchprobe.capture.predictions import forms, trust
from torchprobe.capture.predictions.gradient import TOLERANCE, Given, Recovered, recover
from torchprobe.capture.predictions.graph import Judge, judged_by
from torchprobe.capture.predictions.phase import Candidate, Phase, Waiting
from torchprobe.capture.predictions.pool import Seen
from torchprobe.capture.predictions.targets import Labels, direction, targets_of, wanted, weights_of
from torchprobe.probes.evidence import SURE
from torchprobe.statistics import calibration, intervals
from torchprobe.statistics.dtypes import row_dtype

_ENOUGH = 0.9  # of the rows
_MOST_RECOMPUTED = 2**24
_AGAINST = 1e12  # rows, which outweigh all others


# ---- by the gradient at an output


def confirm_gradient(
    phase: Phase, waiting: Waiting, gradients: Sequence[Tensor], judge: Judge, drawn: bool = False
) -> None:
    """Targets from the gradient at the output, one for each sample, in each form that the graph does not rule out.
    drawn: whether random numbers were drawn since the pass, as where actions are sampled from what it predicts.
    """
    if waiting.pool.passes > 1:  # what else is learned may be the other passes
        judge = judge._replace(mixed=False)
    sampled = drawn and judge.kind != "whole" and not any(call.reduced for call in waiting.candidates)
    for form, predicted in waiting.predicted.items():
        g = forms.stacked([waiting.pool.rows(gradient, form) for gradient in gradients])
        if judge.judges not in ("", form.kind):
            phase.support(form.key, _evidence(g, 1.0, 0.0))
            continue
        given = Given(predicted, g, form, gradients[0].dtype)
        found = recover(*given)
        evidence, row = _from_gradient(waiting, given, judge, found)
        by_value = trust.are_hardest(found, predicted, judge)
        for confirmed, better in _from_calls(waiting, given, judge.selected):
            by_value = by_value & ~confirmed
            evidence = torch.where(confirmed, _evidence(g, 1.0, 1.0), evidence)
            row = torch.where(confirmed, better, row)
        phase.support(form.key, evidence)
        phase.calibration.add(f"{form.key}|found", row, waiting.pool.sampled(form))
        against = _evidence(g, _AGAINST, 0.0)
        seen = Seen(found.alive.any(0), found.faint.any(0), found.targets.amax(0), predicted.mean)
        refuse = partial(_refuse, phase, form, against)
        for flag in trust.choices(waiting, form, seen, refuse):
            refuse(flag)
        refuse(by_value)
        if sampled:
            phase.calibration.support(form.key, against)
        each = forms.row_count(waiting.shape, form) // waiting.shape[0]
        if len(g) == 1 and each > 1:
            alike = trust.have_one_target(seen.targets, each, waiting.pool.index(g, form))
            phase.uncertainty.support(form.key, against * alike)


def _refuse(phase: Phase, form: forms.Form, against: Tensor, flag: Tensor) -> None:
    phase.calibration.support(form.key, against * flag)


def _from_gradient(waiting: Waiting, given: Given, judge: Judge, found: Recovered) -> tuple[Tensor, Tensor]:
    """Evidence and a row, from the gradient alone: at each pass's own prediction, or at that of all passes together.

    Of the mean of their logits it has the same form, at that mean. Of the mean of their probabilities it has it at each
    pass, times the pass's share of what all of them give the target.
    """
    targets, evidence = _claimed(found, given, judge)
    favourite = found.favourite[0] if len(given.g) == 1 else None
    row = calibration.compute(given.predicted.mean, targets, ignore_index=forms.IGNORED, favourite=favourite)
    members = waiting.pool.members(given.form)
    if members is None or members.of_mean_logits is None or given.form.kind != "softmax":
        return evidence, row
    last = float(waiting.number == waiting.pool.passes)
    for reading, at, judged, weight in trust.of_passes(found, given, members, last):
        targets, claimed = _claimed(reading, at, judge)
        better = claimed[1] > evidence[1]
        other = calibration.compute(judged, targets, ignore_index=forms.IGNORED) * weight
        evidence, row = torch.where(better, claimed, evidence), torch.where(better, other, row)
    return evidence, row


def _claimed(found: Recovered, given: Given, judge: Judge) -> tuple[Tensor, Tensor]:
    """What may be claimed of all rows together, as a row alone fits every loss that chooses a class, a policy's too:
    their targets, (n,), IGNORED where the loss left one out; and evidence, (3,), see `probes.evidence`.
    """
    predicted, g, _, precision = given
    passed, alive, faint = found.targets != forms.IGNORED, found.alive.any(0), found.faint.all(0)
    targets = found.targets.amax(0)
    agree = ((found.targets == targets) | ~passed).all(0)  # members of one prediction have one target
    fine = passed.any(0) & agree
    factor = found.factor.where(passed, 0.0).sum(0)
    common = factor.where(fine, torch.nan).nanmedian()
    loose = trust.STEADY if precision not in TOLERANCE else 2 * TOLERANCE[precision]
    close = trust.CLOSE if precision not in TOLERANCE else loose
    count = trust.Count(common, alive.sum(), (faint & ~alive).sum(), len(fine), close)
    trusted = trust.is_trusted(judge, trust.is_steady(factor, fine, targets, common, loose), count)
    trusted &= agree.sum() >= _ENOUGH * len(agree)
    # A row whose gradient was lost has its likeliest class for a target, or was ignored: the number of rows tells.
    lost = faint & (alive | count.zeros_count)
    targets = torch.where(lost & trusted, found.favourite[0], targets.where(trusted & agree, forms.IGNORED))
    if precision in TOLERANCE and len(g) == 1:  # a few rows are rounded too far, and are rows of that loss all the same
        targets = torch.where(alive & ~fine & ~faint & trusted, found.likely[0], targets)
    broken = predicted.mean.isnan().any(-1) & g.isnan().any(-1).any(0)
    evidence = found.evidence * torch.stack((g.new_ones(()), trusted.to(g.dtype), ~count.is_known & (count.zeros > 0)))
    return torch.where(broken, 0, targets), evidence


# ---- by the calls of loss modules, which the gradient confirms


def _from_calls(waiting: Waiting, given: Given, selected: bool) -> list[tuple[Tensor, Tensor]]:
    """A flag and a row, where the gradient is that of the calls that were heard: of one, or of a mixture of two."""
    predicted, g, form, precision = given
    calls = [one for one in waiting.candidates if one.form == form]
    if not calls or len(calls) > 2 or len(g) > 1:
        return []
    p, g = predicted.mean, g[0]
    if form.kind != "softmax":
        return [_of_answers(p, g, calls[0])] if len(calls) == 1 and calls[0].reduced else []
    directions = [
        direction(p, call.targets, call.weight, call.smoothing, predicted.already[0, :, None]) for call in calls
    ]
    weights = weights_of(directions, g)
    away = g - sum(w * d for w, d in zip(weights, directions, strict=True))
    size, tiny = g.abs().sum(-1), torch.finfo(precision).smallest_normal * torch.finfo(precision).eps
    alive = g.isfinite().all(-1) & (size > 0)
    clear = alive & (size > 1e-4 * size.where(alive, 0.0).amax()) & (size > 256 * tiny)
    loose = 2 * TOLERANCE.get(precision, 5e-3)
    fits = clear & (away.abs().sum(-1) <= loose * size + tiny * g.shape[-1])
    confirmed = (fits.sum() >= _ENOUGH * clear.sum()) & (clear.sum() > 0)
    # The gradient of a mean of probabilities points the same way at each pass, of which none was judged by itself.
    confirmed = torch.stack([confirmed, *(call.own for call in calls if call.own is not None)]).all()
    total = sum(w.mean() for w in weights)
    kept = [call.targets if selected else _kept(call, p, alive) for call in calls]
    rows = [calibration.compute(p, targets, ignore_index=forms.IGNORED) for targets in kept]
    if len(rows) == 1:
        return [(confirmed & _is_unweighted(calls[0], weights[0][:, 0], clear, alive), rows[0])]
    return [(confirmed, sum(row * (w / total).to(row.dtype) for row, w in zip(rows, weights, strict=True)))]  # type: ignore[list-item]


def _is_unweighted(call: Candidate, weight: Tensor, clear: Tensor, alive: Tensor) -> Tensor:
    """A flag: that what was computed of each example was masked at most. A policy's gradient has weights of its own."""
    common = weight.where(clear, torch.nan).nanmedian()
    equal = clear & ((weight - common).abs() <= trust.STEADY * common)
    count = trust.Count(common, alive.sum(), torch.zeros_like(common), len(weight), trust.CLOSE)
    return ((equal.sum() >= _ENOUGH * clear.sum()) & count.is_plain) | call.reduced


def _of_answers(p: Tensor, g: Tensor, call: Candidate) -> tuple[Tensor, Tensor]:
    """Of yes and no: each gradient pulls towards its target."""
    y, yes = call.targets[:, 1], p[:, 1]
    alive = (g[:, 0] != 0) & g.isfinite()[:, 0]
    agree = alive & ((g[:, 0] > 0) == (yes > y))
    row = calibration.compute(p, call.targets, ignore_index=forms.IGNORED)
    return (agree.sum() >= _ENOUGH * alive.sum()) & (alive.sum() > 0), row


def _kept(call: Candidate, p: Tensor, alive: Tensor) -> Tensor:
    """Targets without those that a mask took away after the loss was computed of each; not where their losses did."""
    if call.reduced or call.targets.dim() > 1:
        return call.targets
    log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()
    loss = -(wanted(call.targets, call.weight, call.smoothing, p) * log_p).sum(-1)
    return call.targets.where(trust.counted(loss, alive, call.targets != forms.IGNORED), forms.IGNORED)


# ---- by a loss that the model returns


def confirm_returned(phase: Phase, output: Tensor, judge: Judge, generators: forms.Generators) -> bool:
    """Targets that the graph of a returned loss still holds, and the probabilities that it judged."""
    found = None if judge.node is None or judge.kind == "each" else judged_by(judge, output)
    if found is None or found[1].shape[-1] != forms.class_count(output.shape, found[0]):
        return False
    form, rows, targets = found
    index = forms.pick(rows, form._replace(axis=-1), generators)
    rows, targets = (x if index is None else x[index] for x in (rows, targets))
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    p = wide.exp() if form.kind == "softmax" else forms.probabilities_of(wide, form)
    y = targets if form.kind == "softmax" else torch.stack((1 - targets, targets), -1).to(p.dtype)
    phase.calibration.add(f"{SURE}|found", calibration.compute(p, y, ignore_index=forms.IGNORED), index is not None)
    phase.settle_form(form.key, True)
    return True


def confirm_labels(phase: Phase, output: Tensor, loss: Tensor, labels: Labels, ignored: int) -> None:
    """Labels that the model was called with, where the loss recomputed from them is the one that it returned: as they
    are, or shifted by one, with classes last or second; yes and no where they are floats.
    """
    if output.numel() > _MOST_RECOMPUTED or output.dim() < 2:
        return
    seen = torch.zeros((), dtype=torch.bool, device=output.device)
    for form, logits, targets in _alignments(output.detach(), labels.values.detach()):
        rows = forms.rows_of(logits, form, None)
        equal = _recomputes(loss.detach(), form, rows, targets, ignored, labels.items) & ~seen
        seen = seen | equal
        if form.kind == "softmax":  # no class at all is another way to say that one does not count
            counts = (targets >= 0) & (targets < rows.shape[-1]) & (targets != ignored)
            y = targets.where(counts, forms.IGNORED).reshape(-1)
        else:
            y = torch.stack((1 - targets, targets), -1).reshape(-1, 2).to(rows.dtype)
        row = calibration.compute(forms.probabilities_of(rows, form), y, ignore_index=forms.IGNORED)
        phase.calibration.add(f"{SURE}|found", row * equal)
        phase.settle_form(form.key, True, equal)


def _alignments(logits: Tensor, labels: Tensor) -> list[tuple[forms.Form, Tensor, Tensor]]:
    if labels.is_floating_point():
        return [(forms.BINARY, logits, labels)] if labels.shape == logits.shape else []
    found = []
    if labels.shape == logits.shape[:-1]:
        found.append((forms.LAST, logits, labels))
        if labels.dim() == 2 and labels.shape[1] > 1:
            found.append((forms.LAST, logits[:, :-1], labels[:, 1:]))
    if logits.dim() > 2 and labels.shape == logits.shape[:1] + logits.shape[2:]:
        found.append((forms.SECOND, logits, labels))
    return found


def _recomputes(loss: Tensor, form: forms.Form, rows: Tensor, targets: Tensor, ignored: int, items: Any) -> Tensor:
    """A flag: whether the loss is that of these targets, as a mean or divided by the items that the model was told."""
    if form.kind != "softmax":
        mean = F.binary_cross_entropy_with_logits(rows.reshape(-1), targets.reshape(-1).to(rows.dtype))
        return _equals(mean, loss)
    fitting = torch.where((targets >= 0) & (targets < rows.shape[-1]), targets, ignored).reshape(-1).long()
    total = F.cross_entropy(rows, fitting, ignore_index=ignored, reduction="sum")
    equal = _equals(total / (fitting != ignored).sum(), loss)
    return equal if items is None else equal | _equals(total / items, loss)


def _equals(value: Tensor, loss: Tensor) -> Tensor:
    loose = 1e-2 if loss.dtype in TOLERANCE else 1e-5
    return (value - loss).abs() <= loose * value.abs() + 1e-6


# ---- numbers


def confirm_likelihood(phase: Phase, waiting: Waiting, of_mean: Tensor, of_source: Tensor) -> None:
    """Targets of numbers from the gradients of a Gaussian likelihood at their mean and at what gives their variance."""
    for number in waiting.numbers:
        stride = 1 + number.mean.numel() // forms.MAX_ELEMENTS
        mean, variance, *both = (x.reshape(-1)[::stride] for x in (number.mean, number.variance, of_mean, of_source))
        targets, found = targets_of(mean, variance, both[0], both[1], number.spread)
        if number.key:
            phase.settle_form(number.key, True, found)
            phase.settle_form(number.key, False, ~found)
        phase.coverage.add(SURE, intervals.compute(mean, variance, targets.where(found, torch.nan)) * found)


def _evidence(like: Tensor, checked: float, passed: float) -> Tensor:
    return torch.tensor([checked, passed, 0.0], dtype=row_dtype(like.device), device="cpu").to(
        like.device, non_blocking=True
    )

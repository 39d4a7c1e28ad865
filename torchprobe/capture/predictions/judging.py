"""Predictions meet their targets: rows of calibration, and of the coverage of intervals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchprobe.capture.loss import descends
from torchprobe.capture.predictions.criteria import Call
from torchprobe.capture.predictions.forms import (
    BINARY,
    LAST,
    MAX_ELEMENTS,
    SECOND,
    Form,
    Generators,
    pick,
    rows_of,
    stacked,
)
from torchprobe.capture.predictions.gradient import IGNORED, recover
from torchprobe.capture.predictions.likelihood import Spread, targets_of
from torchprobe.capture.predictions.phase import Phase, Waiting
from torchprobe.capture.predictions.pool import NUMBERS, same_rows
from torchprobe.capture.predictions.predicted import probabilities_of
from torchprobe.probes.evidence import SURE
from torchprobe.statistics import calibration, intervals

_CLOSE = 1e-2


def judge_gradient(phase: Phase, waiting: Waiting, gradients: Sequence[Tensor]) -> None:
    """Targets from the gradient at the output, one for each sample; each form is judged, the host decides."""
    for form, predicted in waiting.predicted.items():
        g = stacked([waiting.pool.rows(gradient, form) for gradient in gradients])
        found = recover(predicted, g, form, gradients[0].dtype)
        phase.support(form.key, found.evidence)
        targets, favourite = found.targets.amax(0), found.favourite[0] if len(g) == 1 else None
        _add(phase, form.key, predicted.mean, targets, waiting.pool.sampled(form), favourite=favourite)


def judge_labels(phase: Phase, form: Form, members: Sequence[Tensor], labels: Tensor, generators: Generators) -> None:
    """Targets that the model was called with."""
    index = pick(members[0], form, generators)
    p = torch.stack([probabilities_of(rows_of(member, form, index), form) for member in members]).mean(0)
    phase.settle_form(form.key, True)
    _add(phase, SURE, p, _targets(labels, form, index), index is not None)


def judge_likelihood(phase: Phase, waiting: Waiting, of_mean: Tensor, of_spread: Tensor, spread: Spread) -> None:
    """Targets of numbers from the gradients at their mean and at what gives their variance."""
    if waiting.mean is None or waiting.variance is None:
        return
    waiting.judged = True
    stride = 1 + waiting.mean.numel() // MAX_ELEMENTS
    some = [x.reshape(-1)[::stride] for x in (waiting.mean, waiting.variance, of_mean, of_spread)]
    mean, variance = some[:2]
    targets, found = targets_of(mean, variance, some[2], some[3], spread)
    phase.coverage.add(SURE, intervals.compute(mean, variance, targets) * found)


def judge_call(phase: Phase, call: Call, generators: Generators) -> bool:
    """Targets that a loss module was called with, on what follows from outputs of the model.

    Whether they are there, but the variance is missing that numbers need.
    """
    fitting = [waiting for waiting in phase.waiting if _comes_from(call.input, waiting)]
    certain: Tensor | None = None
    if not fitting and not phase.training:
        fitting, certain = _alike(phase.waiting, call)
    if not fitting:
        return False
    if call.form is None:
        return not _judge_numbers(phase, call, fitting[-1], certain)
    for waiting in fitting:
        waiting.judged = True
    for key, right in _told_forms(call, fitting[-1].shape):
        phase.settle_form(key, right, certain)
    index = pick(call.input, call.form, generators)
    rows = rows_of(call.input, call.form, index)
    p = torch.cat((1 - rows, rows), -1) if call.are_probabilities else probabilities_of(rows, call.form)
    _add(phase, SURE, p, _targets(call.target, call.form, index), index is not None, certain)
    return False


def _add(
    phase: Phase,
    name: str,
    p: Tensor,
    targets: Tensor,
    sampled: bool,
    certain: Tensor | None = None,
    favourite: Tensor | None = None,
) -> None:
    row = calibration.compute(p, targets, ignore_index=IGNORED, favourite=favourite)
    phase.calibration.add(f"{name}|found", row if certain is None else row * certain, sampled)


def _judge_numbers(phase: Phase, call: Call, waiting: Waiting, certain: Tensor | None) -> bool:
    """Whether there was a variance to judge by."""
    for form in (LAST, SECOND, BINARY):
        phase.settle_form(form.key, False, certain)
    phase.settle_form(NUMBERS, True, certain)
    variance = call.variance if isinstance(call.variance, Tensor) else waiting.variance
    if variance is not None and call.target.is_floating_point() and _broadcast(call.input, variance, call.target):
        waiting.judged = True
        row = intervals.compute(call.input.detach(), variance.detach(), call.target.detach())
        phase.coverage.add(SURE, row if certain is None else row * certain)
    return variance is not None


def _comes_from(tensor: Tensor, waiting: Waiting) -> bool:
    return bool(waiting.nodes) and descends(tensor, waiting.nodes)


def _alike(waiting: Sequence[Waiting], call: Call) -> tuple[list[Waiting], Tensor | None]:
    """Without a graph: the last output, if the call's input has its values, or those of its passes' mean.

    That is a flag on the device, which the row is multiplied with.
    """
    for last in waiting[-1:]:
        if call.form is None:
            if last.mean is not None and last.mean.shape == call.input.shape:
                return [last], torch.isclose(call.input, last.mean).all()
            continue
        for form, predicted in last.predicted.items():
            if (form.kind == call.form.kind) and rows_match(call, form, last.shape):
                p = probabilities_of(last.pool.rows(call.input, call.form), call.form)
                flag = (p - predicted.mean).abs().amax() < _CLOSE
                pooled = last.pool.mean_prediction(form)
                return [last], flag if pooled is None else flag | ((p - pooled).abs().amax() < _CLOSE)
    return [], None


def rows_match(call: Call, form: Form, shape: tuple[int, ...]) -> bool:
    """Whether a call judges as many predictions over as many classes as an output of this shape holds."""
    plain = torch.empty(shape, device="meta")
    return call.form is not None and same_rows(call.input, call.form, plain, form)


def _told_forms(call: Call, shape: tuple[int, ...]) -> list[tuple[str, bool]]:
    """Which form of the output a call on it tells, and which not: one of probabilities (`BCELoss`) is none of them."""
    if call.form is None or call.form.kind == "sigmoid":
        right = BINARY
    elif (len(shape) > 2 and tuple(call.input.shape) == shape) or shape[-1] != call.input.shape[call.form.axis]:
        right = SECOND
    else:
        right = LAST
    return [(form.key, form == right and not call.are_probabilities) for form in (LAST, SECOND, BINARY)] + [
        (NUMBERS, False)
    ]


def _targets(targets: Tensor, form: Form, index: Tensor | None) -> Tensor:
    """Row by row, as the predictions: (n,), or (n, classes) for class probabilities."""
    targets = targets.detach()
    if form.kind == "softmax" and targets.is_floating_point():
        return rows_of(targets, form, index)
    flat = targets.reshape(-1)
    flat = flat if index is None else flat[index]
    return flat if form.kind == "softmax" else torch.stack((1 - flat, flat), -1).float()


def _broadcast(*tensors: Tensor) -> bool:
    try:
        torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    except RuntimeError:
        return False
    return True

"""Predictions meet their targets: rows of calibration, and of the coverage of intervals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.capture.predictions.forms import (
    BINARY,
    IGNORED,
    LAST,
    MAX_ELEMENTS,
    SECOND,
    Form,
    Generators,
    by_row,
    class_count,
    decided,
    pick,
    probabilities_of,
    row_count,
    rows_of,
    same_memory,
    stacked,
)
from torchprobe.capture.predictions.gradient import TOLERANCE, recover
from torchprobe.capture.predictions.likelihood import Spread, targets_of
from torchprobe.capture.predictions.phase import Phase, Waiting
from torchprobe.capture.predictions.pool import NUMBERS, version_of
from torchprobe.capture.predictions.targets import Call
from torchprobe.probes.evidence import SURE
from torchprobe.statistics import calibration, intervals

NO_VARIANCE = (
    "the model predicts numbers without a variance, so that there is no interval to judge: return one beside the mean, "
    "such as a field called variance or log_var, or train with nn.GaussianNLLLoss()"
)
NO_TARGETS = (
    "the model returns a mean and a variance, but no target was seen: of functional losses a Gaussian likelihood alone "
    "tells them, by its gradients at both; use nn.GaussianNLLLoss(), or nn.MSELoss() on the mean, made before training"
)
_EQUAL = 1e-3  # of the largest value: as far as two ways to compute one number in float32 lie apart


# ---- by gradients, and by labels


def judge_gradient(phase: Phase, waiting: Waiting, gradients: Sequence[Tensor]) -> None:
    """Targets from the gradient at the output, one for each sample; each form is judged, the host decides."""
    for form, predicted in waiting.predicted.items():
        g = stacked([waiting.pool.rows(gradient, form) for gradient in gradients])
        found = recover(predicted, g, form, gradients[0].dtype)
        phase.support(form.key, found.evidence)
        targets, favourite = found.targets.amax(0), found.favourite[0] if len(g) == 1 else None
        row = calibration.compute(predicted.mean, targets, ignore_index=IGNORED, favourite=favourite)
        phase.calibration.add(f"{form.key}|found", row, waiting.pool.sampled(form))


def judge_labels(phase: Phase, form: Form, members: Sequence[Tensor], labels: Tensor, generators: Generators) -> None:
    """Targets that the model was called with."""
    index = pick(members[0], form, generators)
    p = torch.stack([probabilities_of(rows_of(member, form, index), form) for member in members]).mean(0)
    phase.settle_form(form.key, True)
    _add_classes(phase, p, _targets(labels, form, index), _Match(form, index))


def judge_likelihood(phase: Phase, waiting: Waiting, of_mean: Tensor, of_spread: Tensor, spread: Spread) -> None:
    """Targets of numbers from the gradients at their mean and at what gives their variance."""
    if waiting.mean is None or waiting.variance is None:
        return
    stride = 1 + waiting.mean.numel() // MAX_ELEMENTS
    some = [x.reshape(-1)[::stride] for x in (waiting.mean, waiting.variance, of_mean, of_spread)]
    mean, variance = some[:2]
    targets, found = targets_of(mean, variance, some[2], some[3], spread)
    phase.coverage.add(SURE, intervals.compute(mean, variance, targets) * found)


# ---- by loss modules


def judge_call(phases: Sequence[Phase], call: Call, training: bool) -> None:
    """Targets that a loss module was called with, on an output that waits for them or on the mean of its passes.

    phases: the last one first. That it is on such an output is confirmed by the numbers: it got the very tensor, or,
    of the last output, the values.
    """
    waiting = [(phase, one) for phase in phases for one in reversed(phase.waiting)]
    tries = chain(
        ((phase, one, _same_tensor(one, call)) for phase, one in waiting),
        ((phase, one, _same_values(one, call, training)) for phase, one in waiting[:1]),
    )
    for phase, one, match in tries:
        if match is not None:
            _judge(phase, one, call, match)
            return


class _Match(NamedTuple):
    """That a loss module judged an output.

    form: of the output, None of numbers. rows: those that are read, None for all. certain: a flag that only the device
    knows; None where it is sure. by_values: it got these, not the output's own memory.
    """

    form: Form | None
    rows: Tensor | None = None
    certain: Tensor | None = None
    by_values: bool = False


def _same_tensor(waiting: Waiting, call: Call) -> _Match | None:
    """The match, if a loss module was handed the output itself, or a view of all of it."""
    output = waiting.output()
    if output is None or version_of(output) != waiting.version:
        return None
    judged = by_row(call.input, call.form or BINARY)
    forms = (LAST, SECOND) if call.form is not None and call.form.kind == "softmax" else (BINARY,)
    for form in forms:
        if output.dim() > form.axis and same_memory(judged, by_row(output, form)):
            return _Match(None) if call.form is None else _Match(form, waiting.pool.index(output, form))
    return None


def _same_values(waiting: Waiting, call: Call, training: bool) -> _Match | None:
    """The match, if a loss module was handed the output's values, or those of its passes' mean.

    In training, where the gradient tells as well, what only the device knows is no match of classes.
    """
    if call.form is None:
        expected = waiting.pool.mean_number() if waiting.mean is None else waiting.mean.flatten()
        return _by_values(None, None, _equal(call, call.input.detach().flatten(), expected))
    for form, predicted in waiting.predicted.items():
        if form.kind == call.form.kind and _sizes(call.input.shape, call.form) == _sizes(waiting.shape, form):
            rows = waiting.pool.index(call.input, form)
            p = _probabilities(call, rows)
            flags = [_equal(call, p, expected) for expected in (predicted.mean, waiting.pool.mean_prediction(form))]
            equal = [flag for flag in flags if flag is not None]
            match = _by_values(form, rows, torch.stack(equal).any() if equal else None)
            return None if match is None or (training and match.certain is not None) else match
    return None


def _by_values(form: Form | None, rows: Tensor | None, equal: Tensor | None) -> _Match | None:
    is_equal = None if equal is None else decided(equal)
    if equal is None or is_equal is False:
        return None
    return _Match(form, rows, None if is_equal else equal, by_values=True)


def _judge(phase: Phase, waiting: Waiting, call: Call, match: _Match) -> None:
    are_logits = match.by_values or not call.are_probabilities  # else BCELoss got the output itself
    for form in (LAST, SECOND, BINARY):
        phase.settle_form(form.key, form == match.form and are_logits, match.certain)
    phase.settle_form(NUMBERS, match.form is None, match.certain)
    if call.form is None:
        _judge_numbers(phase, waiting, call, match.certain)
    else:
        if match.certain is None:
            phase.has_judged(waiting)
        targets = _targets(call.target, call.form, match.rows)
        _add_classes(phase, _probabilities(call, match.rows), targets, match)


def _judge_numbers(phase: Phase, waiting: Waiting, call: Call, certain: Tensor | None) -> None:
    variance = call.variance if isinstance(call.variance, Tensor) else waiting.variance
    if variance is None:
        phase.cannot_judge = NO_VARIANCE
    elif call.target.is_floating_point() and _broadcast(call.input, variance, call.target):
        if certain is None:
            phase.has_judged(waiting)
        row = intervals.compute(call.input.detach(), variance.detach(), call.target.detach())
        phase.coverage.add(SURE, row if certain is None else row * certain)


def _add_classes(phase: Phase, p: Tensor, targets: Tensor, match: _Match) -> None:
    row = calibration.compute(p, targets, ignore_index=IGNORED)
    row = row if match.certain is None else row * match.certain
    phase.calibration.add(f"{SURE}|found", row, match.rows is not None)


def _probabilities(call: Call, index: Tensor | None) -> Tensor:
    """(n, classes) of what a loss module was handed, which are no numbers."""
    assert call.form is not None
    rows = rows_of(call.input, call.form, index)
    return torch.cat((1 - rows, rows), -1) if call.are_probabilities else probabilities_of(rows, call.form)


def _equal(call: Call, values: Tensor, expected: Tensor | None) -> Tensor | None:
    """A flag on the device: whether values are the same up to rounding; None where they are not comparable."""
    if expected is None or expected.shape != values.shape or expected.device != values.device:
        return None
    tolerance = TOLERANCE.get(call.input.dtype, _EQUAL)
    return (values - expected).abs().amax() <= tolerance * expected.abs().amax()


def _sizes(shape: torch.Size, form: Form) -> tuple[int, int]:
    return row_count(shape, form), class_count(shape, form)


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

"""Targets that the user's code hands to somebody: to the model itself, or to a loss module, and on which output."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.capture.predictions.forms import (
    BINARY,
    IGNORED,
    LAST,
    SECOND,
    YES,
    Form,
    class_count,
    decided,
    probabilities_of,
    row_count,
    rows_of,
    same_memory,
)
from torchprobe.capture.predictions.forms import by_row as rows_view
from torchprobe.capture.predictions.gradient import TOLERANCE
from torchprobe.capture.predictions.inputs import version_of
from torchprobe.capture.predictions.phase import Candidate, Phase, Waiting
from torchprobe.capture.predictions.pool import NUMBERS
from torchprobe.naming import unwrapped
from torchprobe.probes.evidence import SURE
from torchprobe.statistics import calibration, intervals

_NAMES = ("labels", "targets", "label", "target")
_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_ELEMENTS = (nn.BCEWithLogitsLoss, nn.BCELoss)
_NUMBERS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.GaussianNLLLoss)
KINDS = (*_CLASSES, *_ELEMENTS, *_NUMBERS)
"""The loss modules that are understood."""
NO_VARIANCE = (
    "the model predicts numbers without a variance, so that there is no interval to judge: return one beside the mean, "
    "such as a field called variance, or train with nn.GaussianNLLLoss()"
)
_EQUAL = 1e-3  # of the largest value: as far as two ways to compute one number in float32 lie apart


# ---- an argument of the model


def labels_in(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """An argument that may hold the labels, by name or by position; its name confirms nothing."""
    given = {**_by_position(module, args), **kwargs}
    return next((given[name] for name in _NAMES if isinstance(given.get(name), Tensor)), None)


def _by_position(module: nn.Module, args: Sequence[Any]) -> dict[str, Any]:
    if len(args) < 2:  # the input alone
        return {}
    try:
        names = list(inspect.signature(unwrapped(module).forward).parameters)
    except (TypeError, ValueError):  # a forward written in C
        return {}
    return dict(zip(names, args, strict=False))


# ---- the call of a loss module


class Call(NamedTuple):
    """What a loss module judged. form is None for numbers, whose variance is known to `GaussianNLLLoss` alone.

    weight, smoothing: of classes. reduced: whether it returned one number, of all examples that count.
    """

    input: Tensor
    target: Tensor
    form: Form | None
    are_probabilities: bool = False
    variance: Tensor | None = None
    weight: Tensor | None = None
    smoothing: float = 0.0
    reduced: bool = True


def read_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """The call of one of `KINDS`; None for shapes that it would not take."""
    given = {**dict(zip(("input", "target", "var"), args, strict=False)), **kwargs}
    x, y = given.get("input"), given.get("target")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None
    reduced = getattr(module, "reduction", "mean") != "none"
    if isinstance(module, _CLASSES):
        call = _of_classes(x, y, module.ignore_index)
        smoothing = float(getattr(module, "label_smoothing", 0.0))
        return call and call._replace(weight=module.weight, smoothing=smoothing, reduced=reduced)
    if isinstance(module, _ELEMENTS):
        same = x.shape == y.shape
        return Call(x, y, BINARY, isinstance(module, nn.BCELoss), reduced=reduced) if same else None
    return Call(x, y, None, variance=given.get("var") if isinstance(module, nn.GaussianNLLLoss) else None)


def _of_classes(x: Tensor, y: Tensor, ignore_index: int) -> Call | None:
    if x.dim() < 2:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    form = LAST if x.dim() == 2 else SECOND
    if y.is_floating_point():
        return Call(x, y, form) if x.shape == y.shape else None
    if y.shape != x.shape[:1] + x.shape[2:]:
        return None
    return Call(x, torch.where(y == ignore_index, IGNORED, y), form)


def by_row(targets: Tensor, form: Form, index: Tensor | None) -> Tensor:
    """Row by row, as the predictions: (n,), or (n, classes) for class probabilities; no view."""
    targets = targets.detach()
    if form.kind == "softmax" and targets.is_floating_point():
        return rows_of(targets, form, index).clone()
    flat = targets.reshape(-1).clone() if index is None else targets.reshape(-1)[index]
    return flat if form.kind == "softmax" else torch.stack((1 - flat, flat), -1).float()


def wanted(targets: Tensor, weight: Tensor | None, smoothing: float, like: Tensor) -> Tensor:
    """What a cross-entropy wants of each class, (n, classes): its targets, smoothed and weighted; 0 of ignored rows."""
    classes = like.shape[-1]
    if targets.dim() == 1:
        valid = ((targets >= 0) & (targets < classes))[:, None]
        b = (torch.arange(classes, device=like.device) == targets[:, None]).to(like.dtype)
    else:
        valid, b = torch.ones_like(targets[:, :1], dtype=torch.bool), targets.to(like.dtype)
    b = (1 - smoothing) * b + smoothing / classes * valid if smoothing else b
    return b if weight is None else b * weight.detach().to(like.dtype)


# ---- which output it was


class _Match(NamedTuple):
    """That a loss module judged an output.

    form: of the output, None of numbers. rows: those that are read, None for all. certain: a flag that only the device
    knows; None where it is sure. by_values: it got these, not the output's own memory.
    """

    form: Form | None
    rows: Tensor | None = None
    certain: Tensor | None = None
    by_values: bool = False


def hear(phases: Sequence[Phase], call: Call, training: bool) -> None:
    """A loss module was called: on an output that waits for its targets, or on the mean of its passes.

    phases: the last one first. What it says of classes is confirmed by the gradient, in training; where none will
    come, by the numbers: it got the very tensor, or, of the last output, the values.
    """
    waiting = [(phase, one) for phase in phases for one in reversed(phase.waiting)]
    if call.form is None:
        waiting.sort(key=lambda pair: not pair[1].numbers)
    for phase, one, match in _matches(waiting, call):
        if match is None:
            continue
        if call.form is None:
            _judge_numbers(phase, one, call, match.certain)
        elif training and one.in_graph:
            _suggest(one, call, match)
        else:
            _judge_classes(phase, one, call, match)
        return


def _matches(waiting: Sequence[tuple[Phase, Waiting]], call: Call) -> Iterator[tuple[Phase, Waiting, _Match | None]]:
    yield from ((phase, one, _same_tensor(one, call)) for phase, one in waiting)
    yield from ((phase, one, _same_values(one, call)) for phase, one in waiting[:1])


def _same_tensor(waiting: Waiting, call: Call) -> _Match | None:
    """The match, if a loss module was handed the output itself, or a view of all of it."""
    output = waiting.output()
    if output is None or version_of(output) != waiting.version:
        return None
    answers = YES if call.are_probabilities else BINARY
    judged = rows_view(call.input, call.form or BINARY)
    for form in (LAST, SECOND) if call.form is not None and call.form.kind == "softmax" else (answers,):
        if output.dim() > form.axis and same_memory(judged, rows_view(output, form)):
            return _Match(None) if call.form is None else _Match(form, waiting.pool.index(output, form))
    return None


def _same_values(waiting: Waiting, call: Call) -> _Match | None:
    """The match, if a loss module was handed the output's values, or those of its passes' mean."""
    if call.form is None:
        mean = waiting.numbers[0].mean.flatten() if waiting.numbers else waiting.pool.mean_number()
        return _by_values(None, None, [_equal(call, call.input.detach().flatten(), mean)])
    for form, predicted in waiting.predicted.items():
        if form.kind == call.form.kind and _sizes(call.input.shape, call.form) == _sizes(waiting.shape, form):
            rows, members = waiting.pool.index(call.input, form), waiting.pool.members(form)
            p = _probabilities(call, rows)
            means = [predicted.mean] if members is None else [predicted.mean, members.mean]
            return _by_values(form, rows, [_equal(call, p, mean) for mean in means])
    return None


def _by_values(form: Form | None, rows: Tensor | None, flags: Sequence[Tensor | None]) -> _Match | None:
    known = [flag for flag in flags if flag is not None]
    equal = torch.stack(known).any() if known else None
    is_equal = None if equal is None else decided(equal)
    if equal is None or is_equal is False:
        return None
    return _Match(form, rows, None if is_equal else equal, by_values=True)


def _suggest(waiting: Waiting, call: Call, match: _Match) -> None:
    assert call.form is not None
    assert match.form is not None
    targets = by_row(call.target, call.form, match.rows)
    waiting.candidates.append(Candidate(match.form, targets, call.weight, call.smoothing, call.reduced))


def _judge_classes(phase: Phase, waiting: Waiting, call: Call, match: _Match) -> None:
    assert call.form is not None
    for form in (LAST, SECOND, BINARY, YES):
        phase.settle_form(form.key, form == match.form, match.certain)
    phase.settle_form(NUMBERS, False, match.certain)
    if match.certain is None:
        phase.has_judged(waiting)
    targets = by_row(call.target, call.form, match.rows)
    row = calibration.compute(_probabilities(call, match.rows), targets, ignore_index=IGNORED)
    row = row if match.certain is None else row * match.certain
    phase.calibration.add(f"{SURE}|found", row, match.rows is not None)


def _judge_numbers(phase: Phase, waiting: Waiting, call: Call, certain: Tensor | None) -> None:
    for form in (LAST, SECOND, BINARY, YES):
        phase.settle_form(form.key, False, certain)
    phase.settle_form(NUMBERS, True, certain)
    given = call.variance.detach() if isinstance(call.variance, Tensor) else None
    for number in waiting.numbers:
        if number.key:  # GaussianNLLLoss says what the variance is
            equal = None if given is None else _equal(call, given.flatten(), number.variance.flatten())
            phase.settle_form(number.key, True, equal) if equal is not None else None
    sure = next((n.variance for n in waiting.numbers if n.is_normal and not n.key), None)
    variance = sure if given is None else given
    if given is not None and not waiting.numbers and given.shape == call.input.shape:
        phase.uncertainty.describe(f"{SURE}||{waiting.pool.where}", given, given)
    if variance is None:
        phase.say("calibration", NO_VARIANCE)
    elif call.target.is_floating_point() and _broadcast(call.input, variance, call.target):
        if certain is None:
            phase.has_judged(waiting)
        row = intervals.compute(call.input.detach(), variance, call.target.detach())
        phase.coverage.add(SURE, row if certain is None else row * certain)


def _probabilities(call: Call, index: Tensor | None) -> Tensor:
    """(n, classes) of what a loss module was handed, which are no numbers."""
    assert call.form is not None
    return probabilities_of(rows_of(call.input, call.form, index), YES if call.are_probabilities else call.form)


def _equal(call: Call, values: Tensor, expected: Tensor | None) -> Tensor | None:
    """A flag on the device: whether values are the same up to rounding; None where they are not comparable."""
    if expected is None or expected.shape != values.shape or expected.device != values.device:
        return None
    tolerance = TOLERANCE.get(call.input.dtype, _EQUAL)
    return (values - expected).abs().amax() <= tolerance * expected.abs().amax()


def _sizes(shape: torch.Size, form: Form) -> tuple[int, int]:
    return row_count(shape, form), class_count(shape, form)


def _broadcast(*tensors: Tensor) -> bool:
    try:
        torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    except RuntimeError:
        return False
    return True

"""Which output a loss module judged, and what its call tells of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.capture.predictions import forms
from torchprobe.capture.predictions.gradient import TOLERANCE
from torchprobe.capture.predictions.inputs import version_of
from torchprobe.capture.predictions.phase import Candidate, Phase, Waiting
from torchprobe.capture.predictions.pool import NUMBERS
from torchprobe.capture.predictions.targets import Call, by_row
from torchprobe.probes.evidence import SURE
from torchprobe.statistics import calibration, intervals, uncertainty

NO_VARIANCE = (
    "the model predicts numbers without a variance, so that there is no interval to judge: return one beside the mean, "
    "such as a field called variance, or train with nn.GaussianNLLLoss()"
)
EACH = (
    "calibration without gradients: a loss module with reduction='none' judged the model's output, which does not tell "
    "what counts, as examples may be masked afterwards: use one that returns a mean, with ignore_index= or of what "
    "counts alone, or call session.log_predictions(probs, targets)"
)
_ROUNDED = 1e-5
_EQUAL = 1e-3  # of the largest value: as far as two ways to compute one number in float32 lie apart


class _Match(NamedTuple):
    """That a loss module judged an output.

    form: of the output, None of numbers. rows: those that are read, None for all. certain: a flag that only the device
    knows; None where it is sure. kept: a flag for each row, where not all were judged. own: a flag, where it may have
    been the mean of several passes that was judged: whether it was this one's own prediction. predicted: by all passes.
    """

    form: forms.Form | None
    rows: Tensor | None = None
    certain: Tensor | None = None
    kept: Tensor | None = None
    own: Tensor | None = None
    predicted: Tensor | None = None


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
        if match.form is None:
            _judge_numbers(phase, one, call, match.certain)
        elif training and one.in_graph:
            how = call.weight, call.smoothing, call.reduced, match.own, match.certain
            one.candidates.append(Candidate(match.form, _targets(call, match), *how))
        else:
            p = _probabilities(call, match.rows) if match.predicted is None else match.predicted
            _judge_classes(phase, one, match.form, p, _targets(call, match), match.certain, call.reduced)
        return


def _matches(waiting: Sequence[tuple[Phase, Waiting]], call: Call) -> Iterator[tuple[Phase, Waiting, _Match | None]]:
    yield from ((phase, one, _same_tensor(one, call)) for phase, one in waiting)
    yield from ((phase, one, _same_values(one, call)) for phase, one in waiting[:1])
    yield from ((phase, one, _same_steps(one, call)) for phase, one in waiting[:1])


def _same_tensor(waiting: Waiting, call: Call) -> _Match | None:
    """The match, if a loss module was handed the output itself, or a view of all of it."""
    output = waiting.output()
    if output is None or version_of(output) != waiting.version:
        return None
    answers = forms.YES if call.are_probabilities else forms.BINARY
    judged = forms.by_row(call.input, call.form or forms.BINARY)
    for form in (forms.LAST, forms.SECOND) if call.form is not None and call.form.kind == "softmax" else (answers,):
        if output.dim() > form.axis and forms.same_memory(judged, forms.by_row(output, form)):
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
            of_all = (None, None) if members is None else (members.mean, members.of_mean_logits)
            own, of_mean, of_logits = (_equal(call, p, x) for x in (predicted.mean, *of_all))
            match = _by_values(form, rows, [own, of_mean, of_logits])
            if match is not None and waiting.pool.passes > 1:
                match = match._replace(own=own)
            if match is None or members is None or own is None or of_mean is None or of_logits is None:
                return match
            return match._replace(predicted=torch.where(own | of_mean, p, members.mean))
    return None


def _same_steps(waiting: Waiting, call: Call) -> _Match | None:
    """The match, if a loss module was handed the values of a sequence's first steps, or of its last: all but one, which
    predict the next or the one before, or the last alone. The output itself may be gone: what it predicted tells.
    """
    predicted, shape = waiting.predicted.get(forms.LAST), waiting.shape
    if predicted is None or call.form is None or call.form.kind != "softmax" or len(shape) != 3 or shape[1] < 2:
        return None
    count, classes = _sizes(call.input.shape, call.form)
    steps, rest = divmod(count, shape[0])
    if rest or classes != shape[2] or not 0 < steps < shape[1]:
        return None
    index = waiting.pool.index(call.input, forms.LAST)
    at = torch.arange(len(predicted.mean), device=predicted.mean.device) if index is None else index
    example, step = at.div(shape[1], rounding_mode="floor"), at % shape[1]
    ways = []
    for first in (0, shape[1] - steps):
        kept = (step >= first) & (step < first + steps)
        rows = example * steps + (step - first).clamp(0, steps - 1)
        away = (_probabilities(call, rows) - predicted.mean).abs().amax(-1).where(kept, 0.0)
        ways.append((away.amax() <= _ROUNDED * predicted.mean.amax(), rows, kept))
    (is_next, *of_next), (is_last, *of_last) = ways
    rows, kept = (torch.where(is_next, a, b) for a, b in zip(of_next, of_last, strict=True))
    match = _by_values(forms.LAST, rows, [is_next, is_last])
    return match and match._replace(kept=kept)


def _by_values(form: forms.Form | None, rows: Tensor | None, flags: Sequence[Tensor | None]) -> _Match | None:
    known = [flag for flag in flags if flag is not None]
    equal = torch.stack(known).any() if known else None
    is_equal = None if equal is None else forms.decided(equal)
    if equal is None or is_equal is False:
        return None
    return _Match(form, rows, None if is_equal else equal)


def _targets(call: Call, match: _Match) -> Tensor:
    """Row by row of what was predicted; those of rows that were not judged are left out."""
    assert call.form is not None
    targets = by_row(call.target, call.form, match.rows)
    if match.kept is None:
        return targets
    if targets.dim() == 1:
        return targets.where(match.kept, forms.IGNORED)
    return targets.where(match.kept[:, None], torch.nan)


def settle(phase: Phase) -> None:
    """No gradient came: what loss modules were handed counts as in validation."""
    for one in list(phase.waiting):
        first = [call for call in one.candidates[:1] if call.form in one.predicted]
        one.candidates.clear()  # asked for once
        for call in first:
            flags = [flag for flag in (call.certain, call.own) if flag is not None]
            certain = torch.stack(flags).all() if flags else None
            p = one.predicted[call.form].mean
            _judge_classes(phase, one, call.form, p, call.targets, certain, call.reduced)


def _judge_classes(
    phase: Phase,
    waiting: Waiting,
    form: forms.Form,
    p: Tensor,
    targets: Tensor,
    certain: Tensor | None,
    reduced: bool,
) -> None:
    for other in (forms.LAST, forms.SECOND, forms.BINARY, forms.YES):
        phase.settle_form(other.key, other == form, certain)
    phase.settle_form(NUMBERS, False, certain)
    if certain is None:
        phase.has_judged(waiting)
    if not reduced:
        phase.say("loss", EACH)
        return
    row = calibration.compute(p, targets, ignore_index=forms.IGNORED)
    phase.calibration.add(f"{SURE}|found", _if_certain(row, certain), waiting.pool.sampled(form))


def _judge_numbers(phase: Phase, waiting: Waiting, call: Call, certain: Tensor | None) -> None:
    for form in (forms.LAST, forms.SECOND, forms.BINARY, forms.YES):
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
        row = uncertainty.compute(uncertainty.Decomposition(given, given, None))
        phase.uncertainty.add(f"{SURE}||{waiting.pool.where}", _if_certain(row, certain))
    if variance is None:
        phase.say("calibration", NO_VARIANCE)
    elif not call.reduced:
        phase.say("loss", "" if waiting.in_graph else EACH)
    elif call.target.is_floating_point() and _broadcast(call.input, variance, call.target):
        if certain is None:
            phase.has_judged(waiting)
        row = intervals.compute(call.input.detach(), variance, call.target.detach())
        phase.coverage.add(SURE, _if_certain(row, certain))


def _if_certain(row: Tensor, certain: Tensor | None) -> Tensor:
    """Zeros, which add nothing, where the device finds that something else was judged."""
    return row if certain is None else row * certain


def _probabilities(call: Call, index: Tensor | None) -> Tensor:
    """(n, classes) of what a loss module was handed, which are no numbers."""
    assert call.form is not None
    rows = forms.rows_of(call.input, call.form, index)
    return forms.probabilities_of(rows, forms.YES if call.are_probabilities else call.form)


def _equal(call: Call, values: Tensor, expected: Tensor | None) -> Tensor | None:
    """A flag on the device: whether values are the same up to rounding; None where they are not comparable."""
    if expected is None or expected.shape != values.shape or expected.device != values.device:
        return None
    tolerance = TOLERANCE.get(call.input.dtype, _EQUAL)
    return (values - expected).abs().amax() <= tolerance * expected.abs().amax()


def _sizes(shape: torch.Size, form: forms.Form) -> tuple[int, int]:
    return forms.row_count(shape, form), forms.class_count(shape, form)


def _broadcast(*tensors: Tensor) -> bool:
    try:
        torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    except RuntimeError:
        return False
    return True

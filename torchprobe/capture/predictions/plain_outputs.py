"""How a plain output is read: as class scores of one form or another, as numbers, or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchprobe.capture.outputs import tensors_in
from torchprobe.capture.predictions.forms import (
    BINARY,
    FEW_CLASSES,
    FEW_ROWS,
    LAST,
    Form,
    Generators,
    Predicted,
    are_places,
    is_usable,
    members_of,
    possible_forms,
    row_count,
)
from torchprobe.capture.predictions.gradient import TOLERANCE
from torchprobe.capture.predictions.graph import between, place_of
from torchprobe.capture.predictions.phase import Phase
from torchprobe.capture.predictions.pool import NUMBERS, Pool
from torchprobe.capture.predictions.reading import Reading, losses_in, read
from torchprobe.probes.evidence import SURE
from torchprobe.probes.uncertainty import Uncertainty
from torchprobe.statistics.dtypes import row_dtype

NO_TARGETS = (
    "the model returns a mean and a variance, but no target was seen: of functional losses a Gaussian likelihood alone "
    "tells them, by its gradients at both; use nn.GaussianNLLLoss(), or nn.MSELoss() on the mean, made before training"
)
_NO_PREDICTIONS = (
    "the model returns its loss, or other numbers, and no predictions: return these beside it, or instrument the "
    "module inside that gives them"
)
_FIRST_ALONE = (
    "of the model's several outputs, which have different shapes, the first alone is looked at, and its gradient was "
    "that of no cross-entropy: return predictions first, or call session.log_predictions(probs, targets)"
)
DETACHED = "the model returns an output outside of its loss's graph: return it inside, or hand the model its labels="
_ALL_AGAIN = 10  # sampled steps
_NEVER = "?"  # the form of what nothing confirms
# Operations that only add, and of how many operands with a graph: more of them have learned weights.
_ADDS = dict.fromkeys(map("{}Backward".format, ("Add", "Sub", "Stack", "Cat", "Logaddexp", "IndexPut")), math.inf)
_ADDS |= {"torch::autograd::CopySlices": math.inf, "LerpBackward": 2}


class PlainOutputs:
    """Feeds plain outputs to their pools, in every way that they may be read.

    options: what the user says of them. settled: which ways are worth a sampled step's time.
    """

    def __init__(self, options: Uncertainty, settled: Settled, generators: Generators) -> None:
        self._options = options
        self._generators = generators
        self._gated: set[str] = set()  # lists whose outputs were seen to be weighed: without a graph nothing tells
        self.settled = settled

    def members(self, tensor: Tensor) -> Sequence[Tensor]:
        """The samples that an output consists of, or the output."""
        return members_of(tensor, self._options.sample_dim)

    def add(
        self, phase: Phase, pool: Pool, plain: Tensor, reading: Reading, inputs: Sequence[Tensor]
    ) -> dict[Form, Predicted]:
        """What a plain output predicts, by form."""
        members = self.members(plain)
        known = self._known_form(reading, members[0])
        possible = [known] if known else self._forms(phase, members[0], inputs)
        forms = self.settled.of(possible) if phase.training else possible
        folded = not known and len(members) == 1 and _is_folded(plain, inputs)
        if folded:
            phase.say("uncertainty", _folded(plain))
        pool.has_places(are_places(members[0].shape, inputs))
        predicted = {}
        for form in forms:
            name = _NEVER if folded else SURE if known else form.key
            predicted[form] = pool.add_classes(name, form, [pool.rows(member, form) for member in members])
        if not known and not reading.says_something and len(forms) == len(possible):
            pool.add_numbers(SURE if self._options.task == "regression" else NUMBERS, members)
        return predicted

    def add_ensemble(self, phase: Phase, name: str, outputs: Sequence[Any], root: Any) -> None:
        """Members whose mean the model itself gives, of logits, of probabilities or of numbers with variances."""
        readings = [read(output) for output in outputs]
        whole = read(root)
        mean = whole.numbers[0].mean if whole.numbers else None
        numbers = [reading.numbers[0] for reading in readings if reading.numbers and not reading.numbers[0].key]
        means = [number.mean for number in numbers if number.mean is not None]
        members = [reading.plain for reading in readings if reading.plain is not None and is_usable(reading.plain)]
        if not _only_adds([x for x in (whole.plain, mean) if x is not None], [*members, *means]):
            self._gated.add(name)
        if name in self._gated:
            return
        if len(means) == len(readings) and mean is not None:
            pool = Pool(name, None, self._generators)
            pool.add_numbers(SURE, means, [number.variance for number in numbers])
            _settle(phase, pool, _is_mean_of(mean, means))
        if whole.plain is None or len(members) != len(readings):
            return
        pool = Pool(name, None, self._generators)
        for form in possible_forms(members[0], []) if members[0].dim() != 3 else [LAST]:
            pool.add_classes(form.key, form, [pool.rows(member, form) for member in members])
        pool.add_numbers(NUMBERS, members)
        _settle(phase, pool, _is_mean_of(whole.plain, members))

    def _known_form(self, reading: Reading, member: Tensor) -> Form | None:
        if reading.form == "binary":
            return BINARY
        several = member.dim() > 1 and member.shape[-1] > 1
        if reading.form == "logits" and several:
            return LAST
        return (LAST if several else BINARY) if self._options.task == "classification" and member.dim() else None

    def _forms(self, phase: Phase, member: Tensor, inputs: Sequence[Tensor]) -> list[Form]:
        if self._options.task == "regression":
            return []
        if self._options.sample_dim is not None and member.dim() > 1 and member.shape[-1] > 1:
            return [LAST]
        forms = possible_forms(member, inputs)
        few = _too_few(member, forms)
        phase.say("uncertainty", few and f"{few}Uncertainty(task='classification')")
        phase.say("calibration", few and f"{few}call session.log_predictions(probs, targets)")
        if member.dim() > 2 and not are_places(member.shape, inputs):
            phase.say("uncertainty", _doubt(member))
        return forms


class Settled:
    """Spares a sampled step what was decided against; in every tenth all possible forms are judged again.

    known: the key of the one form that was recognised, or None. That form itself is judged at every sampled step, so
    that it is known no longer once the loss is another one. Asked between steps, so that all passes of a step agree.
    """

    def __init__(self, known: Callable[[], str | None]) -> None:
        self._known = known
        self._key: str | None = None
        self._turn = 0

    def next_step(self) -> None:
        """A sampled training step is over."""
        self._turn = (self._turn + 1) % _ALL_AGAIN
        self._key = self._known() if self._turn else None

    def of(self, possible: Sequence[Form]) -> Sequence[Form]:
        """The form that was recognised, if it is among these; else all of them."""
        return [form for form in possible if form.key == self._key] or possible


def lines_of(reading: Reading, output: Any) -> Iterator[tuple[str, str]]:
    """What of an output is looked at and waits for a loss to confirm it, by probe."""
    if reading.note and reading.plain is None and not reading.says_something:
        yield "uncertainty", "the model returns a distribution of which torch knows no variance"
    nothing = not (reading.says_something or reading.numbers or reading.heads)
    if nothing and (reading.plain is None or not reading.plain.dim()) and losses_in(output):
        yield from (("uncertainty", _NO_PREDICTIONS), ("calibration", _NO_PREDICTIONS))
    elif nothing and reading.plain is not None and any(_may_predict(reading.plain, x) for x in tensors_in(output)):
        yield from (("uncertainty", _FIRST_ALONE), ("calibration", _FIRST_ALONE))
    if reading.guesses:
        names = ", ".join(reading.guesses)
        yield (
            "uncertainty",
            f"the model returns {names}, which has other meanings too: it counts as uncertainty once a Gaussian or "
            "evidential likelihood of it is trained; call it variance, or return a torch.distributions object",
        )
    if any(number.key in ("", *reading.guesses) for number in reading.numbers):
        yield "calibration", NO_TARGETS


def _may_predict(first: Tensor, other: Tensor) -> bool:
    """Whether another output has rows of the same examples, too."""
    return other is not first and other.is_floating_point() and other.dim() > 1 and other.shape[0] == len(first)


def _settle(phase: Phase, pool: Pool, flag: Tensor | None) -> None:
    """Rows of members that a flag says are such; without it there are none."""
    if flag is not None:
        for name, row, sampled in pool.settle():
            phase.uncertainty.add(name, row * flag, sampled)


def _is_mean_of(output: Tensor, members: Sequence[Tensor]) -> Tensor | None:
    """A flag: whether an output is the mean of its members' logits or probabilities. Stacked ones alone are heads."""
    if any(member.shape != output.shape for member in members):
        return None
    wide = [member.detach().to(row_dtype(member.device)) for member in members]
    out, loose = output.detach().to(wide[0].dtype), TOLERANCE.get(output.dtype, 1e-4)
    means = [torch.stack(wide).mean(0)]
    if output.dim() > 1 and output.shape[-1] > 1:
        of_probabilities = torch.stack([member.softmax(-1) for member in wide]).mean(0)
        means += [of_probabilities, of_probabilities.log()]
    return torch.stack([(out - mean).abs().amax() <= loose * mean.abs().amax() for mean in means]).any()


def _only_adds(whole: Sequence[Tensor], members: Sequence[Tensor]) -> bool:
    """Whether nothing on the way from the members has learned weights, as a gate has, as far as a graph is there."""
    ways = (between(whole, place_of(member)) for member in members)
    return all(n <= _ADDS.get(name, 1) for way in ways for name, n in way)


def _is_folded(tensor: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether there are several rows for each one of the input, which may be members of one prediction."""
    if tensor.dim() < 2 or not inputs:
        return False
    n = tensor.shape[0]
    lengths = {x.shape[:k].numel() for x in inputs for k in range(1, x.dim() + (not x.is_floating_point()))}
    return n not in lengths and any(x.dim() > 0 and n > len(x) > 0 and n % len(x) == 0 for x in inputs)


def _folded(tensor: Tensor) -> str:
    return (
        f"the model's output has {len(tensor)} rows, several for each one of its input: where these are members of one "
        "prediction, return (members, batch, ...) and say Uncertainty(sample_dim=0); where they are not, say "
        "Uncertainty(task='classification')"
    )


def _doubt(tensor: Tensor) -> str:
    """Of a plain tensor whose dimensions can be several things: what settles it."""
    return (
        f"the model's output is a plain tensor of shape {tuple(tensor.shape)}, whose first dimensions can be samples, "
        "batch or time: Uncertainty(sample_dim=0) says that the first one is samples, "
        "Uncertainty(task='classification') that the last one is classes"
    )


def _too_few(tensor: Tensor, forms: Sequence[Form]) -> str:
    """Why a gradient would not tell which of the forms an output has, and what would; empty where it does."""
    form = next((form for form in forms if form in (LAST, BINARY)), None)
    if form is None or row_count(tensor.shape, form) >= FEW_ROWS or (form == LAST and tensor.shape[-1] > FEW_CLASSES):
        return ""
    classes = tensor.shape[-1] if form == LAST else 2
    return (
        f"the gradients of fewer than {FEW_ROWS} predictions of {classes} classes may be those of any loss: use a loss "
        "module such as nn.CrossEntropyLoss(), hand the model its labels=, or "
    )

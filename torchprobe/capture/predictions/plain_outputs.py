"""How a plain output is read: as class scores of one form or another, as numbers, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchprobe.capture.predictions.forms import (
    BINARY,
    FEW_CLASSES,
    FEW_ROWS,
    LAST,
    Form,
    Generators,
    Predicted,
    is_one_of,
    members_of,
    possible_forms,
    row_count,
)
from torchprobe.capture.predictions.phase import Phase
from torchprobe.capture.predictions.pool import NUMBERS, Pool
from torchprobe.capture.predictions.reading import Reading, read
from torchprobe.probes.evidence import SURE
from torchprobe.probes.uncertainty import Uncertainty

_ALL_AGAIN = 10  # sampled steps


class PlainOutputs:
    """Feeds plain outputs to their pools, in every way that they may be read.

    options: what the user says of them. settled: which ways are worth a sampled step's time.
    """

    def __init__(self, options: Uncertainty, settled: Settled, generators: Generators) -> None:
        self._options = options
        self._generators = generators
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
        predicted = {
            form: pool.add_classes(SURE if known else form.key, form, [pool.rows(member, form) for member in members])
            for form in forms
        }
        if not known and not reading.says_something and len(forms) == len(possible):
            pool.add_numbers(SURE if self._options.task == "regression" else NUMBERS, members)
        return predicted

    def add_ensemble(self, phase: Phase, name: str, outputs: Sequence[Any], root: Tensor | None) -> None:
        """Members that say what they predict, or give what the model itself gives, alone or stacked."""
        readings = [read(output) for output in outputs]
        pool = Pool(name, None, self._generators)
        means = [reading.mean for reading in readings if reading.mean is not None]
        variances = [reading.variance for reading in readings if reading.variance is not None]
        if len(means) == len(variances) == len(readings):
            pool.add_numbers(SURE, means, variances)
        members = [reading.plain for reading in readings if reading.plain is not None]
        if root is not None and len(members) == len(readings) and all(is_one_of(plain, root) for plain in members):
            for form in possible_forms(members[0], []) if members[0].dim() != 3 else [LAST]:
                pool.add_classes(form.key, form, [pool.rows(member, form) for member in members])
            pool.add_numbers(NUMBERS, members)
        phase.settle_pool(pool)

    def _known_form(self, reading: Reading, member: Tensor) -> Form | None:
        if reading.form == "binary":
            return BINARY
        several = member.dim() > 1 and member.shape[-1] > 1
        if reading.form in ("logits", "probabilities") and several:
            return LAST
        return (LAST if several else BINARY) if self._options.task == "classification" and member.dim() else None

    def _forms(self, phase: Phase, member: Tensor, inputs: Sequence[Tensor]) -> list[Form]:
        if self._options.task == "regression":
            return []
        if self._options.sample_dim is not None and member.dim() > 1 and member.shape[-1] > 1:
            return [LAST]
        forms = possible_forms(member, inputs)
        few = _too_few(member, forms)
        phase.unread = few and f"{few}Uncertainty(task='classification')"
        phase.cannot_judge = few and f"{few}call session.log_predictions(probs, targets)"
        if LAST not in forms and BINARY not in forms:
            phase.unread = _doubt(member)
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

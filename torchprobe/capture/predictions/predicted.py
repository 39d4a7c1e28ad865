"""Rows of a plain output as predictions: what is kept of an output until its targets are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.capture.predictions.forms import Form, are_distributions


class Predicted(NamedTuple):
    """(samples, n, classes) in all, two classes for yes and no; nothing of it shares memory that the user may write to.

    probabilities: as predicted. softmax: of the rows as logits, of which a loss's gradient tells; mostly the same
    tensor. largest: (samples, n), of each row. already: (samples, n), whether all rows were probabilities.
    """

    probabilities: Tensor
    softmax: Tensor
    largest: Tensor
    already: Tensor

    @classmethod
    def of(cls, members: Sequence[Tensor], form: Form) -> Predicted:
        """From each sample's rows, (n, classes) or (n, 1)."""
        parts = [_of_member(rows, form) for rows in members]
        return cls(
            *(column[0][None] if len(parts) == 1 else torch.stack(column) for column in zip(*parts, strict=True))
        )

    @property
    def mean(self) -> Tensor:
        """(n, classes): the samples' mean prediction."""
        return self.probabilities[0] if len(self.probabilities) == 1 else self.probabilities.mean(0)


def probabilities_of(rows: Tensor, form: Form) -> Tensor:
    """(n, classes) probabilities; rows that are such already stay."""
    return _of_member(rows, form)[0]


def known(flags: Tensor) -> bool:
    """Whether all flags are set, where looking waits for nothing: on the CPU. Elsewhere it is never known."""
    in_host_memory = type(flags) is Tensor and flags.is_cpu and not torch.compiler.is_compiling()
    return in_host_memory and bool(flags.numpy().all())  # just computed there: nothing waits


def _of_member(rows: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    already = are_distributions(rows[:1])
    if form.kind == "sigmoid":
        yes_or_no = torch.cat((rows.neg().sigmoid(), rows.sigmoid()), -1)
        return yes_or_no, yes_or_no, yes_or_no[:, 0], already.expand(len(rows))
    softmax = probabilities = rows.softmax(-1)
    if not known(~already):  # the first row may be one
        already = are_distributions(rows)
        probabilities = torch.where(already, rows, softmax)
    return probabilities, softmax, rows.amax(-1), already.expand(len(rows))

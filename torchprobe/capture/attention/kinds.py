"""What tensors of a written-out attention are known to be: the tags of `handwritten`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchprobe.capture.attention.observer import Call
from torchprobe.capture.attention.reading import Reading
from torchprobe.capture.attention.subscripts import EITHER, Roles

LEARNED = object()
"""Made from parameters alone."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Logits. roles: where the queries and the keys can be. columns: how many are of keys, where sink logits stand
    after them; shifts: what was taken off each row, (…, 1), which changes no softmax but the logits."""

    call: Call
    roles: Roles = EITHER
    columns: int | None = None
    shifts: tuple[Tensor, ...] = ()


@dataclass(slots=True)
class Pending:
    """A softmax of logits, until its weights are used: then its reading, or why there is none, is taken out."""

    call: Call
    reading: Reading | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """Attention weights. axis: where the keys are, counted from the end."""

    pending: Pending
    axis: int = -1


@dataclass(frozen=True, slots=True)
class LogWeights:
    """The logarithm of attention weights, which are its exponential."""

    weights: Weights


@dataclass(frozen=True, slots=True)
class Exponentials:
    """exp(logits), which are weights once they are divided by their sum; multiplied: with values, before that."""

    pending: Pending
    multiplied: bool = False


@dataclass(frozen=True, slots=True)
class Normaliser:
    """The sum of exponentials over the keys."""

    pending: Pending

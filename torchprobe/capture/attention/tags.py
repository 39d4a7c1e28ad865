"""What is known of the tensors of the running pass. Holds none of them alive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import Tensor

from torchprobe.capture.attention.functions import EITHER, Roles
from torchprobe.capture.attention.observer import Call
from torchprobe.capture.attention.sites import Reading

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
class Total:
    """The sum of exponentials over the keys."""

    pending: Pending


class Tags:
    """Tags on tensors, by identity. A tag goes with its tensor."""

    def __init__(self) -> None:
        self._tags: dict[int, tuple[ref[Tensor], Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._tags)

    def put(self, tensor: Tensor, tag: Any) -> None:
        """Tag a tensor, in place of any earlier tag."""
        tags, key = self._tags, id(tensor)

        def forget(dead: ref[Tensor]) -> None:
            if key in tags and tags[key][0] is dead:  # another tensor may have the address by now
                del tags[key]

        tags[key] = (ref(tensor, forget), tag)

    def of(self, value: Any) -> Any:
        """The tag of a tensor, or None."""
        found = self._tags.get(id(value))
        return None if found is None or found[0]() is not value else found[1]

    def among(self, values: Iterable[Any]) -> Iterator[tuple[Tensor, Any]]:
        """Those of some arguments that are tagged tensors, and those in an argument that is a list or tuple."""
        for value in values:
            for item in value if type(value) in (list, tuple) else (value,):
                tag = self.of(item)
                if tag is not None:
                    yield item, tag

    def clear(self) -> None:
        """Forget everything: the pass is over."""
        self._tags.clear()

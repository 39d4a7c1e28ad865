"""What is known of weights, and of what becomes weights, between a softmax and the product that uses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchprobe.capture.attention.arrange import Arrangement
from torchprobe.capture.attention.labels import Root
from torchprobe.capture.attention.observer import Call
from torchprobe.capture.attention.sites import Reading

Kind = Literal["weights", "logarithms", "exponentials", "total"]


class Pending:
    """A softmax of logits, until its weights are used: then its reading, or why there is none, is taken out.

    arranged: its logits. keys: what its dimension counts.
    """

    def __init__(
        self,
        call: Call,
        reading: Reading | None,
        arranged: Arrangement | None,
        reason: str | None,
        keys: frozenset[Root] = frozenset(),
    ) -> None:
        self.call, self.reading, self.arranged, self.reason, self.keys = call, reading, arranged, reason, keys
        self.taken = False

    def take(self) -> bool:
        """Its weights are used: whether for the first time."""
        first, self.taken = not self.taken, True
        return first


@dataclass(frozen=True, slots=True)
class Flow:
    """What a tensor holds of one softmax or several.

    changed: whether values are others than a softmax gives. refused: why they cannot be read, changed as they are.
    multiplied: with values, before the sum. dropped: whether dropout has been there. used: a reading of it.
    """

    kind: Kind
    pending: tuple[Pending, ...]
    changed: bool = False
    refused: str | None = None
    multiplied: bool = False
    dropped: bool = False
    used: Reading | None = None

    @property
    def first(self) -> Pending:
        """The softmax that was met first."""
        return self.pending[0]

"""What is known of weights, and of what becomes weights, between a softmax and the product that uses them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention.arrange import Arrangement
from torchprobe.capture.attention.labels import Root
from torchprobe.capture.attention.observer import Call
from torchprobe.capture.attention.sites import Reading
from torchprobe.capture.attention.tape import Node

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

    def as_changed(self, reason: str | None) -> Flow:
        """The same with other values; reason: why these cannot be read."""
        return replace(self, changed=True, refused=self.refused or reason)


def back(node: Node) -> Iterator[Node]:
    """A tensor that holds weights, and those that they came from."""
    while node is not None:
        yield node
        node = next((one for one in node.inputs if one.flow is not None), None)  # type: ignore[assignment]


def keeps(node: Node, source: Node) -> bool:
    """Whether values are the same, wherever they are."""
    return node.func in fn.SAME or node.func in fn.RESHAPES or (source in node.sharing and not _is_in_place(node))


def _is_in_place(node: Node) -> bool:
    return bool(node.args) and isinstance(node.args[0], Node) and fn.is_in_place(node.func)

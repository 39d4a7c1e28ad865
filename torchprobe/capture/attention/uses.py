"""What is known of weights between a softmax and their use; and what single calls on the way are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention.functions import Product
from torchprobe.capture.attention.labels import Root
from torchprobe.capture.attention.layout import Arrangement
from torchprobe.capture.attention.observer import Call
from torchprobe.capture.attention.sites import Reading
from torchprobe.capture.attention.tape import Args, Kwargs, Node, Tape

Kind = Literal["weights", "logarithms", "exponentials", "total"]


@dataclass(eq=False, slots=True)
class Pending:
    """A softmax of logits, until its weights are used: then its reading, or why there is none, is taken out.

    arranged: its logits. keys: what its dimension counts.
    """

    call: Call
    reading: Reading | None
    arranged: Arrangement | None
    reason: str | None
    keys: frozenset[Root]
    taken: bool = False

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
    changes = bool(node.args) and isinstance(node.args[0], Node) and fn.is_in_place(node.func)
    return node.func in fn.SAME or node.func in fn.RESHAPES or (source in node.sharing and not changes)


MIXED = "whose weights are mixed by parameters, so that some may be negative"
_NEARLY_NOTHING = 1e-6  # what is added to a sum so that nothing is divided by 0
_FEW = 8  # calls between random numbers and what they drop


def drops(node: Node, flow: Flow) -> bool:
    """Whether a call multiplies weights with random numbers alone, or with the number that makes up for that."""
    if flow.kind != "weights" or node.func not in fn.FILLS | fn.MULTIPLICATIONS | fn.DIVISIONS | fn.CHOICES:
        return False
    others = [one for one in node.inputs if one.flow is None]
    if not others:
        return flow.dropped and len(node.inputs) == 1
    return all(map(_is_drawn, others))


def _is_drawn(node: Node) -> bool:
    """Whether it is made of random numbers, whose chances depend on nothing."""
    for _ in range(_FEW):
        before = node.inputs
        if node.func in fn.RANDOM:
            return node.func in fn.RANDOM_LIKE or not before or not before[0].inputs or before[0].func in fn.LIKE
        if len(before) != 1:
            return False
        node = before[0]
    return False


def may_be_scores(node: Node, product: Product) -> bool:
    """An activation times a parameter is a layer; parameters may come first, or stand in an einsum."""
    left, right = product.factors
    if left.const and right.const:
        return False
    return not right.const or node.func in fn.EINSUMS


def hold_places(node: Node, args: Args, kwargs: Kwargs) -> None:
    """Where a write went, which may be changed in place soon after."""
    key = kwargs.get("index", args[2 if node.func in fn.INDEX_COPIES else 1] if len(args) > 2 else None)
    keys = key if isinstance(key, tuple | list) else (key,)
    found = [one for one in keys if isinstance(one, Tensor) and one.dim() == 1 and one.dtype is torch.int64]
    if len(found) == 1:
        node.hold(found[0].detach().clone())


def tensor_of(tape: Tape, node: Node, args: Args, kwargs: Kwargs) -> Tensor | None:
    """The tensor among a call's arguments that a node stands for."""
    values = [*args, *kwargs.values()]
    values += [one for value in values if isinstance(value, tuple | list) for one in value]
    return next((value for value in values if isinstance(value, Tensor) and tape.known(value) is node), None)


def strayed(all_pending: Iterable[Pending]) -> Iterator[str]:
    """Why weights are not read that met something else when it was not known any more what their keys are."""
    for pending in all_pending:
        if pending.take():
            yield pending.reason or f"the attention of {pending.call.caller.name}, whose weights are rearranged"


def mixed(product: Product, which: int, flow: Flow) -> Flow:
    """After weights were multiplied with something else than values, over another dimension than the keys."""
    others = [factor for i, factor in enumerate(product.factors) if i != which]
    learned = any(factor.learned or not factor.const for factor in others)
    return flow.as_changed(MIXED if learned else None)


def pointwise(node: Node, source: Node, flow: Flow) -> Flow | None:
    """Weights are changed, or multiplied with values that are summed later."""
    if flow.kind == "total":
        tiny = [value for value in (*node.args[1:], *node.kwargs.values()) if not isinstance(value, Node)]
        small = tiny and all(isinstance(x, int | float) and abs(x) <= _NEARLY_NOTHING for x in tiny)
        return flow if small and len(node.inputs) == 1 else flow.as_changed(None)
    grows = node.dims > source.dims or any(b > a for a, b in zip(source.shape[::-1], node.shape[::-1], strict=False))
    if grows and node.func in fn.MULTIPLICATIONS and flow.kind == "weights":
        return replace(flow, multiplied=True)
    if node.func in fn.DIFFERENCES:
        return flow.as_changed("whose weights are subtracted")
    return flow.as_changed(None)

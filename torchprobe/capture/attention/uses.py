"""What is known of weights between a softmax and their use; and what single calls on the way are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention.functions import Product
from torchprobe.capture.attention.labels import Factor, Indices, Label, Root, Shape, leaves
from torchprobe.capture.attention.layout import Arrangement
from torchprobe.capture.attention.observer import Call, Observer
from torchprobe.capture.attention.places import coordinates, of_factors
from torchprobe.capture.attention.sites import INSIDE_GRAPH, Caller, Reading, common_owner
from torchprobe.capture.attention.tape import Args, Kwargs, Node, Tape

Kind = Literal["weights", "logarithms", "exponentials", "total", "output"]


@dataclass(eq=False, slots=True)
class Pending:
    """A softmax of logits, until its weights are used: then its reading, or why there is none, is taken out.

    arranged: its logits. keys: what its dimension counts. of: its logits, and which dimension that is. used: of all
    weights but along the keys, which are used with values so far; whole: whether all. name: of the module that does;
    None inside a compiled graph, which is read elsewhere.
    """

    call: Call
    reading: Reading | None
    arranged: Arrangement | None
    reason: str | None
    keys: frozenset[Root]
    of: tuple[Node, int] | None = None
    taken: bool = False
    used: NDArray[np.bool_] | None = None
    whole: bool = False
    name: str | None = None

    def take(self, name: str | None) -> None:
        """It is used, or refused, in this module."""
        self.taken, self.name = True, name

    def is_new(self, node: Node, label: Label, axis: int | None) -> bool:
        """Weights are used, with keys along the dimension `axis`: whether some for the first time."""
        of, keys = self.of or (None, 0)
        whole = None if of is None else of.label
        if (axis, of, keys) not in node.kept:
            node.kept[axis, of, keys] = None if axis is None or whole is None else _part(whole, keys, label, axis)
        part: list[Indices] | None = node.kept[axis, of, keys]
        if part is None or whole is None:
            before, self.whole = self.whole, True
            return not before
        index = np.ix_(*part)
        self.used = np.zeros([f.size for f in _digits(whole, keys)], np.bool_) if self.used is None else self.used
        new = not (self.whole or self.used[index].all())
        self.used[index] = True
        self.whole = self.whole or bool(self.used.all())
        return new

    def because(self, reason: str) -> str:
        """Why it is not read, said with whose it is."""
        return f"the attention of {self.call.caller.name}, {reason}"


def _digits(whole: Label, keys: int) -> list[Factor]:
    """What weights have besides the keys."""
    return [factor for i, dim in enumerate(whole.dims) if i != keys for factor in dim]


def _part(whole: Label, keys: int, label: Label, axis: int) -> list[Indices] | None:
    """Of each digit that weights have besides the keys, which indices others have; None for all."""
    counts: dict[Root, Indices] = {}
    for dim in (dim for i, dim in enumerate(label.dims) if i != axis):
        each = coordinates(dim, label.at)
        for root, at in (of_factors(each) | each).items():
            before = counts.get(root)
            at = at[at >= 0] if before is None else np.add.outer(before, at - label.at.get(root, 0))
            counts[root] = np.unique(at)
    others = _digits(whole, keys)
    pinned = whole.at.keys() & counts.keys() - {f.root for f in others} - leaves([tuple(others)])  # nor what these join
    absent = any(whole.at[root] not in counts[root] for root in pinned)
    counts = {root: np.array([at]) for root, at in label.at.items()} | counts
    found = [
        np.unique((counts[f.root] - whole.at.get(f.root, 0)) // f.stride % f.size)
        if f.root is not None and f.root in counts
        else np.arange(f.size)
        for f in others
    ]
    if absent:
        return [index[:0] for index in found]
    return None if all(len(index) == f.size for index, f in zip(found, others, strict=True)) else found


def key_axis(label: Label, flow: Flow) -> int | None:
    """The dimension of weights that counts the keys."""
    if not flow.first.keys:  # a single key
        return next((i for i in range(len(label.dims) - 1, -1, -1) if not label.dims[i]), None)
    return next((i for i, dim in enumerate(label.dims) if flow.first.keys & leaves([dim])), None)


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


def changes(logits: Node, shape: Shape | None = None) -> Iterator[Node]:
    """The calls between a product and its softmax, backwards, and the product; shape: only while it is this one."""
    node: Node | None = logits
    while node is not None:
        yield node
        before = () if node.func in fn.PRODUCTS else node.inputs
        those = (one for one in before if one.is_logits and shape in (None, one.shape))
        node = min(those, key=fn.is_of_table, default=None)


def meets_scores(node: Node, pending: Pending, label_of: Callable[[Node], Label], others: bool = False) -> bool:
    """Whether a tensor is made of a softmax's scores, but by no product with anything; others: of other scores."""
    if pending.of is None:
        return False
    key = "scores", others, pending.of[0]
    if key not in node.kept:
        own, seen, waiting, found = {*changes(pending.of[0])}, {node}, [node], False
        while waiting and not found:
            top = waiting.pop()
            ends = top in own or top.func in fn.PRODUCTS
            found = ends and (top not in own and bool(label_of(top).sides) if others else top in own)
            waiting += [one for one in top.inputs if not (ends or one in seen or one.const)]
            seen.update(top.inputs)
        node.kept[key] = found
    return bool(node.kept[key])


class Outcome:
    """What softmaxes come to: they count, or it is said why not, some only when the pass has ended."""

    def __init__(self, observer: Observer) -> None:
        self.latent: list[tuple[frozenset[Root], Callable[[], None]]] = []
        self._observer = observer
        self._open: dict[Pending, str] = {}  # why what is not wholly used with values at the end is not read

    def finish(self) -> None:
        """The pass has ended: what no later call has shown to be something else counts."""
        waiting, self.latent = self.latent, []
        for _, count in waiting:
            count()
        for pending, reason in [*self._open.items()]:
            if not pending.whole:
                self.refuse(pending, reason)

    def clear(self) -> None:
        """Hold nothing of the pass."""
        self.latent.clear()
        self._open.clear()

    def rule_out(self, summed: set[Root]) -> None:
        """What is summed over was no query."""
        self.latent = [(roots, count) for roots, count in self.latent if not roots & summed]

    def take(self, pending: Pending, within: Caller | None) -> None:
        """Its weights are used, by whoever calls."""
        here = within or self._observer.owners.caller()
        name = pending.call.caller.name
        pending.take(None if here is INSIDE_GRAPH else common_owner(name, here.name) if here else name)

    def stray(self, all_pending: Iterable[Pending], reason: str) -> None:
        """They are not read, unless they are wholly used with values elsewhere."""
        for pending in all_pending:
            self._open.setdefault(pending, pending.reason or pending.because(reason))

    def refuse(self, pending: Pending, reason: str) -> None:
        """Say why an attention is not read; nor are others of its site, of which it would be a part."""
        self._open.pop(pending, None)
        if not pending.taken:
            self.take(pending, None)
        self._observer.uncovered.add(reason)
        self._observer.sites.refuse(pending.name or "", pending.call.caller.path)

    def count(self, pending: Pending, reading: Reading | None) -> None:
        """Its weights are used with values, all of them."""
        latent = pending.arranged.latent if pending.arranged is not None else frozenset()
        if pending.name is None or reading is None:
            return
        name, call = pending.name, pending.call
        if latent:
            self.latent.append((latent, lambda: self._observer.record(call, reading, name)))
        else:
            self._observer.record(call, reading, name)


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

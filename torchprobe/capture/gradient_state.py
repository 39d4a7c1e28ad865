"""What state gradients are in, as their parameters alone tell: zeroed, grown, or too early to tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer

_FEW = 1024  # elements of a gradient that are looked at
_MOST_FEW = 64  # parameters that are looked at, at most, of an optimizer's
_MOST = 4096  # parameters that are looked at, when the few tell nothing
_LEARNT = 2  # backward passes that tell in what order gradients come
_MOST_UNOWNED = 64  # backward passes in which all gradients are looked at while a parameter has no known optimizer

State = tuple[int, int]
Left = tuple[Callable[[Tensor], bool], int | None]  # whether a tensor is a gradient that was left; its version, or any


class EarlyGradients:
    """Parameters whose gradients are there before a backward pass is heard of, at an output of the model.

    They are what a loss uses beside that output: weights of its terms, a temperature. What they hold when the pass is
    heard of tells nothing of what it found. Known of the first few backward passes, and of more while a parameter
    has no known optimizer, in each of which all gradients are looked at: 0.3 µs a parameter.

    ids: of those parameters. late: of those that are given theirs while it runs. grown: of those that the last pass
    looked at gave theirs. learns: whether there are backward passes left that are looked at. before: what the one that
    runs has found, if it is.
    """

    def __init__(self) -> None:
        self.ids: set[int] = set()
        self.late: set[int] = set()
        self.grown: frozenset[int] = frozenset()
        self.before: dict[int, tuple[nn.Parameter, State | None]] = {}
        self._old: set[int] = set()  # parameters that hold what an earlier backward pass gave them
        self._last: dict[int, Left] | None = {}  # what the last one left; None if that was not seen
        self._left = _LEARNT
        self._unowned = _MOST_UNOWNED
        self.learns = True

    def more(self, unowned: bool) -> None:
        """An optimizer has become known: its backward passes are to be looked at too. unowned: some have none yet."""
        self._left, self.learns, self._last = max(self._left, 1), True, None
        self._unowned = self._unowned if unowned else 0

    def look_again(self, passes: int) -> None:
        """Look at all gradients in the next backward passes, too."""
        self._unowned, self.learns = max(self._unowned, passes), True

    def remember(self, parameters: Iterable[nn.Parameter]) -> None:
        """The first step begins: what is there is of backward passes unheard, whatever is added to it."""
        self._last = {id(p): (_recognise(p.grad), None) for p in parameters if p.grad is not None}

    def begin(self, parameters: Iterable[nn.Parameter], unheard: bool) -> None:
        """A backward pass has been heard of. unheard: others ran before it, that may be where any gradient is from."""
        self.before = {id(p): (p, _state(p)) for p in parameters}
        last = (self._last or {}).items()
        old = self.before if unheard else [key for key, (same, version) in last if self._is_left(key, same, version)]
        self._old = {*old}

    def _is_left(self, key: int, same: Callable[[Tensor], bool], version: int | None) -> bool:
        gradient = self.before[key][0].grad if key in self.before else None
        return gradient is not None and same(gradient) and version in (None, gradient._version)

    def holds_old(self) -> bool:
        """Whether it has found gradients of backward passes before."""
        gradients = [self.before[key][0].grad for key in self._old]
        return any(g is not None and (not g.is_cpu or holds_any(g)) for g in gradients)

    def end(self) -> bool:
        """It has ended. Whether more is known than before."""
        before, self.before, known = self.before, {}, len(self.ids) + len(self.late)
        there = {key: (then, _state(p)) for key, (p, then) in before.items()}
        grown = self.grown = frozenset(key for key, (then, now) in there.items() if now is not None and now != then)
        self._unowned -= 1
        if grown:
            self.late |= grown
            if self._last is not None and self._left > 0:  # else nobody knows what was there before
                same = {key for key, (then, now) in there.items() if now is not None and now == then}
                self._left -= 1
                self.ids |= same - self._old
            self.ids -= self.late
            held = {key: p.grad for key, (p, _) in before.items() if p.grad is not None}
            self._last = {key: (_recognise(gradient), gradient._version) for key, gradient in held.items()}
        self.learns = self._left > 0 or self._unowned > 0
        return len(self.ids) + len(self.late) > known


class GradientState:
    """Whether the gradients of some parameters were zeroed, or have grown, since they were last looked at.

    Looks at four of the parameters: two that are next to each other at either end, since one alone may have no
    gradient, or one that is exactly 0, as the first matrix of a low-rank adapter has while the second is 0.

    Holds the parameters: weak references to them would keep torch from swapping them (`torch.utils.swap_tensors`).

    few: those that are looked at. kept: whether they had gradients when a backward pass began. blind: whether none of
    them tells anything (see `EarlyGradients`).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: Optimizer | None = None) -> None:
        self.of: Callable[[], Optimizer | None] = ref(optimizer) if optimizer is not None else lambda: None
        self._parameters = list(parameters)
        self.blind = False
        self._look_at(_ends([p for p in self._parameters if p.requires_grad or p.grad is not None]))

    def _look_at(self, few: list[nn.Parameter]) -> None:
        self.few, self._none, self.kept = few, [None] * len(few), False
        self._seen: Sequence[State | None] = self._none  # when a backward pass began
        self._left = [_state(p) for p in few]  # when it had ended

    def look(self) -> bool:
        """A backward pass begins: remember the gradients as they are. Whether there are some, of those few."""
        for parameter in self.few:
            if parameter.grad is not None:
                found = [p.grad for p in self.few]
                self._seen = [None if gradient is None else (id(gradient), gradient._version) for gradient in found]
                self.kept = True
                return True
        self._seen, self.kept = self._none, False
        return False

    def grew(self) -> bool:
        """Whether a backward pass has given the parameters gradients since `look`."""
        grew = False
        for i, parameter in enumerate(self.few):
            gradient = parameter.grad
            if gradient is not None and self._seen[i] is None and gradient.is_cpu:
                return True  # its values tell later whether it is still there
            now = self._left[i] = None if gradient is None else (id(gradient), gradient._version)
            if gradient is not None and now != self._seen[i]:
                if gradient.is_cpu:
                    return True
                grew = True
        # Of gradients that others of them had before, these would be looked at: they are of the last backward pass.
        return grew or self.choose()

    def came_later(self) -> bool:
        """Whether there are gradients that were not there when the last backward pass began."""
        both = zip(self.few, self._seen, strict=True)
        return any(p.grad is not None and (seen is None or seen[0] != id(p.grad)) for p, seen in both)

    def filled(self, all_of_them: bool) -> bool:
        """Whether all that are looked at, or any parameter, have gradients which are not zero."""
        gradients = [p.grad for p in (self.few if all_of_them else self._parameters[:_MOST])]
        held = [g is not None and (not g.is_cpu or holds_any(g)) for g in gradients]
        return bool(held) and (all(held) if all_of_them else any(held))

    def zeroed(self, thorough: bool) -> bool:
        """Whether there is no gradient: none at all, or zeros in host memory, or one that was written over.

        thorough: look at all parameters before saying so. Off the CPU values cannot be looked at: there a gradient
        that has changed since the last backward pass counts as zeroed.
        """
        for p, left in zip(self.few, self._left, strict=True):
            gradient = p.grad
            if gradient is None:
                continue
            if holds_any(gradient) if gradient.is_cpu else (id(gradient), gradient._version) == left:
                return False
        if not thorough:
            return True
        gradients = [p.grad for p in self._parameters[:_MOST]]
        return not any(g is not None and (not g.is_cpu or holds_any(g)) for g in gradients)

    def emptied(self, new: bool) -> bool:
        """Whether an optimizer finds none of the gradients that a backward pass gave it; off the CPU zeros are some.

        new: nobody has looked at what that pass left.
        """
        for p, left in zip(self.few, self._left, strict=True):
            gradient = p.grad
            if gradient is None:
                continue
            unchanged = not new and (id(gradient), gradient._version) == left
            if unchanged or not gradient.is_cpu or holds_any(gradient):
                return False
        return self.zeroed(thorough=True)

    def is_among(self, grown: frozenset[int]) -> bool:
        """Whether one of these parameters is."""
        return any(id(p) in grown for p in self._parameters)

    def learn(self, known: EarlyGradients) -> None:
        """Look at parameters that tell something from now on."""
        self._parameters = [p for p in self._parameters if id(p) not in known.ids]
        self.blind = not self._parameters
        late = [p for p in self._parameters if id(p) in known.late]
        if self.blind or (late and not all(id(p) in known.late for p in self.few)):
            self._look_at(_ends(late))

    def choose(self, among: frozenset[int] | None = None) -> bool:
        """Look at those that have gradients (among: at those of these ids), too, when none of the others does."""
        for p in self.few:
            if p.grad is not None if among is None else id(p) in among:
                return False
        having = [p for p in self._parameters if (p.grad is not None if among is None else id(p) in among)]
        if having and len(self.few) < _MOST_FEW:
            more = _ends(having)
            self.few, self._left = [*more, *self.few], [*map(_state, more), *self._left]
            self._none = [None] * len(self.few)
            self._seen = [*self._none[: len(more)], *self._seen]
        return bool(having)

    def may_have_grown(self, looked: bool) -> bool:
        """Whether a backward pass may have reached one that is not looked at, or whose gradient was taken away."""
        seen = {id(p) for p in (self._parameters if looked else self.few) if p.grad is not None}
        return self.blind or any(p.requires_grad and id(p) not in seen for p in self._parameters)


def _ends(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    small = [p for p in parameters if p.numel() <= _FEW]
    chosen = small if len(small) > 1 else parameters
    return chosen if len(chosen) <= 4 else [*chosen[:2], *chosen[-2:]]


def _state(parameter: nn.Parameter) -> State | None:
    gradient = parameter.grad
    return None if gradient is None else (id(gradient), gradient._version)


def holds_any(gradient: Tensor) -> bool:
    """Whether a gradient in host memory holds anything but zeros, among at most about a thousand of its elements."""
    if type(gradient) is not Tensor or gradient.layout is not torch.strided:
        return True
    if gradient.numel() > _FEW:
        gradient = gradient.reshape(-1)[:: gradient.numel() // _FEW]
    if gradient.dtype is torch.bfloat16:  # numpy has none
        gradient = gradient.float()
    return bool(gradient.numpy(force=True).any())  # in host memory; it may have a graph (`create_graph=True`)


def _recognise(tensor: Tensor) -> Callable[[Tensor], bool]:
    """Whether another tensor is this one, which is not held: a weak reference would keep torch from swapping it."""
    if tensor.layout is not torch.strided or hasattr(tensor, "full_tensor"):
        reference = ref(tensor)
        return lambda other: reference() is other
    number, storage = id(tensor), StorageWeakRef(tensor.untyped_storage())
    return lambda other: id(other) == number and not storage.expired() and _storage(other) == storage.cdata


def _storage(tensor: Tensor) -> int:
    return StorageWeakRef(tensor.untyped_storage()).cdata if tensor.layout is torch.strided else 0

"""A backward pass: what it was called on, and the forward passes that it ran through."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from torchprobe.capture.gradient_state import GradientState
from torchprobe.capture.nan_origin.check import Sign
from torchprobe.capture.source import Pass

Merge = Callable[[dict[Any, Any], dict[Any, Any]], dict[Any, Any]]


class Backward:
    """One backward pass, or several whose gradients have the same fate.

    loss: what it was called on, None when that is not known. elsewhere: its gradients go where the user puts them
    (`autograd.grad`), so that zeroing does not take them away. stray: it is for no parameter. inner: its loss is known
    where a later stage of a pipeline runs. reached: the gradients that it added to, None while that is not known;
    grown: ids of their parameters, where all were looked at; beyond: whether to those of parameters, too, that no known
    optimizer holds. kept: what sources kept of its forward passes, by source. scale: a GradScaler's when it ended.
    """

    __slots__ = (
        *("beyond", "counted", "elsewhere", "flags", "forwards", "grown", "inner", "kept", "loss"),
        *("passes", "reached", "scale", "sign", "stray", "task", "used"),
    )

    def __init__(
        self,
        task: int | None,
        loss: float | Tensor | None,
        elsewhere: bool = False,
        stray: bool = False,
        inner: bool = False,
    ) -> None:
        self.task = task
        self.loss = loss
        self.elsewhere = elsewhere
        self.stray = stray
        self.inner = inner
        self.reached: set[GradientState] | None = None
        self.grown: frozenset[int] | None = None
        self.beyond = False
        self.passes: tuple[Pass, ...] = ()
        self.forwards = 0  # passes so far, of those of the same fate too
        self.kept: dict[Any, Any] = {}
        self.sign: Sign | None = None  # of NaN or inf in its passes or gradients
        self.flags: dict[str, Tensor] = {}  # the same on a device, by what it is of
        self.scale: Tensor | None = None
        self.counted = 0  # the step in whose loss it is
        self.used = False

    @classmethod
    def unheard(cls, *passes: Pass) -> Backward:
        """That of passes through which none was heard of."""
        backward = cls(None, None)
        for passing in passes:
            backward.add(passing)
        return backward

    def add(self, passing: Pass) -> None:
        """It runs through a forward pass."""
        self.passes = (*self.passes, passing)
        self.forwards += 1
        if passing.sign is not None:
            self.note(passing.sign)

    def lose(self) -> None:
        """What it was called on is not all that its gradients are of."""
        self.loss = None

    def scaled_by(self, scale: Tensor | None) -> None:
        """It has ended, with this scale of a GradScaler's."""
        self.scale = scale

    def keep(self, kept: dict[Any, Any], merge: Merge) -> None:
        """What sources kept of the backward pass itself."""
        if kept:
            self.kept = merge(self.kept, kept) if self.kept else kept

    def note(self, sign: Sign) -> None:
        """What was seen of its numbers."""
        if sign.flag is not None:
            self._flag(sign.of, sign.flag)
        elif self.sign is None:
            self.sign = sign

    def _flag(self, of: str, flag: Tensor) -> None:
        before = self.flags.get(of)
        self.flags[of] = flag if before is None else before | flag.to(before.device)

    @property
    def flag(self) -> Tensor | None:
        """Whether any of its numbers are not finite, on a device; None where no device says."""
        flags = list(self.flags.values())
        return functools.reduce(lambda a, b: a | b.to(a.device), flags) if flags else None

    def settle(self, merge: Merge) -> None:
        """It is over: what its passes kept is put together."""
        for passing in self.passes:
            kept = passing.take()
            self.kept = merge(self.kept, kept) if self.kept else kept
            passing.release()
        self.passes = ()

    def give_up(self) -> None:
        """Its gradients were seen to be unusable: nothing of it counts, and its skipped step is counted already."""
        self.used = True
        self.forget()

    def forget(self) -> None:
        """What was kept has been written."""
        self.kept, self.sign, self.flags = {}, None, {}

    def take_for(self, step: int) -> None:
        """A step uses its gradients; 0: none does after all."""
        self.used, self.counted = step > 0, step

    def see_reach(
        self, states: Iterable[GradientState], others: GradientState | None = None, grown: frozenset[int] | None = None
    ) -> None:
        """Which gradients it has added to so far."""
        self.grown, reached = grown, self.reached
        for state in states:
            if state.grew() | (grown is not None and state.is_among(grown)):
                reached = {state} if reached is None else reached | {state}
        self.reached = set() if reached is None and grown is not None else reached
        self.beyond = others is not None and (others.grew() | (grown is not None and others.is_among(grown)))

    def join(self, state: GradientState, others: GradientState | None) -> None:
        """An optimizer has become known, whose gradients it may have added to. others: `beyond`'s, if they hold any."""
        grown = self.grown
        held = others is not None and (grown is None or others.is_among(grown))
        self.beyond |= (self.reached is None or grown is not None) and held
        if grown is not None and not (state.blind or state.is_among(grown)):
            self.reached = self.reached or set()
        elif not self.elsewhere and (self.reached is None or self.beyond or not self.used):
            self.reached = (self.reached or set()) | {state}
        self.beyond &= held and (grown is not None or not self.used)

    def see_beyond(self, holds: bool) -> None:
        """Whether parameters that no known optimizer holds still have the gradients that it gave them."""
        self.beyond = holds

    def like(self, other: Backward) -> bool:
        """Whether the gradients of both have the same fate."""
        same = (self.used, self.elsewhere, self.beyond) == (other.used, other.elsewhere, other.beyond)
        return same and self.reached == other.reached and self.grown == other.grown

    def absorb(self, other: Backward, merge: Merge) -> None:
        """One more backward pass of the same fate."""
        self.forwards += other.forwards
        if self.inner:
            self.loss, self.inner = other.loss, other.inner
        elif not other.inner:
            self.loss = None if self.loss is None or other.loss is None else self.loss + other.loss
        self.kept = merge(self.kept, other.kept) if self.kept else other.kept
        if other.sign is not None:
            self.note(other.sign)
        for of, flag in other.flags.items():
            self._flag(of, flag)

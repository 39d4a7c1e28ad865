"""Backward passes whose gradients an optimizer may yet use, and the forward passes that they ran through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.capture.nan_origin.check import Sign
from torchprobe.capture.optimizers import GradientState, trained
from torchprobe.capture.source import Pass

Merge = Callable[[dict[Any, Any], dict[Any, Any]], dict[Any, Any]]


class Backward:
    """One backward pass, or several whose gradients have the same fate.

    loss: what it was called on, None when that is not known. elsewhere: its gradients go where the user puts them
    (`autograd.grad`), so that zeroing does not take them away. stray: it is for no parameter. reached: the gradients
    that it added to, None while that is not known. kept: what sources kept of its forward passes, by source.
    """

    __slots__ = ("counted", "elsewhere", "flag", "kept", "loss", "passes", "reached", "sign", "stray", "task", "used")

    def __init__(
        self, task: int | None, loss: float | Tensor | None, elsewhere: bool = False, stray: bool = False
    ) -> None:
        self.task = task
        self.loss = loss
        self.elsewhere = elsewhere
        self.stray = stray
        self.reached: set[GradientState] | None = None
        self.passes: list[Pass] = []
        self.kept: dict[Any, Any] = {}
        self.sign: Sign | None = None  # of NaN or inf in its passes or gradients
        self.flag: Tensor | None = None  # the same on a device: above 0
        self.counted = 0  # the step in whose loss it is
        self.used = False

    def add(self, passing: Pass) -> None:
        """It runs through a forward pass."""
        self.passes.append(passing)
        if passing.sign is not None:
            self.note(passing.sign)

    def keep(self, kept: dict[Any, Any], merge: Merge) -> None:
        """What sources kept of the backward pass itself."""
        if kept:
            self.kept = merge(self.kept, kept) if self.kept else kept

    def note(self, sign: Sign | Tensor | None) -> None:
        """What was seen of its numbers."""
        if isinstance(sign, Tensor):
            self.flag = sign.float() if self.flag is None else self.flag + sign.to(self.flag.device)
        elif sign is not None and self.sign is None:
            self.sign = sign

    def settle(self, merge: Merge) -> None:
        """It is over: what its passes kept is put together."""
        for passing in self.passes:
            kept = passing.take()
            self.kept = merge(self.kept, kept) if self.kept else kept
            passing.release()
        self.passes = []

    def give_up(self) -> None:
        """Its gradients were seen to be unusable: nothing of it counts, and its skipped step is counted already."""
        self.used = True
        self.forget()

    def forget(self) -> None:
        """What was kept has been written."""
        self.kept, self.sign, self.flag = {}, None, None

    def take_for(self, step: int) -> None:
        """A step uses its gradients."""
        self.used, self.counted = True, step

    def like(self, other: Backward) -> bool:
        """Whether the gradients of both have the same fate."""
        same = self.used == other.used and self.elsewhere == other.elsewhere
        return same and self.reached == other.reached

    def absorb(self, other: Backward, merge: Merge) -> None:
        """One more backward pass of the same fate."""
        self.loss = None if self.loss is None or other.loss is None else self.loss + other.loss
        self.kept = merge(self.kept, other.kept) if self.kept else other.kept
        self.note(other.sign)
        self.note(other.flag)


class Gradients:
    """The backward passes since gradients were last zeroed, and which gradients they added to.

    merge: puts together what sources kept of two passes. dropped: called with a backward pass whose gradients nobody
    used. hidden: whether a wrapper may keep gradients out of sight, as `fully_shard` does until it reduces them.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[nn.Parameter]],
        merge: Merge,
        dropped: Callable[[Backward], None],
        hidden: Callable[[], bool],
    ) -> None:
        self.running: Backward | None = None
        self._parameters = parameters
        self._merge = merge
        self._dropped = dropped
        self._hidden = hidden
        self._waiting: list[Backward] = []  # oldest first
        self._states: list[GradientState] = []  # of each optimizer that has stepped
        self._unknown: GradientState | None = None  # of all parameters, while no optimizer is known

    def begin(self, backward: Backward) -> None:
        """A backward pass begins: those before it whose gradients are gone were dropped."""
        self.running = backward
        if len(self._states) == 1 and len(self._waiting) == 1 and self._waiting[0].used:  # the plain loop
            if self._states[0].of() is not None and not self._states[0].look():
                self._waiting = []
                return
        states = self._living()
        if self._waiting:
            self._drop_zeroed(states)
        for state in states:
            state.look()

    def end(self) -> None:
        """The running backward pass has ended, or was given up."""
        backward, self.running = self.running, None
        if backward is None:
            return
        for passing in backward.passes:
            if passing.kept:
                backward.settle(self._merge)
                break
        if not backward.elsewhere:
            self._see_reach(backward)
        if backward.stray and not backward.reached:
            return
        last = self._waiting[-1] if self._waiting else None
        if last is not None and not last.used and last.like(backward):
            last.absorb(backward, self._merge)
        else:
            self._waiting.append(backward)

    def used_by(self, optimizer: Optimizer) -> list[Backward]:
        """The backward passes whose gradients an optimizer is about to use."""
        for known in self._states:
            if known.of() is optimizer:
                state = known
                break
        else:
            state = self._know(optimizer)
        candidates, running = self._waiting, self.running
        if running is not None:
            self._see_reach(running)
            candidates = [*candidates, running]
        found, fresh = [], False
        for backward in candidates:
            if backward.reached is None or state in backward.reached:
                found.append(backward)
                fresh |= not backward.used
        if not fresh:
            state.choose()
        return found

    def waiting(self) -> list[Backward]:
        """The backward passes that were not dropped yet."""
        return list(self._waiting)

    def step_begins(self) -> None:
        """What a step used stays only as a loss whose gradient may still be there."""
        if len(self._waiting) == 1 and self._waiting[0].used:  # the plain loop; what it kept was taken when it ended
            return
        left: list[Backward] = []
        for backward in self._waiting:
            if backward.elsewhere and not backward.used:
                continue
            if backward.used:
                backward.forget()
            if left and left[-1].used and left[-1].like(backward):
                left[-1].absorb(backward, self._merge)
            else:
                left.append(backward)
        self._waiting = left

    def drop_zeroed(self) -> None:
        """Drop what was zeroed since: asked when a step ends for good."""
        if self._waiting and self.running is None:
            self._drop_zeroed(self._living())

    def _drop_zeroed(self, states: list[GradientState]) -> None:
        waiting = self._waiting
        thorough = not all([backward.used for backward in waiting])  # noqa: C419 - a generator costs a call a turn
        zeroed = {*filter(None, [state if state.zeroed(thorough) else None for state in states])}
        if not zeroed:
            return
        self._waiting = []
        if len(zeroed) == len(states) and not thorough:  # the plain loop
            return
        for backward in waiting:
            if backward.reached is not None:
                backward.reached -= zeroed
            unseen = backward.reached is None
            gone = len(zeroed) == len(states) and not self._hidden() if unseen else not backward.reached
            if not gone or backward.elsewhere:
                self._waiting.append(backward)
            elif not backward.used:
                self._dropped(backward)

    def _see_reach(self, backward: Backward) -> None:
        for state in self._states:
            if state.grew():
                if backward.reached is None:
                    backward.reached = {state}
                else:
                    backward.reached.add(state)

    def _know(self, optimizer: Optimizer) -> GradientState:
        state = GradientState(trained(optimizer), optimizer)
        self._states.append(state)
        state.choose()
        for backward in self._waiting if self.running is None else [*self._waiting, self.running]:
            if backward.reached is None:
                backward.reached = None if backward.elsewhere else {state}
            elif not backward.used:  # it came before the optimizer was known, and may be for it too
                backward.reached.add(state)
        return state

    def _living(self) -> list[GradientState]:
        """The states of the optimizers that exist; while none is known, that of all parameters."""
        self._states = [state for state in self._states if state.of() is not None]
        if self._states:
            return self._states
        if self._unknown is None:
            self._unknown = GradientState(p for p in self._parameters() if p.requires_grad)
        return [self._unknown]

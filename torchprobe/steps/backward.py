"""A backward pass: what it was called on, the forward passes that it ran through; and whose gradients they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import ReferenceType

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.capture.gradient_state import EarlyGradients, GradientState, holds_any
from torchprobe.capture.nan_origin.check import Sign
from torchprobe.capture.optimizers import held_by, parameter_ids
from torchprobe.capture.sharding import is_fully_sharded
from torchprobe.capture.source import Pass
from torchprobe.naming import all_parameters

_DOUBTS = 64  # backward passes of which nobody knew what they reached, after which all gradients are looked at
_LOOKS = 16  # backward passes in which they are

Merge = Callable[[dict[Any, Any], dict[Any, Any]], dict[Any, Any]]


class Backward:
    """One backward pass, or several whose gradients have the same fate.

    loss: what it was called on, None when that is not known. elsewhere: its gradients go where the user puts them
    (`autograd.grad`), so that zeroing does not take them away. again: another one may run through the graph that it
    makes of them. stray: it is for no parameter. inner: its loss is known where a later stage of a pipeline runs.
    reached: the gradients that it added to, None while that is not known; grown: ids of their parameters, where all
    were looked at; doubted: those to which others may have added before, unheard; beyond: whether to those of
    parameters, too, that no known optimizer holds. kept: what sources kept of its forward passes, by source. scale: a
    GradScaler's when it ended.
    """

    __slots__ = (
        *("again", "beyond", "counted", "doubted", "elsewhere", "flags", "forwards", "grown", "inner", "kept"),
        *("loss", "passes", "reached", "scale", "sign", "stray", "task", "used"),
    )

    def __init__(
        self,
        task: int | None,
        loss: float | Tensor | None,
        elsewhere: bool = False,
        stray: bool = False,
        inner: bool = False,
        again: bool = False,
    ) -> None:
        self.task = task
        self.loss = loss
        self.elsewhere = elsewhere
        self.stray = stray
        self.inner = inner
        self.again = again
        self.reached: set[GradientState] | None = None
        self.grown: frozenset[int] | None = None
        self.doubted: set[GradientState] = set()
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
        self.passes = (*self.passes, *passing.before, passing)
        self.forwards += 1 + len(passing.before)
        for one in (*passing.before, passing):
            if one.sign is not None:
                self.note(one.sign)

    def lose(self, reached: set[GradientState] | None = None) -> None:
        """What it was called on is not all that its gradients are of. reached: or it is not known which it added to."""
        self.loss, self.reached = None, reached or self.reached

    def doubt(self, filled: set[GradientState], states: Sequence[GradientState]) -> None:
        """Another one may have run before, unheard. filled: of these states those that hold gradients."""
        if filled and len(states) > 1:
            self.doubted = filled
        elif filled:
            self.lose()

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
                if grown is not None:
                    state.choose(grown)
        self.reached = set() if reached is None and grown is not None else reached
        self.beyond = others is not None and (others.grew() | (grown is not None and others.is_among(grown)))

    def join(self, state: GradientState, others: GradientState | None) -> None:
        """An optimizer has become known, whose gradients it may have added to. others: `beyond`'s, if they hold any."""
        grown = self.grown
        held = others is not None and (grown is None or others.is_among(grown))
        self.beyond |= (self.reached is None or grown is not None) and held
        if grown is not None:
            state.choose(grown)
        if grown is not None and not (state.blind or state.is_among(grown)):
            self.reached = self.reached or set()
        elif not self.elsewhere and (self.reached is None or self.beyond or not self.used):
            self.reached = (self.reached or set()) | {state}
        self.beyond &= held and (grown is not None or not self.used)

    def see_emptied(self, emptied: set[int], others: GradientState | None, held: bool) -> None:
        """What has been zeroed of its gradients. emptied: ids. held: whether others still have some."""
        if self.grown is not None and emptied:
            self.grown -= emptied
        self.beyond &= others is not None and held and (self.grown is None or others.is_among(self.grown))

    def like(self, other: Backward) -> bool:
        """Whether the gradients of both have the same fate."""
        same = (self.used, self.elsewhere, self.beyond) == (other.used, other.elsewhere, other.beyond)
        return same and self.reached == other.reached and self.grown == other.grown

    def may_be_part_of(self, other: Backward) -> bool:
        """Whether the other one follows through the graph that this one made, as far as is known."""
        return self.again and not (self.used or other.elsewhere) and (other.reached != set() or bool(other.grown))

    def absorb(self, other: Backward, merge: Merge) -> None:
        """One more backward pass of the same fate."""
        self.forwards += other.forwards
        self.doubted |= other.doubted
        if other.again:
            self.passes = (*self.passes, *other.passes)
        if self.inner:
            self.loss, self.inner = other.loss, other.inner
        elif not (other.inner or other.again):
            self.loss = None if self.loss is None or other.loss is None else self.loss + other.loss
        self.kept = merge(self.kept, other.kept) if self.kept else other.kept
        if other.sign is not None:
            self.note(other.sign)
        for of, flag in other.flags.items():
            self._flag(of, flag)


class Owners:
    """The optimizers that have stepped, each with the state of its parameters' gradients.

    states: theirs. others: that of the parameters that none of them holds. early: what is learnt of gradients that are
    there before a backward pass is heard of.
    """

    def __init__(self, model: ReferenceType[nn.Module]) -> None:
        self.states: list[GradientState] = []
        self.others: GradientState | None = None
        self.early = EarlyGradients()
        self._doubts = _DOUBTS
        self._model = model
        self._unknown: GradientState | None = None  # of all parameters, while no optimizer is known

    def living(self) -> list[GradientState]:
        """The states of the optimizers that exist; while none is known, that of all parameters."""
        states = [state for state in self.states if state.of() is not None]
        gone, self.states = len(states) < len(self.states), states
        if gone:
            self._tell_others()
            self.early.look_again(1)  # its gradients may be zeroed, and those of the others not
        if states:
            return states
        if self._unknown is None or not self._unknown.few:  # all were frozen
            self._unknown = GradientState(self.parameters())
            self._unknown.learn(self.early)
        return [self._unknown]

    def may_have_reached(self, backward: Backward, looked: bool) -> bool:
        """Whether one has added to any gradients, where none of them tells. looked: at all gradients."""
        may = {state for state in self.living() if state.may_have_grown(looked)}
        if may and self._doubts:
            self._doubts -= 1
            self.early.look_again(_LOOKS)
        if may and len(self.states) > 1 and not backward.beyond:
            backward.lose(may)
        return bool(may) or backward.beyond

    def see_unfrozen(self, backward: Backward) -> None:
        """It reached none that is known: parameters that were frozen may be trained now, by no known optimizer."""
        self._tell_others()
        backward.see_reach((), self.others, backward.grown)

    def look(self, living: list[GradientState], sampled: bool = False, unheard: bool = False) -> None:
        """Remember what gradients a backward pass finds; in a sampled step all. unheard: others ran before it."""
        if sampled and len(living) > 1:
            self.early.look_again(1)
        if self.early.learns:
            self.early.begin(self.parameters(), unheard)
        for state in living if self.others is None else [*living, self.others]:
            state.look()

    def add(self, optimizer: Optimizer, waiting: Iterable[Backward]) -> GradientState:
        """One becomes known; backward passes that came before may be for it too."""
        own = parameter_ids(self._model())  # those of other models get theirs before a backward pass is heard of
        state = GradientState([p for p in held_by(optimizer) if id(p) in own], optimizer)
        state.learn(self.early)
        self.states.append(state)
        state.choose()
        self._tell_others()
        self.early.more(self.others is not None)
        others = None if self.others is None or self.others.zeroed(thorough=True) else self.others
        for backward in waiting:
            backward.join(state, others)
        return state

    def learn(self, compiled: bool) -> frozenset[int] | None:
        """A backward pass has ended, with all gradients looked at: ids of the parameters that it reached, if known."""
        if self.early.end():
            for state in [*self.living(), *filter(None, [self.others])]:
                state.learn(self.early)
        return None if compiled or self.hides() else self.early.grown or None

    def emptied(self) -> set[int]:
        """Ids of the parameters without a gradient, or with one of zeros in host memory."""
        return {id(p) for p in self.parameters() if p.grad is None or (p.grad.is_cpu and not holds_any(p.grad))}

    def parameters(self) -> list[nn.Parameter]:
        """Those of the model that are trained; some loops freeze them again before an optimizer steps."""
        return [p for p in all_parameters(self._model()) if p.requires_grad or p.grad is not None]

    def hides(self) -> bool:
        """Whether a wrapper may keep gradients out of sight, as `fully_shard` does until it reduces them."""
        model = self._model()
        return model is not None and is_fully_sharded(model)

    def forget(self) -> None:
        """The run is over."""
        self.states, self.others, self._unknown = [], None, None

    def _tell_others(self) -> None:
        held = {id(p) for state in self.states if (one := state.of()) is not None for p in held_by(one)}
        others = [p for p in self.parameters() if id(p) not in held]
        self.others = GradientState(others) if others else None
        if self.others is not None:
            self.others.learn(self.early)
            self.others.choose()

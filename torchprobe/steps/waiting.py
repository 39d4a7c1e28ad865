"""Backward passes whose gradients an optimizer may yet use, and what becomes of them."""

from __future__ import annotations

from weakref import ReferenceType, ref

from torch import is_grad_enabled, nn
from torch.optim import Optimizer

from torchprobe.capture.gradient_state import GradientState
from torchprobe.capture.parameter_hooks import ParameterHooks
from torchprobe.capture.source import DROPPED, Pass
from torchprobe.capture.sources import Sources
from torchprobe.messages import log as _log
from torchprobe.naming import all_parameters
from torchprobe.statistics.dtypes import on_host
from torchprobe.steps.backward import Backward, Owners
from torchprobe.steps.open_step import OpenStep
from torchprobe.steps.steps import Steps

_OF_PASSES = ("loss", "outputs", "output_gradients")  # sources of what a step has none of, where it uses no pass

_ZEROED = "gradients were zeroed between a pass's first backward() and optimizer.step()"


class Waiting:
    """The backward passes since gradients were last zeroed, and which optimizers' gradients they added to.

    passes: oldest first. heard: one has come since an optimizer stepped.
    """

    def __init__(
        self, model: ReferenceType[nn.Module], steps: Steps, sources: Sources, parameter_hooks: ParameterHooks
    ) -> None:
        self.passes: list[Backward] = []
        self.heard = False
        self.owners = Owners(model)
        self._steps = steps
        self._sources = sources
        self._merge = sources.merge
        self._parameter_hooks = parameter_hooks
        self._untold: bool | None = None  # whether to say what autograd.grad hides; None before there was one

    def add(self, backward: Backward, compiled: bool) -> None:
        """One has ended. compiled: without a word, as that of compiled autograd."""
        owners = self.owners
        looked = bool(owners.early.learns and owners.early.before)
        grown = owners.learn(compiled) if looked else None
        if not backward.elsewhere:
            backward.see_reach(owners.states, owners.others, grown)
        if backward.stray and not backward.reached:
            return  # its passes keep what they have: another backward pass may run through their graphs
        while self.passes and self.passes[-1].may_be_part_of(backward):
            backward.absorb(self.passes.pop(), self._merge)
        for passing in backward.passes:
            if passing.kept and not backward.again:
                backward.settle(self._merge)
                break
        if not (backward.reached or backward.beyond or backward.elsewhere) and owners.others is None and owners.states:
            owners.see_unfrozen(backward)
        known = backward.reached is not None or backward.elsewhere or compiled or owners.hides()
        if not known and not owners.may_have_reached(backward, looked):
            return
        self.heard = True
        last = self.passes[-1] if self.passes else None
        if last is not None and not last.used and last.like(backward):
            last.absorb(backward, self._merge)
        else:
            self.passes.append(backward)

    def missed_one(self) -> None:
        """An optimizer steps on passes of its own, and no backward pass of theirs was heard of."""
        self._parameter_hooks.listen_again()

    def used_by(self, optimizer: Optimizer, running: Backward | None, final: bool = False) -> list[Backward]:
        """The backward passes whose gradients an optimizer uses. final: they are there, and it has not stepped yet."""
        candidates, owners, self.heard = self.passes, self.owners, False
        if running is not None:
            candidates = [*candidates, running]
        new = False
        for known in owners.states:
            if known.of() is optimizer:
                state = known
                break
        else:
            state, new = owners.add(optimizer, candidates), True
        if running is not None:
            running.see_reach(owners.states)
        found, fresh = [], False
        for backward in candidates:
            if backward.reached is None or state in backward.reached:
                found.append(backward)
                fresh |= not backward.used
                if backward.elsewhere and backward.passes:
                    backward.settle(self._merge)
                if backward.doubted and (new or backward.reached is None or state in backward.doubted):
                    backward.lose()
        if not fresh:
            state.choose()
            return found
        if self._parameter_hooks.hooked and not self._sources.running.compiled:  # graphs run with no other hook
            self._parameter_hooks.step_ends(unowned=owners.others is not None)
        there = not (new or state.kept) and state.few and state.few[0].grad is not None  # the plain loop
        if final and not there and state.emptied(new):
            found = self._without_emptied(found, new)
        if self._untold and all([b.used or b.loss is None for b in found]):  # noqa: C419 - as above
            self._untold = False
            _log.warning("overview/loss is not written for gradients of autograd.grad: no backward() says what it was")
        return found

    def _without_emptied(self, found: list[Backward], new: bool) -> list[Backward]:
        """Of these backward passes those that were not seen to give the gradients that are zeroed before the step."""
        seen = [b for b in found if not b.used and b.reached is not None and not (new and b.grown is None)]
        if not seen:
            return found
        self.drop_zeroed(self.owners.living())
        return [backward for backward in found if backward not in seen]

    def left(self, optimizer: Optimizer) -> bool:
        """Whether its gradients are not zeroed."""
        return any(state.of() is optimizer and not state.zeroed(thorough=True) for state in self.owners.states)

    def unheard(self, optimizer: Optimizer) -> bool:
        """Whether its gradients came after the backward pass that was heard of last, which they are not of."""
        return any(state.of() is optimizer and state.came_later() for state in self.owners.states)

    def saw_grad(self) -> None:
        """`autograd.grad` gives gradients whose loss nobody tells."""
        if self._untold is None:
            self._untold = True

    def take_back(self, step: OpenStep) -> None:
        """An optimizer has not used what it was to use in a step."""
        step.give_back()
        for backward in self.passes:
            if backward.counted == step.number:
                backward.take_for(0)

    def step_begins(self) -> None:
        """What a step used stays only as a loss whose gradient may still be there."""
        left: list[Backward] = []
        for backward in self.passes:
            if backward.elsewhere and (not backward.used or backward.inner or backward.loss is not None):
                continue
            if backward.used:
                backward.forget()
            if left and left[-1].used and left[-1].like(backward):
                left[-1].absorb(backward, self._merge)
            else:
                left.append(backward)
        self.passes = left

    def drop_zeroed(self, states: list[GradientState]) -> None:
        """Those whose gradients are not there any more."""
        waiting = self.passes
        thorough = not all([backward.used for backward in waiting])  # noqa: C419 - a generator costs a call a turn
        zeroed = {*filter(None, [state if state.zeroed(thorough) else None for state in states if not state.blind])}
        if all([state in zeroed or state.blind for state in states]):  # noqa: C419 - as above
            zeroed.update(states)
        owners, others = self.owners, self.owners.others
        held = others is not None and not others.zeroed(thorough)
        emptied = owners.emptied() if owners.early.learns else set()
        for backward in waiting if emptied or others is not None else ():
            backward.see_emptied(emptied, others, held)
        if not zeroed:
            return
        self.passes = []
        if len(zeroed) == len(states) and not (thorough or held):  # the plain loop
            return
        dropped: list[Backward] = []
        for backward in waiting:
            if backward.reached is not None:
                backward.reached.difference_update(zeroed)
            unseen = backward.reached is None
            gone = len(zeroed) == len(states) and not self.owners.hides() if unseen else not backward.reached
            if not gone or backward.beyond or backward.elsewhere:
                self.passes.append(backward)
            elif not backward.used:
                dropped.append(backward)
        for backward in dropped[1:]:
            dropped[0].absorb(backward, self._merge)  # one step was skipped, however many there were
        if dropped:
            self._drop(dropped[0])

    def _drop(self, backward: Backward) -> None:
        """Nobody used its gradients: a skipped step where they were not finite, or a GradScaler backs off."""
        for reporter in self._steps.current.due | self._steps.current.light:
            if reporter.source in _OF_PASSES:
                reporter.explain(_ZEROED)
        sign, flag, scaled = backward.sign, backward.flag, self._sources.scaled
        fell = None if sign is not None else scaled.backed_off(backward.scale, look=self._steps.clock.fresh)
        if fell is not None and not fell.is_cpu:
            flag, fell = fell if flag is None else fell | flag.to(fell.device), None
        self._steps.skip(sign, flag, fell is not None and on_host(fell) > 0)


class WithoutGraph:
    """Training passes of parts whose outputs are in no graph: no backward pass tells what becomes of them.

    passes: each with its part, and whether that was frozen, as far as anything was recorded of it.
    """

    def __init__(self) -> None:
        self.passes: list[tuple[Pass, ReferenceType[nn.Module], bool]] = []

    def add(self, passing: Pass, module: nn.Module, whole: bool) -> bool:
        """One has run, of a part or of the whole model: whether it is known what is to become of it."""
        if not is_grad_enabled():  # a checkpoint runs it again
            return False
        frozen = bool(passing.due) and is_frozen(module)
        if not whole:
            self.passes.append((passing, ref(module), frozen))
        elif frozen:  # a generator's, while its critic is trained
            passing.decide(DROPPED)
        return frozen or not whole

    def take(self) -> list[Pass]:
        """Those that count with what is trained now: a part that is trained again was frozen for another net's loss."""
        passes, self.passes = self.passes, []
        kept: list[Pass] = []
        for passing, part, frozen in passes:
            if frozen and not is_frozen(part()):
                passing.decide(DROPPED)
            else:
                kept.append(passing)
        return kept


def is_frozen(module: nn.Module | None) -> bool:
    """Whether nothing of a module can be trained."""
    return not any([p.requires_grad for p in all_parameters(module)])  # noqa: C419 - a generator costs a call a turn

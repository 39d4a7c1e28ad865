"""Backward passes whose gradients an optimizer may yet use: heard of as they run, kept until that is known."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from weakref import ReferenceType

from torch import nn
from torch.optim import Optimizer

from torchprobe.capture import compat
from torchprobe.capture.backward import loss_value, plain_root, roots
from torchprobe.capture.gate import Guard, protected
from torchprobe.capture.gradient_state import EarlyGradients, GradientState
from torchprobe.capture.optimizers import trained
from torchprobe.capture.sharding import is_fully_sharded
from torchprobe.capture.source import UNDECIDED, Pass
from torchprobe.capture.sources import Sources
from torchprobe.statistics.dtypes import on_host
from torchprobe.steps.backward import Backward
from torchprobe.steps.open_step import OpenStep
from torchprobe.steps.steps import Steps

_log = logging.getLogger("torchprobe")


class Gradients:
    """The backward passes since gradients were last zeroed, and which gradients they added to.

    train: called with a pass in evaluation mode through which a backward pass runs.
    """

    def __init__(
        self,
        model: ReferenceType[nn.Module],
        guard: Guard,
        steps: Steps,
        sources: Sources,
        train: Callable[[Pass], None],
    ) -> None:
        self.guard = guard
        self.running: Backward | None = None
        self._steps = steps
        self._sources = sources
        self._merge = sources.merge
        self._check = sources.nan_check
        self._watch = steps.watch
        self._model = model
        self._train = train
        self._waiting: list[Backward] = []  # oldest first
        self._states: list[GradientState] = []  # of each optimizer that has stepped
        self._unknown: GradientState | None = None  # of all parameters, while no optimizer is known
        self._others: GradientState | None = None  # of those that no known optimizer holds
        self._early = EarlyGradients()
        self._said = False
        self.compiled = False  # a backward pass ran whose end torch does not tell, as that of compiled autograd
        self._task = compat.plain_state()[0]

    # ---- as they run

    @protected
    def heard_backward(self, passing: Pass) -> int | None:
        """A gradient reaches an output of a pass. The number of the backward pass, unless another output told it."""
        task, running = self._task(), self.running
        if passing.task == task and running is not None:
            return None
        if running is None or running.task != task:
            running = self.begin(None if task == -1 else task)
        if passing.kind is UNDECIDED:
            self._train(passing)
        running.add(passing)
        return task

    def begin(self, task: int | None) -> Backward:
        """A backward pass begins; one that is thought to run has ended without a word."""
        if self.running is not None:
            self.end(self.running)
        root = plain_root()
        backward = self._of_roots(task) if root is None else Backward(task, loss_value(root))
        self.running, states, waiting = backward, self._states, self._waiting
        plain = len(states) == len(waiting) == 1 and waiting[0].used and self._others is None and not self._early.learns
        if plain and states[0].of() is not None and not states[0].look():
            self._waiting = []
        else:
            self._look()
        if self._steps.current.due:
            self._sources.backward_begins(self._steps.current.due, self._early.ids)
        if self._watch.timing is not None:
            self._watch.backward_begins()
        self.compiled = not compat.at_end_of_backward(partial(self.end, backward))
        return backward

    def _of_roots(self, task: int | None) -> Backward:
        call = roots(self._sources.running.thread)
        loss = None if call.value is None or call.inner else loss_value(call.value)
        elsewhere = call.call == "grad" and call.for_parameters
        if elsewhere and (call.inner or call.value is not None):
            self._sources.parameters.left.come_apart()
        elif elsewhere and not self._said:
            self._said = True
            _log.warning("overview/loss is not written for gradients of autograd.grad: no backward() says what it was")
        if call.parts > 1:
            self._steps.current.divide_by(call.parts)
        return Backward(task, loss, elsewhere, not call.for_parameters, call.inner)

    @protected
    def end(self, backward: Backward) -> None:
        """A backward pass has ended."""
        if self.running is not backward:
            return
        due = self._steps.current.due
        sign = None if self._check is None else self._check.gradients()
        if sign is not None:
            backward.note(sign)
        if due:
            backward.keep(self._sources.backward_ends(due), self._merge)
        timed = self._watch.timing is not None
        if timed:
            self._watch.backward_ends(backward.forwards)
        if due or timed:
            compat.at_end_of_backward(self.ended)  # what wrappers do at its end comes first
        self.running = None
        if self._sources.scaled.found is not None:
            backward.scaled_by(self._sources.scaled.scale())
        self._await(backward)
        if self._steps.clock.by_forward and not backward.stray:
            self._steps.current.use(backward)

    @protected
    def ended(self) -> None:
        """A backward pass has ended, and what others had put at its end has run."""
        if self._watch.timing is not None:
            self._watch.backward_ended()
        if self._steps.current.due:
            self._sources.backward_ended(self._steps.current.due)

    # ---- what becomes of their gradients

    def _look(self) -> None:
        """Gradients as a backward pass finds them: those before it whose gradients are gone were dropped."""
        if self._early.learns:
            self._early.begin(self._trained())
        states = self._living()
        if self._waiting:
            self._drop_zeroed(states)
        for state in states if self._others is None else [*states, self._others]:
            state.look()

    def _await(self, backward: Backward) -> None:
        grown = self._learn() if self._early.learns else None
        for passing in backward.passes:
            if passing.kept:
                backward.settle(self._merge)
                break
        if not backward.elsewhere:
            backward.see_reach(self._states, self._others, grown)
        if backward.stray and not backward.reached:
            return
        last = self._waiting[-1] if self._waiting else None
        if last is not None and not last.used and last.like(backward):
            last.absorb(backward, self._merge)
        else:
            self._waiting.append(backward)

    def _learn(self) -> frozenset[int] | None:
        if self._early.end():
            for state in [*self._living(), *filter(None, [self._others])]:
                state.learn(self._early)
        return None if self.compiled or self._hides() else self._early.grown or None

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
            running.see_reach(self._states)
            candidates = [*candidates, running]
        found, fresh = [], False
        for backward in candidates:
            if backward.reached is None or state in backward.reached:
                found.append(backward)
                fresh |= not backward.used
        if not fresh:
            state.choose()
        return found

    def left(self, optimizer: Optimizer) -> bool:
        """Whether its gradients are not zeroed."""
        return any(state.of() is optimizer and not state.zeroed(thorough=True) for state in self._states)

    def take_back(self, step: OpenStep) -> None:
        """An optimizer has not used what it was to use in a step."""
        step.give_back()
        for backward in self._waiting:
            if backward.counted == step.number:
                backward.take_for(0)

    def waiting(self) -> list[Backward]:
        """The backward passes that were not dropped yet."""
        return list(self._waiting)

    def step_begins(self) -> None:
        """What a step used stays only as a loss whose gradient may still be there."""
        waiting = self._waiting
        if len(waiting) == 1 and waiting[0].used and not waiting[0].elsewhere:
            return  # the plain loop; what it kept was taken when it ended
        left: list[Backward] = []
        for backward in self._waiting:
            if backward.elsewhere and (not backward.used or backward.inner or backward.loss is not None):
                continue
            if backward.used:
                backward.forget()
            if left and left[-1].used and left[-1].like(backward):
                left[-1].absorb(backward, self._merge)
            else:
                left.append(backward)
        self._waiting = left

    def _drop_zeroed(self, states: list[GradientState]) -> None:
        waiting = self._waiting
        thorough = not all([backward.used for backward in waiting])  # noqa: C419 - a generator costs a call a turn
        zeroed = {*filter(None, [state if state.zeroed(thorough) else None for state in states if not state.blind])}
        if all([state in zeroed or state.blind for state in states]):  # noqa: C419 - as above
            zeroed.update(states)
        held = self._others is not None and not self._others.zeroed(thorough)
        for backward in waiting if self._others is not None else ():
            backward.see_beyond(held and backward.beyond)
        if not zeroed:
            return
        self._waiting = []
        if len(zeroed) == len(states) and not (thorough or held):  # the plain loop
            return
        for backward in waiting:
            if backward.reached is not None:
                backward.reached.difference_update(zeroed)
            unseen = backward.reached is None
            gone = len(zeroed) == len(states) and not self._hides() if unseen else not backward.reached
            if not gone or backward.beyond or backward.elsewhere:
                self._waiting.append(backward)
            elif not backward.used:
                self._drop(backward)

    def _drop(self, backward: Backward) -> None:
        """Nobody used its gradients: a skipped step where they were not finite, or a GradScaler backs off."""
        sign, flag, scaled = backward.sign, backward.flag, self._sources.scaled
        fell = None if sign is not None else scaled.backed_off(backward.scale, look=self._steps.clock.fresh)
        if fell is not None and not fell.is_cpu:
            flag, fell = fell if flag is None else fell | flag.to(fell.device), None
        self._steps.skip(sign, flag, fell is not None and on_host(fell) > 0)

    def _know(self, optimizer: Optimizer) -> GradientState:
        state = GradientState(trained(optimizer), optimizer)
        state.learn(self._early)
        self._states.append(state)
        state.choose()
        self._tell_others()
        others = self._others
        self._early.more(others is not None)
        others = None if others is None or others.zeroed(thorough=True) else others
        for backward in self._waiting if self.running is None else [*self._waiting, self.running]:
            backward.join(state, others)  # it came before the optimizer was known, and may be for it too
        return state

    def _tell_others(self) -> None:
        """Which parameters no known optimizer holds."""
        held = {id(p) for state in self._states if (one := state.of()) is not None for p in trained(one)}
        others = [p for p in self._trained() if id(p) not in held]
        self._others = GradientState(others) if others else None
        if self._others is not None:
            self._others.learn(self._early)
            self._others.choose()

    def _living(self) -> list[GradientState]:
        """The states of the optimizers that exist; while none is known, that of all parameters."""
        states = [state for state in self._states if state.of() is not None]
        gone, self._states = len(states) < len(self._states), states
        if gone:
            self._tell_others()
        if states:
            return states
        if self._unknown is None:
            self._unknown = GradientState(self._trained())
            self._unknown.learn(self._early)
        return [self._unknown]

    def _trained(self) -> list[nn.Parameter]:
        model = self._model()
        return [] if model is None else [p for p in model.parameters() if p.requires_grad]

    def _hides(self) -> bool:
        """Whether a wrapper may keep gradients out of sight, as `fully_shard` does until it reduces them."""
        model = self._model()
        return model is not None and is_fully_sharded(model)

"""Backward passes whose gradients an optimizer may yet use: heard of as they run, kept until that is known."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from weakref import ReferenceType

from torch import nn
from torch.optim import Optimizer

from torchprobe.capture import compat
from torchprobe.capture.backward import in_recomputation, loss_value, plain_root, roots
from torchprobe.capture.compiled.tracing import compiles_backward
from torchprobe.capture.gate import Guard, protected
from torchprobe.capture.gradient_state import GradientState
from torchprobe.capture.parameter_hooks import ParameterHooks, number_of_backward
from torchprobe.capture.pipelining import in_schedule
from torchprobe.capture.source import UNDECIDED, Pass
from torchprobe.capture.sources import Sources
from torchprobe.statistics.dtypes import on_host
from torchprobe.steps.backward import Backward, Owners
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
        self._train = train
        self._waiting: list[Backward] = []  # oldest first
        self._owners = Owners(model)
        self._parameter_hooks = ParameterHooks(self._reached)
        self._opener: nn.Parameter | None = None  # at which the backward pass was heard of
        self._number: int | None = None  # of the last one, where torch counts them
        self._first = True  # none was heard of
        self._untold: bool | None = None  # whether to say what autograd.grad hides; None before there was one
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
        elif self._opener is not None and not running.passes:
            self._owners.look(self._owners.living())  # gradients that were there before tell nothing
        if passing.kind is UNDECIDED:
            self._train(passing)
        running.add(passing)
        return task

    def _reached(self, parameter: nn.Parameter) -> None:
        if self.running is None:  # no gradient has reached an output
            self._heard_at(parameter)

    @protected
    def _heard_at(self, parameter: nn.Parameter) -> None:
        if not (in_recomputation() or in_schedule()) and roots(self._sources.running.thread).call != "grad":
            self.begin(self._task())
            self._opener = parameter

    def begin(self, task: int | None) -> Backward:
        """A backward pass begins; one that is thought to run has ended without a word."""
        if self.running is not None:
            self.end(self.running)
        skipped, doubtful = 0, self._first
        if self._number is not None and task is not None:
            skipped, self._number = task - self._number - 1, task
            if skipped or self._parameter_hooks.hooked:
                doubtful |= self._parameter_hooks.heard(skipped)
        root = plain_root()
        backward = self._of_roots(task) if root is None else Backward(task, loss_value(root))
        self.running, owners, waiting = backward, self._owners, self._waiting
        states, as_ever = owners.states, owners.others is None and not owners.early.learns
        as_ever = as_ever and len(states) == len(waiting) == 1 and waiting[0].used
        if as_ever and not doubtful and states[0].of() is not None and not states[0].look():
            self._waiting = []
        else:
            states = owners.living()
            if waiting:
                self._drop_zeroed(states)
            owners.look(states)
            if doubtful and any(s.filled(all_of_them=not skipped) for s in states) and not in_schedule():
                backward.lose()  # another one ran before, of which nobody has heard
        self._first = False
        if self._steps.current.due:
            self._sources.backward_begins(self._steps.current.due, self._owners.early.ids)
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
        elif elsewhere and self._untold is None:
            self._untold = True
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
        if self._parameter_hooks.wanted and not self._parameter_hooks.hooked:
            self.listen()
        if self._opener is not None and not backward.passes:
            self._parameter_hooks.found(self._opener)
        self._opener = None
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

    def listen(self) -> None:
        """Backward passes are to be heard at parameters, too."""
        if not (self.compiled or compiles_backward()):
            self._parameter_hooks.begin_step(self._owners.parameters)

    def release(self) -> None:
        """No hook is left on a parameter, and no parameter is held."""
        self._parameter_hooks.forget()
        self._owners.forget()
        if self._check is not None:
            self._check.forget()

    # ---- what becomes of their gradients

    def _await(self, backward: Backward) -> None:
        owners = self._owners
        grown = owners.learn(self.compiled) if owners.early.learns else None
        for passing in backward.passes:
            if passing.kept:
                backward.settle(self._merge)
                break
        if not backward.elsewhere:
            backward.see_reach(owners.states, owners.others, grown)
        if backward.stray and not backward.reached:
            return
        last = self._waiting[-1] if self._waiting else None
        if last is not None and not last.used and last.like(backward):
            last.absorb(backward, self._merge)
        else:
            self._waiting.append(backward)

    def used_by(self, optimizer: Optimizer) -> list[Backward]:
        """The backward passes whose gradients an optimizer is about to use."""
        candidates, running, owners = self._waiting, self.running, self._owners
        if running is not None:
            candidates = [*candidates, running]
        for known in owners.states:
            if known.of() is optimizer:
                state = known
                break
        else:
            state = owners.add(optimizer, candidates)
        if running is not None:
            running.see_reach(owners.states)
        found, fresh = [], False
        for backward in candidates:
            if backward.reached is None or state in backward.reached:
                found.append(backward)
                fresh |= not backward.used
        if fresh and self._parameter_hooks.hooked:
            self._parameter_hooks.step_ends()
        if not fresh:
            state.choose()
        elif self._untold and all([b.used or b.loss is None for b in found]):  # noqa: C419 - as above
            self._untold = False
            _log.warning("overview/loss is not written for gradients of autograd.grad: no backward() says what it was")
        return found

    def left(self, optimizer: Optimizer) -> bool:
        """Whether its gradients are not zeroed."""
        return any(state.of() is optimizer and not state.zeroed(thorough=True) for state in self._owners.states)

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
        if self._steps.clock.fresh:
            self._number = None if compiles_backward() else number_of_backward()
        elif self._parameter_hooks.wanted:
            self.listen()
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
        others = self._owners.others
        held = others is not None and not others.zeroed(thorough)
        for backward in waiting if others is not None else ():
            backward.see_beyond(held and backward.beyond)
        if not zeroed:
            return
        self._waiting = []
        if len(zeroed) == len(states) and not (thorough or held):  # the plain loop
            return
        dropped: list[Backward] = []
        for backward in waiting:
            if backward.reached is not None:
                backward.reached.difference_update(zeroed)
            unseen = backward.reached is None
            gone = len(zeroed) == len(states) and not self._owners.hides() if unseen else not backward.reached
            if not gone or backward.beyond or backward.elsewhere:
                self._waiting.append(backward)
            elif not backward.used:
                dropped.append(backward)
        for backward in dropped[1:]:
            dropped[0].absorb(backward, self._merge)  # one step was skipped, however many there were
        if dropped:
            self._drop(dropped[0])

    def _drop(self, backward: Backward) -> None:
        """Nobody used its gradients: a skipped step where they were not finite, or a GradScaler backs off."""
        sign, flag, scaled = backward.sign, backward.flag, self._sources.scaled
        fell = None if sign is not None else scaled.backed_off(backward.scale, look=self._steps.clock.fresh)
        if fell is not None and not fell.is_cpu:
            flag, fell = fell if flag is None else fell | flag.to(fell.device), None
        self._steps.skip(sign, flag, fell is not None and on_host(fell) > 0)

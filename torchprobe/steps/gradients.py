"""Backward passes, heard of as they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from weakref import ReferenceType, ref

from torch import Tensor, nn

from torchprobe.capture import compat
from torchprobe.capture.backward import in_recomputation, loss_value, plain_root, roots
from torchprobe.capture.compiled.tracing import compiles_backward
from torchprobe.capture.gate import Guard, protected
from torchprobe.capture.parameter_hooks import ParameterHooks, number_of_backward
from torchprobe.capture.pipelining import in_schedule
from torchprobe.capture.source import UNDECIDED, Pass
from torchprobe.capture.sources import Sources
from torchprobe.steps.backward import Backward
from torchprobe.steps.steps import Steps
from torchprobe.steps.waiting import Waiting

_FIRST = 16  # steps of which sampled ones do not count as listened in, where parts are compiled


class Gradients:
    """Hears each backward pass begin and end; what becomes of its gradients is `waiting`'s.

    running: the one that runs. compiled: one ran whose end torch does not tell, as that of compiled autograd.
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
        self._parameter_hooks = ParameterHooks(self._reached)
        self.waiting = Waiting(model, steps, sources, self._parameter_hooks)
        self._owners = self.waiting.owners
        self._opener: nn.Parameter | None = None  # at which the backward pass was heard of
        self._number: int | None = None  # of the last one, where torch counts them
        self._recomputing: list[ReferenceType[Tensor]] = []  # what that was called on in which checkpoints run again
        self._first = True  # none was heard of that is for parameters
        self._unheard = False  # others may have run before the one that runs
        self._passed_on = (0, True)  # how many were not heard of before the last one, and whether that is in doubt
        self.compiled = False
        self._task = compat.plain_state()[0]

    @protected
    def heard_backward(self, passing: Pass) -> int | None:
        """A gradient reaches an output of a pass. The number of the backward pass, unless another output told it."""
        task, running = self._task(), self.running
        if passing.task == task and running is not None:
            return None
        if running is None or (running.task != task and not in_recomputation()):
            running = self.begin(None if task == -1 else task)
        elif self._tells_more(passing, running):
            self._owners.look(self._owners.living(), unheard=self._unheard)
        if passing.kind is UNDECIDED:
            self._train(passing)
        running.add(passing)
        return task

    def _tells_more(self, passing: Pass, running: Backward) -> bool:
        """Whether it was heard of at a parameter or part so far: gradients that were there before this tell nothing."""
        if not running.passes:
            return self._opener is not None
        return not passing.beside and all(one.beside for one in running.passes)

    def _reached(self, parameter: nn.Parameter) -> None:
        if self.running is None:  # no gradient has reached an output
            self._heard_at(parameter)

    @protected
    def _heard_at(self, parameter: nn.Parameter) -> None:
        if in_recomputation() or in_schedule():
            return
        root = plain_root()
        if root is not None or roots(self._sources.running.thread).call != "grad":
            self.begin(self._task(), root)
            self._opener = parameter

    def begin(self, task: int | None, root: Tensor | None = None) -> Backward:
        """A backward pass begins; one that is thought to run has ended without a word. root: see `plain_root`."""
        if self.running is not None:
            self.end(self.running)
        skipped, doubtful = self._passed_on
        if self._number is not None and task is not None:
            before, self._number = task - self._number - 1, task
            before -= in_recomputation() if before else 0  # it runs inside of those
            if before or self._parameter_hooks.hooked:
                doubtful |= self._parameter_hooks.heard(before)
            skipped += before
        self._unheard = skipped > 0
        root = plain_root() if root is None else root
        backward = (
            Backward(task, loss_value(root)) if root is not None and not self._recomputing else self._of_roots(task)
        )
        self.running, owners, waiting = backward, self._owners, self.waiting.passes
        states, as_ever = owners.states, owners.others is None and not owners.early.learns
        as_ever = as_ever and len(states) == len(waiting) == 1 and waiting[0].used
        if as_ever and not doubtful and states[0].of() is not None and not states[0].look():
            waiting.clear()
        else:
            states = owners.living()
            if waiting:
                self.waiting.drop_zeroed(states)
            owners.look(states, bool(self._steps.current.due), self._unheard)
            if self._first and owners.early.holds_old():
                backward.lose()
            if doubtful and not in_schedule():
                hidden = skipped and owners.early.ids
                backward.doubt({s for s in states if hidden or s.filled(all_of_them=not skipped)}, states)
        adds_nothing = backward.stray or backward.again
        self._passed_on = (skipped, doubtful) if adds_nothing else (0, False)
        self._first &= adds_nothing
        if self._steps.current.due:
            self._sources.backward_begins(self._steps.current.due, self._owners.early.ids)
        if self._watch.timing is not None:
            self._watch.backward_begins()
        self.compiled = not compat.at_end_of_backward(partial(self.end, backward))
        return backward

    def _of_roots(self, task: int | None) -> Backward:
        call = roots(self._sources.running.thread)
        tensors = [root for root in call.tensors if isinstance(root, Tensor)]
        if self._recomputing and [id(root()) for root in self._recomputing] == [*map(id, tensors)]:
            call = call._replace(inner=True)
        # A checkpoint has a backward pass of its own, and one that is running may have several.
        self._recomputing = [*map(ref, tensors)] if in_recomputation() else []
        loss = None if call.value is None or call.inner else loss_value(call.value)
        kept = call.for_parameters or call.again
        elsewhere = call.call == "grad" and kept
        if elsewhere and (call.inner or call.value is not None):
            self._sources.parameters.left.come_apart()
        elif elsewhere:
            self.waiting.saw_grad()
        if call.parts > 1:
            self._steps.current.divide_by(call.parts)
        return Backward(task, loss, elsewhere, not kept, call.inner, call.again)

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
            began = self._parameter_hooks.found(self._opener)
            if not began and all(one.used for one in self.waiting.passes):
                backward.lose()  # gradients may have been zeroed, and some were there again when it was heard of
        self._opener = None
        if self._sources.scaled.found is not None:
            backward.scaled_by(self._sources.scaled.scale())
        self.waiting.add(backward, self.compiled)
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
        if self._parameter_hooks.hooked or not (self.compiled or compiles_backward()):
            running, clock = self._sources.running, self._steps.clock
            elsewhere = self._steps.by_methods and self._sources.armed
            if running.in_parts and clock.completed < clock.origin + _FIRST:
                elsewhere = running.sampled
            self._parameter_hooks.begin_step(self._owners.parameters, elsewhere)

    def release(self) -> None:
        """No hook is left on a parameter, and no parameter is held."""
        self._parameter_hooks.forget()
        self._owners.forget()
        if self._check is not None:
            self._check.forget()

    def pass_returned(self) -> None:
        """Before the first backward pass: a compiler may have run some of its own as it traced, which took numbers."""
        if self._first and self._number is not None and self._sources.running.compiled:
            self._number = number_of_backward()

    def step_begins(self) -> None:
        """Another step: gradients of the one before may still be there."""
        if self._steps.clock.fresh:
            self._number = None if compiles_backward() else number_of_backward()
            self._owners.early.remember(self._owners.parameters())
        elif self._parameter_hooks.wanted:
            self.listen()
        waiting = self.waiting.passes
        if len(waiting) != 1 or not waiting[0].used or waiting[0].elsewhere:  # else what it kept was taken already
            self.waiting.step_begins()

"""Forward and backward passes of the model: which of them count, and for which step."""

from __future__ import annotations

from collections.abc import Mapping
from threading import enumerate as living_threads
from threading import get_ident
from typing import Any
from weakref import ref

from torch import Tensor, is_grad_enabled, nn

from torchprobe.capture import compat
from torchprobe.capture.compiled.operators import PassHook
from torchprobe.capture.gate import Guard, protected
from torchprobe.capture.optimizers import STEP
from torchprobe.capture.outputs import hearable_tensors
from torchprobe.capture.root_hooks import PassHooks
from torchprobe.capture.source import DROPPED, TRAINING, UNDECIDED, VALIDATION, Dropped, Pass, Undecided
from torchprobe.capture.sources import Sources
from torchprobe.messages import log as _log
from torchprobe.steps.backward import Backward
from torchprobe.steps.gradients import Gradients
from torchprobe.steps.steps import Steps
from torchprobe.steps.waiting import WithoutGraph

_MOST_OUTPUTS = 64  # tensors of an output through which a backward pass is looked for


class Passes:
    """Tells training passes from validation, and keeps what they gave until an optimizer uses their gradients."""

    def __init__(self, model: nn.Module, guard: Guard, steps: Steps, sources: Sources) -> None:
        self.guard = guard
        self._steps = steps
        self._clock = steps.clock
        self._sources = sources
        self._running = sources.running
        self._check = sources.nan_check
        self._watch = steps.watch
        self.gradients = Gradients(ref(model), guard, steps, sources, self._train)
        self._dropped, self._undecided = Dropped(), Undecided()
        self._validated: set[int] = set()  # parts, in the validation that runs
        self.unheard: list[Pass] = []  # training passes whose backward passes cannot be heard of
        self.frozen = WithoutGraph()  # those of parts, until another part's comes that has one
        self._first: Pass | None = None  # it counts if no optimizer is in sight
        self._thread, self._said, self._observer = 0, False, ref(self.gradients)  # the thread that trains
        self._running.ask(self._of_backward, self._of_graph, self._of_call)
        self.hooks = PassHooks(model, self, self._running, steps.settle_parameters)

    def enter_pass(self, module: nn.Module, grad_enabled: bool) -> None:
        """A forward pass begins."""
        kind = (TRAINING if module.training else UNDECIDED) if grad_enabled else VALIDATION
        thread = get_ident()
        if thread != self._thread and self._thread and self._is_foreign():
            return
        if self._dropped.any:
            self.settle_dropped()
        clock = self._clock
        if kind is TRAINING:
            self._thread = thread
            if not clock.optimizer_seen or clock.by_forward:
                self._look_at_clock()
            if not clock.by_forward and clock.training_pass():
                self.begin_step()
            elif self._steps.current.forwards and not (clock.by_forward or clock.manual or compat.running(STEP)):
                self.gradients.waiting.take_back(self._steps.current)  # its optimizer's step raised
        else:
            self._steps.look_for_optimizers()
            if id(module) in self._validated:  # another batch
                self._steps.validated({})
        if clock.by_forward:
            kind = TRAINING if module.training else VALIDATION
            if clock.training_pass():
                self.begin_step()
        due = self._steps.current.due if kind is TRAINING else self._due(kind)
        passing = Pass(kind, due, self._observer, self._dropped)
        self._running.enter(passing)
        if kind is TRAINING and self._watch.timing is not None:  # several parts have the same examples
            (self._watch.forget_passes if self._steps.by_methods else self._watch.enter)()
        may_trace = clock.completed == clock.origin
        if due or may_trace or self._sources.armed:
            self._sources.enter(passing, module, may_trace)

    def _look_at_clock(self) -> None:
        """A training pass, and no optimizer was seen yet, or forward passes are the clock for want of one."""
        clock = self._clock
        if not clock.optimizer_seen and clock.passes_seen and not clock.by_forward:
            self._look_for_optimizers()
        elif clock.by_forward and clock.completed == 1 and self._steps.optimizer_alive():
            self._steps.forget_passes()

    def _look_for_optimizers(self) -> None:
        """A second training pass and no step of an optimizer: with none in sight, the first one was a step."""
        first, self._first = self._first, None
        self._steps.look_for_optimizers()
        if self._clock.by_forward and first is not None:
            self._steps.current.use(*self.gradients.waiting.passes)
            self._count(first)

    def _due(self, kind: str) -> frozenset[Any]:
        steps = self._steps
        if kind is VALIDATION:
            return steps.due_in_validation
        following = steps.due_in(self._clock.following)
        return following if not steps.due_in_validation else following | steps.due_in_validation

    def leave_pass(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """A forward pass has returned."""
        passing = self._running.leave()
        if passing is None:
            return
        if passing.kind is TRAINING and self._watch.timing is not None and not self._steps.by_methods:
            self._watch.leave(args, kwargs, output)
        if passing.due:
            self._sources.leave(passing, module, args, kwargs, output)
            self.gradients.pass_returned()
        if type(output) is Tensor and output.grad_fn is not None and passing.kind is not VALIDATION:
            hook = PassHook(passing) if passing.due or self.gradients.compiled else passing
            compat.hear_gradient(output, hook)  # by far the most frequent, so without the call of `_hook`
            heard = True
        else:
            heard = passing.kind is not VALIDATION and self._listen(passing, output)
        if heard and self.frozen.passes:
            passing.follow(self.frozen.take())
        if passing.kind is TRAINING and self._check and (sign := self._check.output(output)) is not None:
            passing.saw(sign)
        if self._clock.by_forward:
            self._count(passing)
        elif passing.kind is VALIDATION:
            is_part = module is not self._sources.model()
            self._validated.update([id(module)] if is_part else ())
            self._steps.validated(passing.take(), more=is_part)
        elif passing.kind is UNDECIDED:
            self._undecided.add(passing, self._clock.completed)
        elif not heard:
            if not self.frozen.add(passing, module, whole=module is self._sources.model()):
                self.unheard.append(passing)
        elif not self._clock.optimizer_seen:
            self._first = passing

    def raise_pass(self) -> None:
        """A forward pass has raised: it leaves nothing behind."""
        passing = self._running.leave()
        if passing is not None:
            self._sources.exit(passing)
            passing.decide(DROPPED)

    def leave_recomputation(self, output: Any) -> None:
        """A checkpoint around the whole model has run it again: a reentrant one's graph begins only here."""
        passing = next((p for p in reversed(self.unheard) if p.task is None), None)
        if passing is not None and self._listen(passing, output):
            self._sources.recomputed(passing, output)

    def leave_part(self, output: Any) -> None:
        """A part was called that may begin a step."""
        alone = self._clock.ended and not self._clock.by_forward and self._running.passing is None
        if alone and self._thread in (0, get_ident()) and hearable_tensors(output) and not compat.in_backward():
            self._clock.training_pass()
            self.begin_step()

    def _listen(self, passing: Pass, output: Any) -> bool:
        """Whether a backward pass through the output will be heard of."""
        heard = hearable_tensors(output)[:_MOST_OUTPUTS]
        for tensor in heard:
            tensor.register_hook(self._hook(passing))
        return bool(heard)

    def _hook(self, passing: Pass) -> Pass | PassHook:
        return PassHook(passing) if passing.due or self.gradients.compiled else passing

    def _count(self, passing: Pass) -> None:
        """No optimizer is in sight: a pass is a step."""
        self._steps.count_pass(is_grad_enabled())
        if passing.kind is TRAINING:
            self._steps.current.keep(Backward.unheard(passing))
        else:
            self._steps.validated(passing.take())

    def begin_step(self, in_backward: bool = False) -> None:
        """The machine has begun a step. in_backward: by a backward pass, which may run through more passes."""
        if self._dropped.any or self._undecided.passes or self._steps.has_validated:
            self.settle(in_backward)
        self._validated.clear()
        if self.unheard or self.frozen.passes:
            self.unheard = [p for p in self.unheard if p is self._running.passing]
            self.frozen.passes.clear()
        self._steps.begin()
        self.gradients.step_begins()

    def finish(self) -> None:
        """What has run so far is to be written, with nothing to follow: a pass may be all there is."""
        if self._first is not None and not self._clock.optimizer_seen:
            self._look_for_optimizers()
        self.settle()

    def settle(self, in_backward: bool = False) -> None:
        """The step ends, or what it has is to be written: passes in evaluation mode count as validation."""
        self.settle_dropped()
        if self._undecided.passes:
            for passing, weights in self._undecided.take(self._clock.completed if in_backward else None):
                self._steps.validated(passing.take(), weights)
        self._steps.end_validation()

    def settle_dropped(self) -> None:
        """Passes whose graphs are gone."""
        for kind, kept, sign in self._dropped.take() if self._dropped.any else ():
            if kind is UNDECIDED:
                self._steps.validated(kept)
            elif sign is not None:
                self._steps.skip(sign if sign.flag is None else None, sign.flag)

    def count_all(self) -> None:
        """The user ends a step in which no optimizer has stepped: its passes count all the same."""
        step, first = self._steps.current, self._first
        step.use(*self.gradients.waiting.passes)
        unheard = self.take_unheard()
        if unheard is not None:
            step.keep(unheard)
        if first is not None and first.task is None:
            self._first = None
            step.keep(Backward.unheard(first))

    def take_unheard(self) -> Backward | None:
        """Passes whose backward passes could not be heard of, as one: an optimizer steps, so that there were some."""
        passes, self.unheard = self.unheard + (self.frozen.take() if self.frozen.passes else []), []
        if self._running.compiled and self._steps.current.due:
            passes += self._sources.take_from_graphs(self._pass_of_graph())
        return Backward.unheard(*passes) if passes else None

    def _train(self, passing: Pass) -> None:
        """A backward pass runs through a pass in evaluation mode: it was training."""
        passing.decide(TRAINING)
        self._thread = self._running.thread  # this one may be a device's
        if not self._clock.by_forward and self._clock.training_pass():
            self.begin_step(in_backward=True)
        self._watch.forget_passes()

    @protected
    def _of_backward(self) -> Pass | None:
        """The pass that the running backward pass runs through.

        It may be a checkpoint's, that is not heard of yet; or a compiled graph's, whose own hooks run before ours.
        """
        running = self.gradients.running
        if running is not None and running.passes:
            return None if running.stray else running.passes[-1]
        task = compat.backward_id()
        if not self._running.compiled or task is None:
            return self.unheard[-1] if self.unheard else None
        if running is None or running.task != task:
            running = self.gradients.begin(task)
        running.add(self._pass_of_graph())
        return running.passes[-1]

    @protected
    def _of_graph(self, training: bool) -> Pass | None:
        """A pass for what a compiled function around the model hands over: no hook of the root runs there."""
        if not training:
            return None
        if not self._clock.by_forward and self._clock.training_pass():
            self.begin_step()
        if not self.unheard or self.unheard[-1].task is not None:
            self.unheard.append(self._pass_of_graph())
        return self.unheard[-1]

    @protected
    def _of_call(self, module: nn.Module | None, output: Tensor) -> Pass | None:
        """A pass for one module that other methods than the model's `forward` call: it counts if its gradients do."""
        if output.grad_fn is None or self._clock.by_forward or self._thread not in (0, get_ident()):
            return None
        if self._clock.training_pass():
            self._steps.train_by_methods(not self._running.compiled and self.hooks.hear_part(module))
            self.begin_step()
        passing = self._pass_of_graph().stand_beside()
        output.register_hook(self._hook(passing))
        return passing

    def _pass_of_graph(self) -> Pass:
        """Of this step or, where a step has ended and nothing of a forward pass was recorded, perhaps the next one."""
        self._watch.forget_passes()
        due, clock = self._steps.current.due, self._clock
        due = due | self._steps.due_in(clock.following) if clock.ended else due
        return Pass(TRAINING, due, self._observer, self._dropped)

    def _is_foreign(self) -> bool:
        """Whether the thread that trains, which is another one, is alive."""
        if any(living.ident == self._thread for living in living_threads()):
            if not self._said:
                self._said = True
                _log.warning("passes of the model in another thread than the one that trains are left alone")
            return True
        return False

    def detach(self) -> None:
        """Take every hook off. Safe to call twice."""
        self.hooks.remove()
        self.gradients.release()
        self.unheard, self.frozen, self._first = [], WithoutGraph(), None

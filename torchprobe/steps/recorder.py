"""The training thread's side of a run: optimizer steps and the user's calls in, complete steps out."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.buffer.outlet import Outlet, Overview
from torchprobe.buffer.step import Piece
from torchprobe.capture.backward import loss_scale
from torchprobe.capture.gate import Guard, Meter, protected
from torchprobe.capture.optimizers import OptimizerHooks, held_by, parameter_ids
from torchprobe.capture.sources import Sources
from torchprobe.messages import log as _log
from torchprobe.records import Value
from torchprobe.rules.alert import TrainingAlert
from torchprobe.rules.watch import Watch
from torchprobe.statistics.dtypes import on_host
from torchprobe.steps.cadence import Plan
from torchprobe.steps.passes import Passes
from torchprobe.steps.steps import Steps

_IN_EVALUATION = (
    "the model is in evaluation mode, and neither it nor a part of it is called: what its methods call inside of parts "
    "is seen in training mode alone, after model.train()"
)
_BY_PARTS = (
    "in training modules inside of the model were called and not the model itself, as by self.forward(x) or self.net(x)"
    " in a method of it, where predictions and attention are not seen: call the model, self(x), or instrument the "
    "module that is called"
)


class Recorder:
    """Follows the optimizers' steps, and puts what the user logs where it belongs."""

    def __init__(
        self, model: nn.Module, plan: Plan, sources: Sources, outlet: Outlet, meter: Meter, watch: Watch, ranks: int
    ) -> None:
        self.guard = Guard(meter, outlet.drain.stopped, (TrainingAlert,))
        self._plan = plan
        self._sources = sources
        self._watch = watch
        self._outlet = outlet
        self._steps = Steps(plan, sources, outlet, Overview(outlet, meter), meter, ranks)
        self.clock = self._steps.clock
        self._passes = Passes(model, self.guard, self._steps, sources)
        self._steps.due_in(1)  # now: other hooks on the model itself come after those that begin a pass
        self._optimizer_hooks = OptimizerHooks(self._parameter_ids, self)
        self._said_unheard = self._repeats = False
        self._own: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()  # whether passes in graphs come just before
        self.guard.tell_while_captured(self._captured)
        clock = self.clock
        watch.follow_clock(lambda: (clock.completed, clock.number), lambda: clock.completed)

    # ---- optimizer steps

    def other_steps(self) -> None:
        """One of another model's: what runs between two steps of this one is no wait."""
        self._steps.watch.interrupt()

    def before_step(self, optimizer: Optimizer, has_closure: bool) -> bool:
        """The step begins; gradients are final, but for what other hooks do, unless a closure makes them."""
        clock = self.clock
        if clock.by_forward:
            self._steps.forget_passes()
        own_passes = self._sources.running.compiled and self._has_own_passes(optimizer)
        if clock.stepped and clock.begin(optimizer, has_closure or own_passes):
            self._passes.begin_step()
            if not self._sources.running.thread:
                self._hear_of_none()
        watch = self._steps.watch
        if watch.timing is not None:
            watch.optimizer_begins(has_closure)
        due = self._steps.current.due
        if due:
            self._steps.settle_parameters()
        if "found_inf" in optimizer.__dict__ and _skips(optimizer):
            return False
        if not has_closure:
            self._use(optimizer, final=True, others=not own_passes)
        self._repeats = bool(due) and not has_closure and self._uses_nothing_more(optimizer)
        if not due or self._repeats:
            return False
        self._sources.parameters.before_step(optimizer, due)
        if self._sources.diagnosis.watchers:
            self._sources.diagnosis.before_step(optimizer, due)
        return not has_closure

    @protected
    def gradients_final(self, optimizer: Optimizer) -> None:
        """All other hooks have run."""
        step = self._steps.current
        step.extend(self._sources.parameters.gradients(optimizer, step.due, step.parts))

    def after_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Parameters are updated; perhaps that completed a step."""
        step = self._steps.current
        if "found_inf" in optimizer.__dict__ and self._skipped(optimizer):
            return
        watch = self._steps.watch
        if watch.timing is not None:
            watch.optimizer_ends()
        if has_closure:
            self._use(optimizer, final=False)
            step.extend(self._sources.parameters.gradients(optimizer, step.due, step.parts))
        if step.due and not self._repeats:
            step.extend(self._sources.parameters.after_step(optimizer, step.due))
            step.compute_on(self._sources.parameters.same_data)
            if self._steps.by_methods and not (self._sources.running.compiled or self._sources.in_place.used):
                self._follow_parts(step.due)
        for tag, value in self._sources.optimizer_values(optimizer, step.light):
            if type(value) is float:
                step.values[tag] = value
            else:
                step.put(tag, value)
        self._steps.optimizer_stepped(optimizer)
        if self._watch.stop is not None:
            self._watch.check()

    def _uses_nothing_more(self, optimizer: Optimizer) -> bool:
        """Whether others have used up its gradients in this step, and tell all.

        As optimizers that step in backward, while one that does nothing stands for them where schedules want one.
        """
        others = self.clock.stepped_by if self._steps.current.trained else []
        used = {id(p) for other in others for p in held_by(other)}
        return bool(used) and all(p.grad is None and id(p) in used for p in held_by(optimizer))

    def _has_own_passes(self, optimizer: Optimizer) -> bool:
        """Whether forward passes that no hook saw, in graphs, came since an optimizer stepped: this one's own.

        As where they would have been seen, in steps whose graphs were sampled; else where a backward pass has run.
        """
        if self._sources.running.thread:
            return False
        if not self.clock.stepped or self._sources.running.sampled:
            self._own[optimizer] = not self.clock.stepped
        waiting = self._passes.gradients.waiting
        own = self._own.get(optimizer, waiting.heard)
        if own and self.clock.stepped and not waiting.heard:
            waiting.missed_one()
        return own

    def _hear_of_none(self) -> None:
        if self.clock.fresh:
            self._passes.gradients.listen()
        if not self._said_unheard:
            self._say_unheard()
        model = self._sources.model()
        if model is not None and not model.training:
            if self.clock.fresh and not self._sources.running.compiled:
                self._passes.hooks.follow_parts()
            for reporter in self._steps.current.due:
                if reporter.source in ("outputs", "output_gradients"):
                    reporter.explain(_IN_EVALUATION)

    def _follow_parts(self, due: frozenset[Any]) -> None:
        """The step was begun by a part that was called by itself: those that the model's methods call are heard now."""
        if self._passes.hooks.follow_parts() or self._sources.running.thread:
            return
        for reporter in due:  # it was a part inside of those
            if reporter.source in ("attention", "calibration", "uncertainty") and not reporter.reason:
                reporter.explain(_BY_PARTS)

    def _say_unheard(self) -> None:
        """An optimizer steps, and no forward pass was heard of: some classes call themselves without hooks."""
        model = self._sources.model()
        kind: Any = type(model)
        own = kind.__call__ is not nn.Module.__call__ and kind.forward is not nn.Module.forward
        if model is not None and not self._sources.running.compiled and own:
            self._said_unheard = True
            why = f"{kind.__name__}.__call__ runs no hooks of torch's, so that forward passes are not seen"
            self._sources.predictions.explain(f"{why}: call session.log_predictions(probs, targets)")
            _log.warning("%s: no activations, attention, uncertainty or calibration of them is recorded", why)

    def _skipped(self, optimizer: Optimizer) -> bool:
        """A fused optimizer decides by itself to skip: whether it did, as far as host memory tells."""
        if not _skips(optimizer):
            found_inf = getattr(optimizer, "found_inf", None)
            if isinstance(found_inf, Tensor) and not found_inf.is_cpu:
                self._steps.current.void(found_inf.clone())
            return False
        self.clock.skip()
        gradients = self._passes.gradients
        for backward in gradients.waiting.used_by(optimizer, gradients.running):
            backward.give_up()
        return True

    def _use(self, optimizer: Optimizer, final: bool, others: bool = True) -> None:
        """The optimizer uses the gradients of the backward passes that reached its parameters.

        others: perhaps those that another one has used.
        """
        step, gradients = self._steps.current, self._passes.gradients
        found = gradients.waiting.used_by(optimizer, gradients.running, final)
        for backward in found:
            if not backward.used or backward.counted == step.number:
                break
        else:  # gradients came that were not heard of, and those before may have been zeroed
            left = gradients.waiting.left(optimizer)
            found = found if left and others and self.clock.shares_passes(optimizer) else []
            if left and not found and gradients.waiting.unheard(optimizer):
                step.miss_loss()
        for backward in found:
            if (backward.sign is not None or backward.flags) and not backward.used:
                self._steps.put_signs(backward)
            step.use(backward)
        if self._passes.unheard or self._passes.frozen.passes or self._sources.running.compiled:
            unheard = self._passes.take_unheard()
            if unheard is not None:
                step.keep(unheard)
        scale = None if step.loss is None else loss_scale(optimizer)
        if scale is not None:
            self._sources.scaled.see_step()
            step.scale_by(scale)

    def _captured(self, method: str, args: tuple[Any, ...]) -> None:
        """A call while the user captures a graph: what its replays are to add up must be known before they begin."""
        self._sources.captured(method, args)
        if self._sources.in_place.used:
            self._steps.train_by_methods()

    # ---- what the user asks for

    @protected
    def log(self, tag: str, value: Value | Tensor) -> None:
        """A value of the iteration that runs now, or of the one that has just ended."""
        self._steps.put(tag, value)

    @protected
    def log_rows(self, piece: Piece | None) -> None:
        """Rows of the iteration that runs now, or of the one that has just ended; the later ones of a name count."""
        if piece is not None:
            self._steps.current.replace(piece)

    @protected
    def log_predictions(self, predictions: Tensor, targets: Tensor) -> None:
        """Predictions and targets of the pass that came last: training's, or validation's."""
        self._steps.current.extend(
            self._sources.predictions.given(predictions, targets, self._sources.running.training)
        )

    @protected
    def next_step(self) -> None:
        """The user's own clock: from now on nothing else ends a step."""
        if self.clock.number == 0 and self.clock.training_pass():
            self._passes.begin_step()
        if not self._steps.current.trained:
            self._passes.count_all()
        self.clock.next_step()
        self._passes.begin_step()

    @protected
    def flush(self) -> None:
        """Hand over what the open step has so far."""
        self._passes.finish()
        self._steps.write()

    @protected
    def close(self) -> None:
        """Hand over everything; of an unfinished step what was logged, but no half statistics."""
        self._passes.finish()
        self._steps.finish()
        self.guard.stop()

    @protected
    def resume(self) -> None:
        """The clock and the plan were set to where another process stopped: its next step is the one that runs now."""
        self._steps.resume()

    def faults(self) -> list[str]:
        """Probes that are switched off, and why."""
        return [*dict.fromkeys(r.gate.fault for r in self._plan.reporters if r.gate.failed)]

    def uncovered_attention(self) -> list[str]:
        """What attention was not recorded, and how often."""
        return self._sources.uncovered_attention()

    def detach(self) -> None:
        """Take every hook off the model and the optimizers. Safe to call twice."""
        self.guard.stop()
        self._passes.detach()
        self._optimizer_hooks.remove()
        self._sources.detach()

    def _parameter_ids(self) -> set[int]:
        return parameter_ids(self._sources.model())


def _skips(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer, which decides by itself, will skip the step: as far as host memory tells."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, Tensor) and found_inf.is_cpu and bool(on_host(found_inf.any()))

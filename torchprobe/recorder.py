"""The state machine of a run on the training thread: passes and optimizer steps in, sealed steps out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.buffer.outlet import Outlet
from torchprobe.buffer.step import Piece
from torchprobe.capture.captures import Captures
from torchprobe.capture.clock import Clock
from torchprobe.capture.gate import Meter
from torchprobe.capture.loss import loss_scale
from torchprobe.capture.optimizers import OptimizerHooks, parameter_ids
from torchprobe.capture.outputs import tensors_in
from torchprobe.capture.passes import PassHooks
from torchprobe.capture.skips import SkipDetector, first_trained
from torchprobe.ledger import Ledger, Open
from torchprobe.overview import Overview
from torchprobe.plan import Plan
from torchprobe.protection import protected
from torchprobe.records import Value
from torchprobe.rules.watch import Watch


class Recorder:
    """Gathers what belongs to a step and hands it to the drain when the next one begins.

    The step that has just ended stays open until then, for what is logged after `optimizer.step()`
    and for a validation pass.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, captures: Captures, outlet: Outlet, meter: Meter, watch: Watch
    ) -> None:
        self.pid = os.getpid()
        self.stopped = False
        self.meter = meter
        self.clock = Clock()
        self._model: ReferenceType[nn.Module] = ReferenceType(model)
        self._plan = plan
        self._captures = captures
        self._outlet = outlet
        self._watch = watch
        clock, current = self.clock, captures.modules.current
        watch.progress = lambda: (clock.completed, current.entered)
        watch.completed = lambda: clock.completed
        self._steps = Ledger(outlet)
        self._of_optimizer: list[Piece] = []  # what a running optimizer step uses
        self._skips = SkipDetector(self._model)
        self._forward_unclocked = False  # a pass with gradients that is a step if no optimizer is in sight
        self._scale: Tensor | None = None
        self._overview = Overview(outlet, meter)
        self._pass = captures.modules.current
        self._pass_hooks = PassHooks(model, self, self._pass)
        self._optimizer_hooks = OptimizerHooks(self._parameter_ids, self)
        self._open_gates()

    # ---- forward passes

    @protected
    def enter_pass(self, module: nn.Module, grad_enabled: bool) -> None:
        """A forward pass begins. Training closes the step before it; validation belongs to that step."""
        self._pass.seen = True
        self._pass.entered += 1
        trained = self._pass.training
        # Without an optimizer in sight, a model in training mode is what the user wants to look at.
        self._pass.training = module.training and (grad_enabled or not self.clock.has_optimizer)
        if self._pass.training:
            self._begin_training_pass(grad_enabled, trained)
        due = self._steps.current.due if self._pass.training else self._plan.due_in_validation
        self._captures.enter(module, bool(due), self._pass.training, self._may_trace)

    def _begin_training_pass(self, grad_enabled: bool, trained: bool) -> None:
        self._settle_last_pass()
        if (grad_enabled and not trained) or self._one_pass_before_training():
            self._start_training()
        if self._skips.gradients_were_dropped():
            self._skip()
        self._end_validation()
        if not self.clock.may_grow:
            self._steps.seal_last()
        self._pass.began = True

    def _end_validation(self) -> None:
        """What a whole validation pass adds up to belongs to the step before it."""
        pieces = self._captures.predictions.collect(training=False)
        if pieces:
            self._validated().buffer.pieces += pieces
        self._plan.validation_ended()

    def _validated(self) -> Open:
        resumed = self.clock.fresh and self.clock.origin > 0  # whose last step is the other process's
        return self._last() if self.clock.has_optimizer and not resumed else self._steps.current

    @protected
    def leave_pass(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward pass has ended; by itself it is a step only while no optimizer is in sight."""
        watched = next((t for t in tensors_in(output) if t.requires_grad), None)
        if watched is not None:
            watched.register_hook(self._on_backward)
        if watched is None:
            self._look_for_optimizers()
        self._captures.predictions.on_output(module, args, kwargs, output)
        if self._pass.training:
            self._captures.loss.on_output(output, kwargs)
            self._captures.health.on_output(output)
        else:
            self._validated().buffer.pieces += self._captures.collect(self._plan.due_in_validation, training=False)
            self._plan.validated()
        if self._pass.training and watched is not None:
            self._forward_unclocked = self.clock.by_forward
        elif self.clock.by_forward:
            self._tick()

    @protected
    def leave_recomputation(self, output: Any) -> None:
        """A checkpoint around the whole model has run it again: a reentrant one's graph begins only here."""
        watched = next((t for t in tensors_in(output) if t.requires_grad), None)
        if watched is not None:
            watched.register_hook(self._on_backward)
            self._captures.predictions.on_recomputed(output)

    @protected
    def pass_is_over(self) -> None:
        """A forward pass has ended or raised: nothing of ours stays entered."""
        self._captures.leave()

    @protected
    def _on_backward(self, gradient: Tensor) -> None:
        if not self._skips.begins_backward():
            return
        if self._skips.gradients_were_dropped():
            self._skip()
        self._skips.backward_ran()
        self._pass.began = True
        self._captures.on_backward()

    # ---- optimizer steps

    @protected
    def before_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Gradients are final, unless a closure makes them."""
        self._start_training()
        if self.clock.begin(optimizer, self._pass.began):
            self._roll()
        due = (self._last() if self.clock.joins_last_step(optimizer) else self._steps.current).due
        self._skips.in_closure, self._of_optimizer = has_closure, []
        if not has_closure:
            self._captures.health.before_step(optimizer)
        if due:
            self._scale = loss_scale(optimizer)
            self._captures.parameters.remember(optimizer, due)
            if not has_closure:
                self._of_optimizer += self._captures.parameters.gradients(optimizer, due)

    @protected
    def after_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Parameters are updated; perhaps that completed a step."""
        self._skips.in_closure = False
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer decides by itself to skip
        if isinstance(found_inf, Tensor) and found_inf.is_cpu and found_inf.numpy().any():
            self._skip()
            return
        if self.clock.joins_last_step(optimizer):
            self._steps.reopen_last(self.clock.completed)
        step = self._steps.current
        due, buffer = step.due, step.buffer
        if isinstance(found_inf, Tensor) and not found_inf.is_cpu:
            buffer.void = found_inf.clone()
        if due and has_closure:
            self._of_optimizer += self._captures.parameters.gradients(optimizer, due)
        if due:
            buffer.pieces += [*self._of_optimizer, *self._captures.parameters.after_step(optimizer, due)]
            buffer.same_data = self._captures.parameters.same_data
        for tag, value in self._captures.optimizer_values(optimizer, step.step).items():
            step.put(tag, value)
        self._captures.health.after_step(optimizer)
        self._skips.settled()
        self._forward_unclocked = False
        if self.clock.end(optimizer):
            self._roll()
        self._watch.check()

    # ---- what the user asks for

    @protected
    def log(self, tag: str, value: Value | Tensor) -> None:
        """A value of the iteration that runs now, or of the one that has just ended."""
        self._step_for_log().put(tag, value)

    @protected
    def log_rows(self, piece: Piece | None) -> None:
        """Rows of the iteration that runs now, or of the one that has just ended; the later ones of a name count."""
        if piece is not None:
            pieces = self._step_for_log().buffer.pieces
            pieces[:] = [other for other in pieces if other.heading != piece.heading] + [piece]

    @protected
    def log_predictions(self, predictions: Tensor, targets: Tensor) -> None:
        """Predictions and targets of the pass that came last: training's, or validation's."""
        training = self._pass.training
        piece = self._captures.predictions.given(predictions, targets, training)
        if piece is not None:
            (self._step_for_log() if training else self._validated()).add(piece)

    @protected
    def next_step(self) -> None:
        """The user's own clock: from now on nothing else ends a step."""
        first, self.clock.manual = not self.clock.manual, True
        if first and not self.clock.fresh and not self._pass.began:
            return  # the optimizer has just ended this very step
        self._tick()

    @protected
    def flush(self) -> None:
        """Hand over the completed step as it is."""
        self._settle_last_pass()
        self._end_validation()
        self._steps.seal_last()

    @protected
    def close(self) -> None:
        """Hand over everything; values of an unfinished step too, but no half statistics."""
        self._settle_last_pass()
        self._end_validation()
        if self.clock.underway:
            self._tick()
        if not self.clock.fresh:
            self._last().buffer.values.update(self._overview.values(self.clock.skipped))
        self._steps.seal_all()
        self.stopped = True

    @protected
    def resume(self) -> None:
        """The clock and the plan were set to where another process stopped: its next step is the one that runs now."""
        self._steps.resume(self.clock.completed)
        self._open_gates()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Passes and steps inside are none of the run's."""
        stopped, self.stopped = self.stopped, True
        try:
            yield
        finally:
            self.stopped = stopped

    def uncovered_attention(self) -> list[str]:
        """What attention was not recorded, and how often."""
        counts = [attention.uncovered for attention in self._captures.attention]
        return [f"{count} x {reason}" for part in counts for reason, count in part.items()]

    def detach(self) -> None:
        """Take every hook off the model and the optimizers. Safe to call twice."""
        self.stopped = True
        self._pass_hooks.remove()
        self._optimizer_hooks.remove()
        self._captures.detach()

    # ---- steps

    def _settle_last_pass(self) -> None:
        """A training pass is a step when no optimizer is in sight: neither has one stepped, nor can one."""
        if self._forward_unclocked:
            self._look_for_optimizers()
            if self.clock.by_forward:
                self._tick()
        self._forward_unclocked = False

    def _look_for_optimizers(self) -> None:
        """At the first pass: an optimizer that has yet to step makes a pass before it no step."""
        if self.clock.by_forward and self.clock.completed == 0 and self._optimizer_hooks.any_alive():
            self.clock.has_optimizer = True

    def _one_pass_before_training(self) -> bool:
        """Whether the only pass so far was counted for want of an optimizer, and there is one now."""
        return self.clock.by_forward and self.clock.completed == 1 and self._optimizer_hooks.any_alive()

    def _tick(self) -> None:
        self._skips.settled()
        self._forward_unclocked = False
        if self.clock.by_forward:
            self._end_validation()
        self.clock.tick()
        self._roll()

    def _roll(self) -> None:
        """The step that the clock has just counted is complete: gather it, and decide on the next."""
        ended = self._steps.current
        ended.buffer.pieces += [*self._captures.collect(ended.due, training=True, scale=self._scale), *self._loss()]
        signs, flags, ended.buffer.urgent = self._captures.health.signs()
        ended.buffer.values.update(signs)
        ended.buffer.pieces += flags
        ended.buffer.due = ended.due if self.clock.has_optimizer else ()
        if ended.step % self._outlet.flush_every == 0:
            ended.buffer.values.update(self._overview.values(self.clock.skipped))
        if ended.step == self.clock.origin + 1 and not self._pass.seen:
            self._follow_parts()
        self._steps.turn()
        self._scale, self._pass.began = None, False
        self._open_gates()

    def _loss(self) -> list[Piece]:
        loss = self._captures.loss.take(self._scale)
        rows = None if loss is None else loss.double().reshape(1, 1)
        return [] if rows is None else [Piece(probe, ["loss"], rows) for probe in self._plan.loss_probes]

    def _start_training(self) -> None:
        """Forward passes that were counted before training, such as a sanity check, are no steps of it."""
        if self.clock.by_forward and self.clock.completed:
            self._last().step = 0
            self._steps.seal_last()
            self.clock.completed, self._steps.current.step = 0, 1
            self._open_gates()

    def _skip(self) -> None:
        """An iteration that ended without a step: what it captured belongs to no step."""
        self.clock.skipped += 1
        self._captures.collect(self._steps.current.due, training=True)
        self._captures.loss.drop_batches()
        self._skips.settled()

    def _open_gates(self) -> None:
        current = self._steps.current
        self._plan.open_for(current.step, self.clock.by_forward)
        current.due = self._plan.due
        self._captures.open_for(current.step)
        self._captures.prepare(current.due, self._may_trace)
        self._captures.loss.disarm()
        if self._plan.loss_gate.train:
            self._captures.loss.arm(first_trained(self._model()))

    @property
    def _may_trace(self) -> bool:
        """A compiled model never sees hooks that are not there when it is first traced, sampled or not."""
        return self.clock.fresh and self.clock.has_optimizer

    def _step_for_log(self) -> Open:
        if self.clock.manual or self._pass.began or self.clock.fresh:
            return self._steps.current
        return self._last()

    def _last(self) -> Open:
        return self._steps.last(self.clock.completed)

    def _follow_parts(self) -> None:
        model = self._model()
        if model is not None:
            self._pass_hooks.move_to_parts(model)

    def _parameter_ids(self) -> set[int]:
        model = self._model()
        return set() if model is None else parameter_ids(model)

"""What a forward pass of the model means for the step that is under way."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchprobe.capture.captures import Captures
from torchprobe.capture.outputs import tensors_in
from torchprobe.capture.passes import PassHooks
from torchprobe.protection import Guard, protected
from torchprobe.steps.cadence import Plan
from torchprobe.timeline import Timeline


class Passes:
    """Tells training passes from validation, and gathers what each leaves behind."""

    def __init__(self, model: nn.Module, guard: Guard, timeline: Timeline, plan: Plan, captures: Captures) -> None:
        self.guard = guard
        self._timeline = timeline
        self._plan = plan
        self._captures = captures
        self._pass = captures.modules.current
        self._hooks = PassHooks(model, self, self._pass)

    @protected
    def enter_pass(self, module: nn.Module, grad_enabled: bool) -> None:
        """A forward pass begins. Training closes the step before it; validation belongs to that step."""
        self._pass.seen = True
        self._pass.entered += 1
        trained = self._pass.training
        # Without an optimizer in sight, a model in training mode is what the user wants to look at.
        self._pass.training = module.training and (grad_enabled or not self._timeline.clock.has_optimizer)
        if self._pass.training:
            self._begin_training_pass(grad_enabled, trained)
        due = self._timeline.current.due if self._pass.training else self._plan.due_in_validation
        self._captures.enter(module, bool(due), self._pass.training, self._timeline.may_trace)

    def _begin_training_pass(self, grad_enabled: bool, trained: bool) -> None:
        timeline = self._timeline
        timeline.settle_last_pass()
        if (grad_enabled and not trained) or timeline.one_pass_before_training():
            timeline.start_training()
        if timeline.skips.gradients_were_dropped():
            timeline.skip()
        timeline.end_validation()
        if not timeline.clock.may_grow:
            timeline.steps.seal_last()
        self._pass.began = True

    @protected
    def leave_pass(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward pass has ended; by itself it is a step only while no optimizer is in sight."""
        watched = self._watch_backward(output)
        if not watched:
            self._timeline.look_for_optimizers()
        self._captures.predictions.on_output(module, args, kwargs, output)
        if self._pass.training:
            self._captures.loss.on_output(output, kwargs)
            self._captures.health.on_output(output)
        else:
            pieces = self._captures.collect(self._plan.due_in_validation, training=False)
            self._timeline.validated().buffer.pieces += pieces
            self._plan.validated()
        if self._pass.training and watched:
            self._timeline.forward_unclocked = self._timeline.clock.by_forward
        elif self._timeline.clock.by_forward:
            self._timeline.tick()

    @protected
    def leave_recomputation(self, output: Any) -> None:
        """A checkpoint around the whole model has run it again: a reentrant one's graph begins only here."""
        if self._watch_backward(output):
            self._captures.predictions.on_recomputed(output)

    @protected
    def pass_is_over(self) -> None:
        """A forward pass has ended or raised: nothing of ours stays entered."""
        self._captures.leave()

    def move_to_parts(self, model: nn.Module) -> None:
        """The model itself is never called: follow the outermost parts that can be."""
        self._hooks.move_to_parts(model)

    def remove(self) -> None:
        """Take the hooks off the model. Safe to call twice."""
        self._hooks.remove()

    def _watch_backward(self, output: Any) -> bool:
        """Whether there is a backward pass to hear of."""
        watched = next((t for t in tensors_in(output) if t.requires_grad), None)
        if watched is not None:
            watched.register_hook(self._on_backward)
        return watched is not None

    @protected
    def _on_backward(self, gradient: Tensor) -> None:
        skips = self._timeline.skips
        if not skips.begins_backward():
            return
        if skips.gradients_were_dropped():
            self._timeline.skip()
        skips.backward_ran()
        self._pass.began = True
        self._captures.on_backward()

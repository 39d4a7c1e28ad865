"""The training thread's side of a run: passes, optimizer steps and the user's calls in, sealed steps out."""

from __future__ import annotations

from weakref import ReferenceType

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.buffer.outlet import Outlet
from torchprobe.buffer.step import Piece
from torchprobe.capture.captures import Captures
from torchprobe.capture.gate import Meter
from torchprobe.capture.loss import loss_scale
from torchprobe.capture.optimizers import OptimizerHooks, parameter_ids
from torchprobe.passes import Passes
from torchprobe.protection import Guard, protected
from torchprobe.records import Value
from torchprobe.rules.watch import Watch
from torchprobe.steps.cadence import Plan
from torchprobe.timeline import Timeline


class Recorder:
    """Follows the optimizers' steps, and puts what the user logs where it belongs."""

    def __init__(
        self, model: nn.Module, plan: Plan, captures: Captures, outlet: Outlet, meter: Meter, watch: Watch
    ) -> None:
        self.guard = Guard(meter)
        self._model: ReferenceType[nn.Module] = ReferenceType(model)
        self._captures = captures
        self._watch = watch
        self._of_optimizer: list[Piece] = []  # what a running optimizer step uses
        self._pass = captures.modules.current
        self._timeline = Timeline(self._model, plan, captures, outlet, meter, self._follow_parts)
        self.clock = self._timeline.clock
        self._passes = Passes(model, self.guard, self._timeline, plan, captures)
        self._optimizer_hooks = OptimizerHooks(self._parameter_ids, self)
        clock, current = self.clock, self._pass
        watch.progress = lambda: (clock.completed, current.entered)
        watch.completed = lambda: clock.completed
        self._timeline.open_gates()

    # ---- optimizer steps

    @protected
    def before_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Gradients are final, unless a closure makes them."""
        timeline = self._timeline
        timeline.start_training()
        if self.clock.begin(optimizer, self._pass.began):
            timeline.roll()
        due = (timeline.last() if self.clock.joins_last_step(optimizer) else timeline.current).due
        timeline.skips.in_closure, self._of_optimizer = has_closure, []
        if not has_closure:
            self._captures.health.before_step(optimizer)
        if due:
            timeline.scale = loss_scale(optimizer)
            self._captures.parameters.remember(optimizer, due)
            if not has_closure:
                self._of_optimizer += self._captures.parameters.gradients(optimizer, due)

    @protected
    def after_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Parameters are updated; perhaps that completed a step."""
        timeline = self._timeline
        timeline.skips.in_closure = False
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer decides by itself to skip
        if isinstance(found_inf, Tensor) and found_inf.is_cpu and found_inf.numpy().any():
            timeline.skip()
            return
        if self.clock.joins_last_step(optimizer):
            timeline.steps.reopen_last(self.clock.completed)
        step = timeline.current
        due, buffer = step.due, step.buffer
        if isinstance(found_inf, Tensor) and not found_inf.is_cpu:
            buffer.void = found_inf.clone()
        if due and has_closure:
            self._of_optimizer += self._captures.parameters.gradients(optimizer, due)
        if due:
            buffer.pieces += [*self._of_optimizer, *self._captures.parameters.after_step(optimizer, due)]
            buffer.same_data = self._captures.parameters.same_data
        for tag, value in self._captures.optimizer_values(optimizer).items():
            step.put(tag, value)
        self._captures.health.after_step(optimizer)
        timeline.skips.settled()
        timeline.forward_unclocked = False
        if self.clock.end(optimizer):
            timeline.roll()
        self._watch.check()

    # ---- what the user asks for

    @protected
    def log(self, tag: str, value: Value | Tensor) -> None:
        """A value of the iteration that runs now, or of the one that has just ended."""
        self._timeline.for_log().put(tag, value)

    @protected
    def log_rows(self, piece: Piece | None) -> None:
        """Rows of the iteration that runs now, or of the one that has just ended; the later ones of a name count."""
        if piece is not None:
            pieces = self._timeline.for_log().buffer.pieces
            pieces[:] = [other for other in pieces if other.heading != piece.heading] + [piece]

    @protected
    def log_predictions(self, predictions: Tensor, targets: Tensor) -> None:
        """Predictions and targets of the pass that came last: training's, or validation's."""
        training = self._pass.training
        piece = self._captures.predictions.given(predictions, targets, training)
        if piece is not None:
            (self._timeline.for_log() if training else self._timeline.validated()).add(piece)

    @protected
    def next_step(self) -> None:
        """The user's own clock: from now on nothing else ends a step."""
        first, self.clock.manual = not self.clock.manual, True
        if first and not self.clock.fresh and not self._pass.began:
            return  # the optimizer has just ended this very step
        self._timeline.tick()

    @protected
    def flush(self) -> None:
        """Hand over the completed step as it is."""
        self._timeline.flush()

    @protected
    def close(self) -> None:
        """Hand over everything; values of an unfinished step too, but no half statistics."""
        self._timeline.close()
        self.guard.stopped = True

    @protected
    def resume(self) -> None:
        """The clock and the plan were set to where another process stopped: its next step is the one that runs now."""
        self._timeline.resume()

    def uncovered_attention(self) -> list[str]:
        """What attention was not recorded, and how often."""
        counts = [attention.uncovered for attention in self._captures.attention]
        return [f"{count} x {reason}" for part in counts for reason, count in part.items()]

    def detach(self) -> None:
        """Take every hook off the model and the optimizers. Safe to call twice."""
        self.guard.stopped = True
        self._passes.remove()
        self._optimizer_hooks.remove()
        self._captures.detach()

    def _follow_parts(self) -> None:
        model = self._model()
        if model is not None:
            self._passes.move_to_parts(model)

    def _parameter_ids(self) -> set[int]:
        model = self._model()
        return set() if model is None else parameter_ids(model)

"""Which step of the run is under way, what it gathers, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from weakref import ReferenceType

from torch import Tensor, nn

from torchprobe.buffer.outlet import Outlet, Overview
from torchprobe.buffer.step import Piece
from torchprobe.capture.captures import Captures
from torchprobe.capture.clock import Clock
from torchprobe.capture.gate import Meter
from torchprobe.capture.optimizers import any_alive, parameter_ids
from torchprobe.capture.skips import SkipDetector, first_trained
from torchprobe.ledger import Ledger, Open
from torchprobe.plan import Plan


class Timeline:
    """Gathers what belongs to a step and hands it to the drain when the next one begins.

    The step that has just ended stays open until then, for what is logged after `optimizer.step()`
    and for a validation pass. never_called: told when a first step has ended without a pass of the model.
    """

    def __init__(
        self,
        model: ReferenceType[nn.Module],
        plan: Plan,
        captures: Captures,
        outlet: Outlet,
        meter: Meter,
        never_called: Callable[[], None],
    ) -> None:
        self.clock = Clock()
        self.steps = Ledger(outlet)
        self.skips = SkipDetector(model)
        self.scale: Tensor | None = None  # of the loss, as the optimizer will undo it
        self.forward_unclocked = False  # a pass with gradients that is a step if no optimizer is in sight
        self._model = model
        self._plan = plan
        self._captures = captures
        self._outlet = outlet
        self._never_called = never_called
        self._overview = Overview(outlet, meter)
        self._pass = captures.modules.current

    # ---- the open steps

    @property
    def current(self) -> Open:
        """The step that runs now."""
        return self.steps.current

    def last(self) -> Open:
        """The step that ended last."""
        return self.steps.last(self.clock.completed)

    def for_log(self) -> Open:
        """The iteration that runs now, or the one that has just ended."""
        if self.clock.manual or self._pass.began or self.clock.fresh:
            return self.current
        return self.last()

    def validated(self) -> Open:
        """The step that a validation pass belongs to."""
        resumed = self.clock.fresh and self.clock.origin > 0  # whose last step is the other process's
        return self.last() if self.clock.has_optimizer and not resumed else self.current

    @property
    def may_trace(self) -> bool:
        """A compiled model never sees hooks that are not there when it is first traced, sampled or not."""
        return self.clock.fresh and self.clock.has_optimizer

    # ---- how a step begins and ends

    def open_gates(self) -> None:
        """What the step that runs now is to sample."""
        current = self.current
        self._plan.open_for(current.step, self.clock.by_forward)
        current.due = self._plan.due
        self._captures.open_for(current.step)
        self._captures.prepare(current.due, self.may_trace)
        self._captures.loss.disarm()
        if self._plan.loss_gate.train:
            self._captures.loss.arm(first_trained(self._model()))

    def tick(self) -> None:
        """A step ends, by a forward pass or because the user says so."""
        trained = self.skips.gradients_await_step
        self.skips.settled()
        self.forward_unclocked = False
        if self.clock.by_forward:
            self.end_validation()
        self.clock.tick()
        self.roll(trained=trained)

    def roll(self, *, trained: bool = True) -> None:
        """The step that the clock has just counted is complete: gather it, and decide on the next.

        trained: whether gradients were made. Of a step of mere inference nobody misses them.
        """
        ended = self.current
        ended.buffer.pieces += [*self._captures.collect(ended.due, training=True, scale=self.scale), *self._loss()]
        signs, flags, ended.buffer.urgent = self._captures.health.signs()
        ended.buffer.values.update(signs)
        ended.buffer.pieces += flags
        ended.buffer.due = ended.due if trained or self.clock.has_optimizer else ()
        if ended.step % self._outlet.flush_every == 0:
            ended.buffer.values.update(self._overview.values(self.clock.skipped))
        if ended.step == self.clock.origin + 1 and not self._pass.seen:
            self._never_called()
        self.steps.turn()
        self.scale, self._pass.began = None, False
        self.open_gates()

    def skip(self) -> None:
        """An iteration that ended without a step: what it captured belongs to no step."""
        self.clock.skipped += 1
        self._captures.collect(self.current.due, training=True)
        self._captures.loss.drop_batches()
        self.skips.settled()

    def end_validation(self) -> None:
        """What a whole validation pass adds up to belongs to the step before it."""
        pieces = self._captures.predictions.collect(training=False)
        if pieces:
            self.validated().buffer.pieces += pieces
        self._plan.validation_ended()

    def _loss(self) -> list[Piece]:
        loss = self._captures.loss.take(self.scale)
        rows = None if loss is None else loss.double().reshape(1, 1)
        return [] if rows is None else [Piece(probe, ["loss"], rows) for probe in self._plan.loss_probes]

    # ---- while no optimizer is in sight

    def settle_last_pass(self) -> None:
        """A training pass is a step when no optimizer is in sight: neither has one stepped, nor can one."""
        if self.forward_unclocked:
            self.look_for_optimizers()
            if self.clock.by_forward:
                self.tick()
        self.forward_unclocked = False

    def look_for_optimizers(self) -> None:
        """At the first pass: an optimizer that has yet to step makes a pass before it no step."""
        if self.clock.by_forward and self.clock.completed == 0 and self._optimizer_alive():
            self.clock.has_optimizer = True

    def one_pass_before_training(self) -> bool:
        """Whether the only pass so far was counted for want of an optimizer, and there is one now."""
        return self.clock.by_forward and self.clock.completed == 1 and self._optimizer_alive()

    def start_training(self) -> None:
        """Forward passes that were counted before training, such as a sanity check, are no steps of it."""
        if self.clock.by_forward and self.clock.completed:
            self.last().step = 0
            self.steps.seal_last()
            self.clock.completed, self.current.step = 0, 1
            self.open_gates()

    def _optimizer_alive(self) -> bool:
        model = self._model()
        return model is not None and any_alive(parameter_ids(model))

    # ---- the end, and going on

    def flush(self) -> None:
        """Hand over the completed step as it is."""
        self.settle_last_pass()
        self.end_validation()
        self.steps.seal_last()

    def close(self) -> None:
        """Hand over everything; values of an unfinished step too, but no half statistics."""
        self.settle_last_pass()
        self.end_validation()
        if self.clock.underway:
            self.tick()
        if not self.clock.fresh:
            self.last().buffer.values.update(self._overview.values(self.clock.skipped))
        self.steps.seal_all()

    def resume(self) -> None:
        """The clock and the plan were set to where another process stopped: its next step is the one that runs now."""
        self.steps.resume(self.clock.completed)
        self.open_gates()

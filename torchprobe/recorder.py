"""The state machine of a run on the training thread: passes and optimizer steps in, sealed steps out."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, perf_counter, time
from typing import Any, Concatenate, ParamSpec, TypeAlias
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.drain import Drain
from torchprobe.buffer.seal import Lanes
from torchprobe.buffer.step import Piece, StepBuffer
from torchprobe.capture.clock import Clock
from torchprobe.capture.gate import Meter
from torchprobe.capture.loss import LossCapture, loss_scale
from torchprobe.capture.modules import ModuleCapture
from torchprobe.capture.optimizers import OptimizerHooks, parameter_ids
from torchprobe.capture.outputs import tensors_in
from torchprobe.capture.parameters import ParameterCapture
from torchprobe.capture.passes import PassHooks
from torchprobe.plan import Plan
from torchprobe.probes.base import Probe
from torchprobe.probes.learning_rates import LearningRates
from torchprobe.records import Value

_log = logging.getLogger("torchprobe")
_P = ParamSpec("_P")
_Method: TypeAlias = "Callable[Concatenate[Recorder, _P], None]"


@dataclass(frozen=True, slots=True)
class Captures:
    """The mechanisms that fetch values from the model."""

    modules: ModuleCapture
    parameters: ParameterCapture
    loss: LossCapture
    rates: list[LearningRates]


@dataclass(frozen=True, slots=True)
class Outlet:
    """The way out: device slots, the drain thread, what it learns on the host."""

    lanes: Lanes
    drain: Drain
    decoder: Decoder
    flush_every: int


@dataclass(slots=True)
class Open:
    """A completed step that still takes values."""

    step: int
    buffer: StepBuffer
    due: tuple[Probe, ...]


def _protected(method: _Method[_P]) -> _Method[_P]:
    """Law 2: whatever goes wrong inside, training goes on; recording stops, with one traceback in the log."""

    def call(self: Recorder, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if self.stopped or os.getpid() != self.pid:  # a forked child must not write the parent's run
            return
        start = perf_counter()
        try:
            method(self, *args, **kwargs)
        except Exception:
            self.stopped = True
            _log.exception("torchprobe failed and stops recording; training goes on")
        finally:
            self.meter.seconds += perf_counter() - start

    functools.update_wrapper(call, method)
    return call


class Recorder:
    """Gathers what belongs to a step and hands it to the drain when the next one begins.

    The step that has just ended stays open until then, for what is logged after `optimizer.step()`
    and for a validation pass.
    """

    def __init__(self, model: nn.Module, plan: Plan, captures: Captures, outlet: Outlet, meter: Meter) -> None:
        self.pid = os.getpid()
        self.stopped = False
        self.meter = meter
        self.clock = Clock()
        self._model: ReferenceType[nn.Module] = ReferenceType(model)
        self._plan = plan
        self._captures = captures
        self._outlet = outlet
        self._current = StepBuffer()
        self._last: Open | None = None
        self._validated: tuple[Probe, ...] = ()
        self._backward_ran = False
        self._forward_unclocked = False  # a pass with gradients that no optimizer step has followed yet
        self._target: tuple[StepBuffer, tuple[Probe, ...]] = (self._current, ())
        self._scale: Tensor | None = None
        self._reported = (monotonic(), meter.seconds)
        self._pass = captures.modules.current
        self._pass_hooks = PassHooks(model, self, self._pass)
        self._optimizer_hooks = OptimizerHooks(self._parameter_ids, self)
        self._open_gates()

    # ---- forward passes

    @_protected
    def enter_pass(self, module: nn.Module, grad_enabled: bool) -> None:
        """A forward pass begins. Training closes the step before it; validation belongs to that step."""
        self._pass.seen = True
        # Without an optimizer in sight, a model in training mode is what the user wants to look at.
        self._pass.training = module.training and (grad_enabled or not self.clock.has_optimizer)
        if not self._pass.training:
            self._arm(bool(self._plan.due_in_validation), training=False)
            return
        self._optimizer_hooks.forget_unfinished()
        if self._gradients_were_dropped():
            self._skip()
        elif self._forward_unclocked and not self._backward_ran and not self._has_gradients():
            self._tick()
        self._seal_last()
        self._pass.began = True
        self._arm(bool(self._plan.due))

    @_protected
    def leave_pass(self, module: nn.Module, output: Any) -> None:
        """A forward pass has ended; by itself it is a step only while no optimizer is in sight."""
        clocked = self.clock.has_optimizer or self.clock.manual
        if not self._pass.training:
            self._validated, self._forward_unclocked = self._plan.due_in_validation or self._validated, False
            self._plan.validated()
            if not clocked:
                self._tick()
            return
        watched = next((t for t in tensors_in(output) if t.requires_grad), None)
        self._captures.loss.begin_batch(output)
        if watched is not None:
            watched.register_hook(self._on_backward)
        self._forward_unclocked = not clocked
        if not clocked and watched is None:
            self._tick()

    @_protected
    def _on_backward(self, gradient: Tensor) -> None:
        if self._gradients_were_dropped():
            self._skip()
        self._backward_ran = True
        self._captures.loss.on_backward()

    # ---- optimizer steps

    @_protected
    def before_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Gradients are final, unless a closure makes them."""
        if self.clock.begin(optimizer):
            self._roll()
        last = self._last if self.clock.joins_last_step(optimizer) else None
        buffer, due = self._target = (last.buffer, last.due) if last else (self._current, self._plan.due)
        if due:
            self._scale = loss_scale(optimizer)
            self._captures.parameters.remember(optimizer, due)
            if not has_closure:
                buffer.pieces += self._captures.parameters.gradients(optimizer, due)

    @_protected
    def after_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Parameters are updated; perhaps that completed a step."""
        buffer, due = self._target
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer decides by itself to skip
        if isinstance(found_inf, Tensor):
            if found_inf.is_cpu and found_inf.numpy().any():
                self._skip()
                return
            buffer.void = found_inf.clone()
        if due and has_closure:
            buffer.pieces += self._captures.parameters.gradients(optimizer, due)
        if due:
            buffer.pieces += self._captures.parameters.after_step(optimizer, due)
        for rates in self._captures.rates:
            if rates.schedule(self.clock.completed + 1):
                for tag, value in rates.observe(optimizer):
                    _put(buffer, tag, value)
        self._backward_ran = self._forward_unclocked = False
        if self.clock.end(optimizer):
            self._roll()

    # ---- what the user asks for

    @_protected
    def log(self, tag: str, value: Value | Tensor) -> None:
        """A value of the iteration that runs now, or of the one that has just ended."""
        _put(self._buffer_for_log(), tag, value)

    @_protected
    def next_step(self) -> None:
        """The user's own clock: from now on nothing else ends a step."""
        self.clock.manual = True
        self._tick()

    @_protected
    def flush(self) -> None:
        """Hand over the completed step as it is."""
        if self._forward_unclocked and not self._backward_ran:
            self._tick()
        self._seal_last()

    @_protected
    def close(self) -> None:
        """Hand over everything; values of an unfinished step too, but no half statistics."""
        if self._forward_unclocked and not self._backward_ran:
            self._tick()
        self._seal_last()
        if self._current.values or self._current.scalars:
            self._current.pieces.clear()
            self._last = Open(self.clock.completed + 1, self._current, ())
            self._seal_last()
        self.stopped = True

    def detach(self) -> None:
        """Take every hook off the model and the optimizers. Safe to call twice."""
        self.stopped = True
        self._pass_hooks.remove()
        self._optimizer_hooks.remove()
        self._captures.loss.disarm()
        self._captures.modules.detach()

    # ---- steps

    def _tick(self) -> None:
        self._forward_unclocked = False
        self.clock.tick()
        self._roll()

    def _roll(self) -> None:
        """The step that the clock has just counted is complete: gather it, and decide on the next."""
        self._seal_last()
        buffer, due, step = self._current, self._plan.due, self.clock.completed
        if due:
            buffer.pieces += self._captures.modules.collect(due, training=True)
        loss = self._captures.loss.take(self._scale)
        if loss is not None:
            buffer.pieces += [Piece(probe, ["loss"], loss.double().reshape(1, 1)) for probe in self._plan.loss_probes]
        if step == 1 and not self._pass.seen:
            self._follow_parts()
        if step % self._outlet.flush_every == 0:
            buffer.values.update(self._overview())
        buffer.due = due if self.clock.has_optimizer else ()
        self._last, self._current, self._scale = Open(step, buffer, due), StepBuffer(), None
        self._pass.began = False
        self._open_gates()

    def _seal_last(self) -> None:
        if self._validated:
            validated, self._validated = self._validated, ()
            self._open_last().buffer.pieces += self._captures.modules.collect(validated, training=False)
        if self._last is None:
            return
        last, self._last = self._last, None
        outlet = self._outlet
        if last.buffer and outlet.drain.admit():
            outlet.drain.put(outlet.lanes.seal(last.step, time(), last.buffer))
        if last.step == 1 or last.step % outlet.flush_every == 0 or outlet.lanes.crowded:
            outlet.drain.wake()

    def _skip(self) -> None:
        """An iteration that ended without a step: what it captured belongs to no step."""
        self.clock.skipped += 1
        self._captures.modules.collect(self._plan.due, training=True)
        self._captures.loss.take()
        self._current.pieces.clear()
        self._backward_ran = False

    def _open_gates(self) -> None:
        by_forward = self.clock.completed > 0 and not (self.clock.has_optimizer or self.clock.manual)
        self._plan.open_for(self.clock.completed + 1, by_forward)
        self._arm(bool(self._plan.due))
        self._captures.loss.disarm()
        if self._plan.loss_gate.train:
            self._captures.loss.arm(self._first_trained())

    def _arm(self, wanted: bool, training: bool = True) -> None:
        if wanted:
            self._captures.modules.arm(training)
        else:
            self._captures.modules.disarm()

    def _buffer_for_log(self) -> StepBuffer:
        if self.clock.manual or self._pass.began or self.clock.completed == 0:
            return self._current
        return self._open_last().buffer

    def _open_last(self) -> Open:
        if self._last is None:
            self._last = Open(self.clock.completed, StepBuffer(), ())
        return self._last

    def _follow_parts(self) -> None:
        model = self._model()
        if model is not None:
            self._pass_hooks.move_to_parts(model)

    def _overview(self) -> dict[str, Value]:
        now, before = (monotonic(), self.meter.seconds), self._reported
        self._reported = now
        return {
            "overview/probe_overhead": (now[1] - before[1]) / max(now[0] - before[0], 1e-9),
            "overview/dropped_records": float(self._outlet.drain.dropped),
            "overview/skipped_steps": float(self.clock.skipped + self._outlet.decoder.skipped),
        }

    # ---- gradients

    def _parameter_ids(self) -> set[int]:
        model = self._model()
        return set() if model is None else parameter_ids(model)

    def _has_gradients(self) -> bool:
        model = self._model()
        return model is not None and any(p.grad is not None for p in model.parameters())

    def _first_trained(self) -> nn.Parameter | None:
        model = self._model()
        return None if model is None else next((p for p in model.parameters() if p.requires_grad), None)

    def _gradients_were_dropped(self) -> bool:
        """A backward pass ran, no optimizer step followed, and the gradients are gone: a skipped step."""
        return self._backward_ran and not self._has_gradients()


def _put(buffer: StepBuffer, tag: str, value: Value | Tensor) -> None:
    if isinstance(value, Tensor):
        buffer.scalars[tag] = value.detach().clone()
        buffer.values.pop(tag, None)
    else:
        buffer.values[tag] = value
        buffer.scalars.pop(tag, None)

"""The mechanisms that fetch values from the model, as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.buffer.step import Piece
from torchprobe.capture.attention.pieces import AttentionPieces
from torchprobe.capture.compiled.retrace import Retrace as LateGraphs
from torchprobe.capture.health import Health
from torchprobe.capture.loss import LossCapture
from torchprobe.capture.modules import ModuleCapture
from torchprobe.capture.parameters import ParameterCapture
from torchprobe.capture.predictions.pieces import PredictionPieces
from torchprobe.probes.base import Probe
from torchprobe.probes.learning_rates import LearningRates

_COMPILED = "the model was compiled after instrument(), so that its output is inside the graph: instrument what \
torch.compile returned"


@dataclass(slots=True)
class Captures:
    """What watches modules, parameters, attention and the loss, and how values of a forward pass are gathered."""

    modules: ModuleCapture
    parameters: ParameterCapture
    attention: list[AttentionPieces]
    loss: LossCapture
    rates: list[LearningRates]
    predictions: PredictionPieces
    health: Health
    late: LateGraphs
    _armed: bool = field(default=True, init=False)  # hooks may be on that an idle pass does not want

    def open_for(self, step: int) -> None:
        """A step begins."""
        self.modules.follow_gates()
        for attention in self.attention:
            attention.open_for(step)
        self.predictions.open_for(step)
        self.health.open_for(step)

    def enter(self, module: nn.Module, due: bool, training: bool, may_trace: bool = False) -> None:
        """A forward pass begins; due: whether any probe samples it; may_trace: whether hooks are to be there anyway."""
        self.modules.follow_gates()
        if due or may_trace or self._armed or not training:
            self.arm(due, training, may_trace)
            self.health.enter()
        for attention in self.attention:
            attention.enter(module, training)
        self.predictions.enter(due, training)

    def leave(self) -> None:
        """A forward pass has ended or raised: nothing stays entered."""
        for attention in self.attention:
            attention.leave()
        self.predictions.leave()

    def prepare(self, due: Sequence[Probe], may_trace: bool) -> None:
        """A step begins that these probes sample."""
        if due or may_trace or self._armed or self.health.watches:
            self.arm(bool(due), may_trace=may_trace)
        if not any(probe.source == "updates" for probe in due):
            self.parameters.forget()

    def arm(self, due: bool, training: bool = True, may_trace: bool = False) -> None:
        """Put the module hooks on for a sampled pass, and off for another."""
        self._armed = due or may_trace or not training or self.health.watches
        self.health.arm(training)
        may_trace = may_trace and training
        if may_trace or (due and self.modules.due(training)):
            self.modules.arm(training)
        else:
            self.modules.disarm()
        for attention in self.attention:  # a hook inside nn.MultiheadAttention ends its fast path in evaluation
            attention.arm(training and (due or may_trace))
        if training and (due or may_trace):
            self.late.before_pass()

    def collect(self, due: Sequence[Probe], training: bool, scale: Tensor | None = None) -> list[Piece]:
        """What the forward and backward passes of a step, or a validation pass, add up to; starts anew."""
        pieces = self.modules.collect(due, training=training, scale=scale) if due else []
        if training and due:
            self.late.after_step()
        if training:
            pieces += self.health.collect()
        for attention in self.attention:
            pieces += attention.collect(training)
        if due and training and self.modules.current.compiled:
            self.predictions.explain(_COMPILED)
        return pieces + self.predictions.collect(training) if training else pieces

    def on_backward(self) -> None:
        """Backward runs through an output of the model."""
        self.loss.on_backward()
        self.predictions.on_backward()

    def optimizer_values(self, optimizer: Optimizer, step: int) -> dict[str, float | Tensor]:
        """Learning rates and the like of the step that an optimizer has just taken."""
        values: dict[str, float | Tensor] = {}
        for rates in self.rates:
            if rates.schedule(step):
                values.update(rates.observe(optimizer))
        return values

    def detach(self) -> None:
        """Take everything off the model."""
        for attention in self.attention:
            attention.detach()
        self.loss.disarm()
        self.modules.detach()
        self.predictions.detach()
        self.health.detach()
        self.late.detach()

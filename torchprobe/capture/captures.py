"""The mechanisms that fetch values from the model, as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.buffer.step import Piece
from torchprobe.capture.attention.pieces import AttentionPieces
from torchprobe.capture.loss import LossCapture
from torchprobe.capture.modules import ModuleCapture
from torchprobe.capture.parameters import ParameterCapture
from torchprobe.probes.base import Probe
from torchprobe.probes.learning_rates import LearningRates


@dataclass(frozen=True, slots=True)
class Captures:
    """What watches modules, parameters, attention and the loss, and how values of a forward pass are gathered."""

    modules: ModuleCapture
    parameters: ParameterCapture
    attention: list[AttentionPieces]
    loss: LossCapture
    rates: list[LearningRates]

    def open_for(self, step: int) -> None:
        """A step begins."""
        self.modules.follow_gates()
        for attention in self.attention:
            attention.open_for(step)

    def enter(self, module: nn.Module, due: bool, training: bool) -> None:
        """A forward pass begins; due: whether any probe samples it."""
        self.modules.follow_gates()
        self.arm(due, training)
        for attention in self.attention:
            attention.enter(module, training)

    def leave(self) -> None:
        """A forward pass has ended or raised: nothing stays entered."""
        for attention in self.attention:
            attention.leave()

    def arm(self, due: bool, training: bool = True) -> None:
        """Put the module hooks on for a sampled pass, and off for another."""
        if due:
            self.modules.arm(training)
        else:
            self.modules.disarm()
        if training:
            for attention in self.attention:
                attention.arm(due)

    def collect(self, due: Sequence[Probe], training: bool, scale: Tensor | None = None) -> list[Piece]:
        """What the forward and backward passes of a step, or a validation pass, add up to; starts anew."""
        pieces = self.modules.collect(due, training=training, scale=scale) if due else []
        for attention in self.attention:
            pieces += attention.collect(training)
        return pieces

    def optimizer_values(self, optimizer: Optimizer, step: int) -> dict[str, float | Tensor]:
        """Learning rates and the like of the step that an optimizer has just taken."""
        return {tag: value for rates in self.rates if rates.schedule(step) for tag, value in rates.observe(optimizer)}

    def detach(self) -> None:
        """Take everything off the model."""
        for attention in self.attention:
            attention.detach()
        self.loss.disarm()
        self.modules.detach()

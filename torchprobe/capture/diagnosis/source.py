"""Gathers evidence for diagnoses on sampled steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn
from torch.optim import Optimizer

from torchprobe.buffer.step import Piece
from torchprobe.capture.compat import no_torch_function
from torchprobe.capture.diagnosis.evidence import Evidence, structure_of
from torchprobe.capture.diagnosis.gradients import GradientFacts
from torchprobe.capture.diagnosis.losses import OutputFacts
from torchprobe.capture.diagnosis.modules import ModuleCalls
from torchprobe.capture.gate import Gate, Meter
from torchprobe.capture.outputs import tensors_in
from torchprobe.capture.source import VALIDATION, Pass
from torchprobe.probes.base import Reporter

_OLD = 10  # steps after which a graph that is still alive has been kept


class DiagnosisSource:
    """All that diagnoses are decided by; nothing without a reporter. What it sees it keeps as numbers of the open step.

    watchers: of the calls of modules.
    """

    def __init__(self, model: ReferenceType[nn.Module], reporter: Reporter | None) -> None:
        self._reporter = reporter
        self._gate: Gate = Gate("Diagnosis", Meter()) if reporter is None else reporter.gate
        self._model = model
        self._evidence = evidence = Evidence()
        self._calls = ModuleCalls(evidence, reporter)
        self.watchers = [] if reporter is None else [self._calls]
        self._gradients = GradientFacts(model, evidence, self._calls)
        self._outputs = OutputFacts(evidence, self._gate)
        self._step = 0
        self._looked = False
        self._passes: list[tuple[int, ReferenceType[Pass]]] = []
        self._validations = 0  # in a row

    def open(self, step: int, due: frozenset[Reporter]) -> None:
        """A step is about to begin."""
        if self._wants(due):
            self._step = step
            self._gradients.open()

    def leave(self, passing: Pass, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """A pass has returned."""
        if not self._wants(passing.due):
            return
        with self._gate.boundary(), torch.no_grad(), no_torch_function():
            if passing.kind is VALIDATION:
                self._validations += 1
                self._validated(module)
                return
            self._validations = 0
            by_mode = (isinstance(m, nn.modules.batchnorm._BatchNorm) or _drops(m) for m in module.modules())
            evaluates = not module.training and any(by_mode)
            self._outputs.on_output(module, args, kwargs, output, evaluates)
            self._calls.returned(output)
            self._gradients.returned(any(x.dtype is torch.float16 for x in tensors_in(output)))
            self._follow(passing)

    def _follow(self, passing: Pass) -> None:
        self._passes = [(step, weak) for step, weak in self._passes if weak() is not None]
        old = sum(self._step - step > _OLD for step, _ in self._passes)
        self._evidence.put("graphs_kept", old)
        if not self._passes or self._passes[-1][0] != self._step:
            self._passes.append((self._step, ref(passing)))

    def _validated(self, module: nn.Module) -> None:
        """A pass without gradients, in training mode: whether it changes statistics, or drops units."""
        normal = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        moving = any(m.training and m.track_running_stats and m.momentum is not None for m in normal)
        drops = any(m.training and _drops(m) for m in module.modules())
        if module.training:
            self._evidence.put("validates_in_training_mode", 2.0 * moving or float(drops))
            self._evidence.put("validations_in_a_row", self._validations)

    def backward_begins(self, due: frozenset[Reporter]) -> None:
        """Before any gradient of a parameter."""
        if self._wants(due):
            with self._gate.boundary(), torch.no_grad():
                self._gradients.backward_begins()

    def backward_ends(self, due: frozenset[Reporter]) -> None:
        """After all of them."""
        if self._wants(due):
            with self._gate.boundary(), torch.no_grad():
                self._gradients.backward_ends()

    def before_step(self, optimizer: Optimizer, due: frozenset[Reporter]) -> None:
        """An optimizer is about to use its gradients."""
        if self._wants(due):
            with self._gate.boundary(), torch.no_grad(), no_torch_function():
                self._gradients.before_step(optimizer, type(optimizer).__name__)
                self._calls.tables.before_step()
                self._look_at_model()

    def rows(self) -> Iterator[Piece]:
        """What there is of the open step."""
        if self._reporter is not None and not self._gate.failed:
            yield from self._evidence.take(self._reporter)

    def _look_at_model(self) -> None:
        model = self._model()
        if model is not None and not self._looked:
            self._looked = True
            for name, value in structure_of(model):
                self._evidence.put(name, value)

    def _wants(self, due: frozenset[Reporter]) -> bool:
        return self._reporter in due and not self._gate.failed


def _drops(module: nn.Module) -> bool:
    """Whether it is dropout, or has some inside."""
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return bool(module.dropout > 0) and getattr(module, "num_layers", 2) > 1  # it is between layers
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0

"""The capture of predictions: from the output of a sampled pass to rows of uncertainty and calibration."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from torchprobe.capture.compat import no_torch_function
from torchprobe.capture.compiled.tracing import untraced
from torchprobe.capture.gate import Gate, no_autocast
from torchprobe.capture.outputs import main_tensor
from torchprobe.capture.parameters import first_trained
from torchprobe.capture.predictions import targets
from torchprobe.capture.predictions.forms import Generators, is_usable
from torchprobe.capture.predictions.judging import (
    NO_TARGETS,
    judge_call,
    judge_gradient,
    judge_labels,
    judge_likelihood,
)
from torchprobe.capture.predictions.likelihood import Spread, on_both_gradients
from torchprobe.capture.predictions.loss_modules import LossModules
from torchprobe.capture.predictions.parts import Parts
from torchprobe.capture.predictions.phase import Moment, Phase, Waiting
from torchprobe.capture.predictions.plain_outputs import PlainOutputs, Settled
from torchprobe.capture.predictions.pool import InputKey, Pool, input_tensors, version_of
from torchprobe.capture.predictions.reading import Reading, read
from torchprobe.naming import ROOT
from torchprobe.probes.uncertainty import Uncertainty

_MAX_PHASES = 16  # training passes before one backward


class PredictionCapture:
    """Follows the model's outputs while a gate is open, in training pass by pass, in validation as a whole.

    options: how to read outputs. gate: the boundary around everything here. settled: how a plain output is read.
    A training pass's `Phase` belongs to whom it was given and to the graph of its output: nothing here keeps it alive.
    """

    def __init__(self, model: ReferenceType[nn.Module], options: Uncertainty, gate: Gate, settled: Settled) -> None:
        self._model = model
        self._sample_dim = options.sample_dim
        self._gate = gate
        self._generators = Generators()
        self._plain = PlainOutputs(options, settled, self._generators)
        self._parts = Parts(model, options.modules, self._on_part)
        self._loss_modules = LossModules(self._on_loss)
        self._training = True
        self._phase: Phase | None = None  # of the pass that runs
        self._validation: Phase | None = None
        self._in_training: deque[ReferenceType[Phase]] = deque(maxlen=_MAX_PHASES)

    def enter(self, training: bool, moment: Moment) -> None:
        """A sampled pass begins."""
        self._training = training
        if training:
            self._phase = Phase(True, moment)
        else:
            self._phase = self._validation = self._validation or Phase(False, moment)
        with self._gate.boundary():
            self._parts.arm(training)

    def leave(self) -> None:
        """A pass has ended or raised: no hook is left on the model."""
        self._parts.disarm()

    def on_output(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Phase | None:
        """A sampled pass has returned. What it gave: after the same input as before, the phase of the pass before."""
        with self._protected(output):
            self._follow(module, args, kwargs, self._read(module, output))
            for name, outputs in self._parts.ensembles():
                self._plain.add_ensemble(self._now, name, outputs, main_tensor(output))
            if self._now.waiting:
                self._loss_modules.look_if_due(self._model(), self._now.moment.step, self._training)
                self._loss_modules.listening = True
        self._parts.forget()
        phase, self._phase = self._phase, None
        return phase

    def on_recomputed(self, output: Any) -> None:
        """A pass was run again in backward; the last one without a graph of its own gets this one's gradient."""
        with self._protected(output):
            plain = read(output).plain
            without_graph = ((p, one) for p in self._recent() for one in reversed(p.waiting) if not one.in_graph)
            for phase, waiting in without_graph:
                if plain is not None and waiting.shape == self._plain.members(plain)[0].shape:
                    self._wait_for_gradient(phase, waiting, plain)
                    return

    def end_validation(self) -> Phase | None:
        """What all passes of a validation gave; the next one starts anew."""
        phase, self._validation = self._validation, None
        self._parts.look_again()
        if not self._training:
            self.end_pass()
        return phase

    def end_step(self) -> None:
        """A step is over: the next one's passes are others."""
        if self._in_training:
            self._in_training.clear()
            self._plain.settled.next_step()
            self._parts.look_again()
        if self._training:
            self.end_pass()

    def end_pass(self) -> None:
        """What is computed from now on is no loss of the last pass; outputs of its parts are let go."""
        self._parts.forget()
        self._loss_modules.listening = False

    def detach(self) -> None:
        """Take every hook off."""
        self.end_pass()
        self._parts.disarm()
        self._loss_modules.detach()

    # ---- one output

    def _read(self, module: nn.Module, output: Any) -> Reading:
        reading = read(output, module)
        if reading.form == "logits" and not targets.form_is_known(module):
            reading.form = ""
        return reading

    def _on_part(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        with self._protected(out):
            reading = self._read(module, out)
            phase, pool = self._pool(name, args, kwargs)
            phase.describe(pool, reading, self._sample_dim)
            if reading.plain is not None and reading.form:
                self._plain.add(phase, pool, reading.plain, reading, [])

    def _follow(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], reading: Reading) -> None:
        phase, pool = self._pool(ROOT, args, kwargs)
        self._go_on_in(phase)
        phase.note = reading.note
        phase.describe(pool, reading, self._sample_dim)
        plain, mean = reading.plain, reading.mean_in_graph
        if plain is not None and is_usable(plain):
            predicted = self._plain.add(phase, pool, plain, reading, input_tensors(args, kwargs))
            if not self._judged_by_labels(phase, module, args, kwargs, plain):
                shape = self._plain.members(plain)[0].shape
                waiting = Waiting(pool, ref(plain), version_of(plain), shape, predicted)
                phase.wait_for(waiting)
                self._wait_for_gradient(phase, waiting, plain)
        elif mean is not None:
            waiting = Waiting(pool, ref(mean), version_of(mean), mean.shape, {}, reading.mean, reading.variance)
            phase.cannot_judge = NO_TARGETS
            phase.wait_for(waiting)
            self._wait_for_gradients(phase, waiting, mean, reading.source)

    def _go_on_in(self, phase: Phase) -> None:
        """The phase of this pass: the one before, if the input is the same. What parts of the model said follows."""
        fresh, self._phase = self._now, phase
        if phase is not fresh:
            phase.absorb(fresh)
        elif phase.training:
            for last in self._recent(1):
                last.settle()
            self._in_training.append(ref(phase))

    # ---- targets

    def _judged_by_labels(
        self, phase: Phase, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], plain: Tensor
    ) -> bool:
        members = self._plain.members(plain)
        given = targets.labels_in(module, args, kwargs)
        found = None if given is None else targets.matched(module, members[0], given)
        if found is not None:
            form, first, labels = found
            shifted = first.shape != members[0].shape
            judge_labels(phase, form, [m[:, :-1] if shifted else m for m in members], labels, self._generators)
        return found is not None

    def _wait_for_gradient(self, phase: Phase, waiting: Waiting, tensor: Tensor) -> None:
        """The hook holds the phase, and nothing of the graph that it hangs on. On a leaf it would stay for ever."""
        if phase.training and tensor.grad_fn is not None:
            waiting.in_graph = True
            tensor.register_hook(partial(self._on_gradient, phase, waiting))

    def _wait_for_gradients(
        self, phase: Phase, waiting: Waiting, mean: Tensor, source: tuple[Tensor, Spread] | None
    ) -> None:
        tensor, spread = source or (mean, Spread())
        both = tensor is not mean and tensor.grad_fn is not None and tensor.shape == mean.shape
        if not both or self._sample_dim is not None:
            self._wait_for_gradient(phase, waiting, mean)
        elif phase.training and mean.grad_fn is not None:
            waiting.in_graph = True
            on_both_gradients(mean, tensor, partial(self._on_gradients, phase, waiting, spread))

    @untraced
    def _on_gradient(self, phase: Phase, waiting: Waiting, gradient: Tensor | None) -> None:
        if gradient is not None and self._still_waits(phase, waiting):
            with self._protected(gradient):
                judge_gradient(phase, waiting, self._plain.members(gradient.detach()))

    def _on_gradients(self, phase: Phase, waiting: Waiting, spread: Spread, of_mean: Tensor, of_spread: Tensor) -> None:
        if self._still_waits(phase, waiting):
            with self._protected(of_mean):
                judge_likelihood(phase, waiting, of_mean, of_spread, spread)

    def _still_waits(self, phase: Phase, waiting: Waiting) -> bool:
        """Whether targets are wanted, now that the gradient has arrived: the last that can tell them."""
        if waiting.judged or self._gate.failed:
            return False
        self._loss_modules.missed()
        phase.has_judged(waiting)
        return True

    def _on_loss(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        with self._protected(args):
            call = targets.read_call(module, args, kwargs)
            phases = list(self._recent()) if self._training else [self._validation] if self._validation else []
            if call is not None:
                judge_call(phases, call, self._training)

    # ---- machinery

    @property
    def _now(self) -> Phase:
        """The phase of the pass that runs."""
        assert self._phase is not None
        return self._phase

    def _recent(self, most: int = _MAX_PHASES) -> Iterator[Phase]:
        """Phases of the step's training passes that are still alive, the last first."""
        alive = (phase() for phase in list(reversed(self._in_training))[:most])
        return (phase for phase in alive if phase is not None)

    def _pool(self, where: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Phase, Pool]:
        """The pool for an input, that of the last pass if it had the same, and the phase that it belongs to."""
        weights = first_trained(self._model())
        key = InputKey(args, kwargs, 0 if weights is None else weights._version)
        for phase in (self._now, *(self._recent(1) if self._training else ())):
            pool = phase.pool(where, key)
            if pool is not None:
                return phase, pool
        return self._now, self._now.begin(Pool(where, key, self._generators))

    @contextmanager
    def _protected(self, output: Any) -> Iterator[None]:
        tensor = main_tensor(output)
        device = torch.device("cpu") if tensor is None else tensor.device
        with self._gate.boundary(), torch.no_grad(), no_autocast(device), no_torch_function():
            yield

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

from torchprobe.capture.backward import roots
from torchprobe.capture.compat import no_torch_function
from torchprobe.capture.gate import Gate, no_autocast
from torchprobe.capture.outputs import given_tensors, main_tensor, tensors_in
from torchprobe.capture.predictions import targets
from torchprobe.capture.predictions.confirmation import (
    confirm_gradient,
    confirm_labels,
    confirm_likelihood,
    confirm_returned,
)
from torchprobe.capture.predictions.forms import IGNORED, MAX_ELEMENTS, Form, Generators, Predicted, is_usable
from torchprobe.capture.predictions.graph import Place, ignored_by, judge_of, place_of, sums_before
from torchprobe.capture.predictions.hooks import LossModules, Parts
from torchprobe.capture.predictions.inputs import Draws, InputKey, version_of
from torchprobe.capture.predictions.loops import Validation
from torchprobe.capture.predictions.matching import hear
from torchprobe.capture.predictions.phase import EVIDENTIAL, Moment, Phase, Values, Waiting
from torchprobe.capture.predictions.plain_outputs import DETACHED, PlainOutputs, Settled, lines_of
from torchprobe.capture.predictions.pool import Pool
from torchprobe.capture.predictions.reading import Reading, losses_in, read
from torchprobe.capture.predictions.targets import Number, on_both_gradients, on_gradient
from torchprobe.naming import ROOT
from torchprobe.probes.uncertainty import Uncertainty

_MAX_PHASES = 16  # training passes before one backward
_MAX_HEADS = 8
_OF_DIRICHLET = {"DigammaBackward", "LgammaBackward"}


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
        self._parts = Parts(model, options.modules, self._on_part, self._protected)
        self._loss_modules = LossModules(self._on_loss)
        self._training = True
        self._draws = Draws()
        self._ignored = IGNORED  # the class number that the model's own loss was seen to leave out
        self._phase: Phase | None = None  # of the pass that runs
        self._validation = Validation()
        self._heads: set[str] | None = None  # outputs that are trained
        self._in_training: deque[ReferenceType[Phase]] = deque(maxlen=_MAX_PHASES)

    def enter(self, training: bool, moment: Moment) -> None:
        """A sampled pass begins."""
        self._training = training
        self._phase = Phase(True, moment) if training else self._validation.enter(moment)
        with self._gate.boundary():
            self._parts.arm(training)
            drawn = self._draws.begin(self._model())
            if not training:
                self._validation.drew(drawn)

    def leave(self) -> None:
        """A pass has ended or raised: no hook is left on the model."""
        self._parts.disarm()

    def on_output(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Phase | None:
        """A sampled pass has returned. What it gave: after the same input as before, the phase of the pass before."""
        with self._protected(output):
            self._follow(module, args, kwargs, output)
            for name, outputs in self._parts.ensembles():
                self._plain.add_ensemble(self._now, name, outputs, output)
            if self._now.waiting:
                self._loss_modules.look_if_due(self._model(), self._now.moment.step, self._training)
                self._loss_modules.listen(True)
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

    def end_validation(self, with_graphs: bool) -> tuple[list[Phase], str]:
        """What a validation's passes gave, by loop, and what is to be said of it. with_graphs: whether some had one."""
        ended, self._validation = self._validation, Validation()
        if with_graphs:
            self._in_training.clear()
        self._parts.look_again()
        if not self._training:
            self.end_pass()
        return ended.end()

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
        self._loss_modules.listen(False)

    def detach(self) -> None:
        """Take every hook off."""
        self.end_pass()
        self._parts.disarm()
        self._loss_modules.detach()

    # ---- one output

    def _on_part(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        with self._protected(out):
            reading = read(out, module)
            phase, pool = self._pool(name, args, kwargs, out, module)
            phase.describe(pool, reading, self._sample_dim)
            if reading.plain is not None and reading.form:
                self._plain.add(phase, pool, reading.plain, reading, [])

    def _follow(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        reading = read(output, module)
        phase, pool = self._pool(ROOT, args, kwargs, output, module)
        self._go_on_in(phase)
        inputs = given_tensors(args, kwargs)
        if not phase.training:
            self._validation.saw(inputs)
        phase.describe(pool, reading, self._sample_dim)
        for probe, line in lines_of(reading, output):
            phase.say(probe, line)
        if reading.evidence is not None and reading.evidence.grad_fn is not None and phase.training:
            on_gradient(reading.evidence, self._gate, partial(self._on_evidence, phase, place_of(reading.evidence)))
        if reading.numbers and reading.numbers[0].mean is not None:
            self._follow_numbers(phase, pool, reading.numbers, reading.numbers[0].mean)
        if reading.plain is not None and is_usable(reading.plain):
            predicted = self._plain.add(phase, pool, reading.plain, reading, inputs)
            if not self._judged_by_own_loss(phase, module, (args, kwargs), output, reading.plain):
                self._wait(phase, pool, reading.plain, predicted)
        if phase.training:
            self._heads = set(reading.heads)
        heads = {name: x for name, x in reading.heads.items() if self._heads is None or name in self._heads}
        phase.describe_as(reading.note, heads)
        for name, tensor in list(heads.items())[:_MAX_HEADS]:
            if tensor is not reading.plain and is_usable(tensor) and tensor.numel() <= MAX_ELEMENTS:
                self._follow_head(phase.head(name), pool.beside(name), tensor, inputs, output)

    def _follow_head(self, phase: Phase, pool: Pool, tensor: Tensor, inputs: Sequence[Tensor], output: Any) -> None:
        """Another output than the first, in a phase of its own: what judges it may be another loss."""
        predicted = self._plain.add(phase, phase.go_on(pool), tensor, Reading(plain=tensor), inputs)
        losses = losses_in(output)
        if not losses or not confirm_returned(phase, tensor, judge_of(losses[:1], place_of(tensor)), self._generators):
            self._wait(phase, pool, tensor, predicted)

    def _follow_numbers(self, phase: Phase, pool: Pool, numbers: Sequence[Number], mean: Tensor) -> None:
        ways = [Values(n.key, mean.detach(), n.variance, n.spread, n.is_normal) for n in numbers]
        waiting = Waiting(pool, ref(mean), version_of(mean), mean.shape, {}, ways)
        phase.wait_for(waiting)
        source = numbers[0].source
        shapes = source.shape == mean.shape and mean is not source
        both = mean.grad_fn is not None and source.grad_fn is not None and shapes and numbers[0].is_normal
        if phase.training and both and self._sample_dim is None:
            waiting.enter_graph()
            on_both_gradients(mean, source, self._gate, partial(self._on_gradients, phase, waiting))

    def _go_on_in(self, phase: Phase) -> None:
        """The phase of this pass: the one before, if the input is the same. What parts of the model said follows."""
        fresh, self._phase = self._now, phase
        if phase is not fresh:
            phase.absorb(fresh)
            if not phase.training:
                self._validation.goes_on_before()
        elif phase.training:
            for last in self._recent(1):
                last.settle()
            self._in_training.append(ref(phase))

    # ---- targets

    def _judged_by_own_loss(
        self, phase: Phase, module: nn.Module, given: tuple[Any, Mapping[str, Any]], output: Any, plain: Tensor
    ) -> bool:
        """A loss that the model returns tells: by its graph, or recomputed from labels."""
        losses = losses_in(output)
        if not losses or self._sample_dim is not None:
            return False
        judge = judge_of(losses[:1], place_of(plain))
        if confirm_returned(phase, plain, judge, self._generators):
            self._ignored = ignored_by(judge)
            return True
        labels = targets.labels_in(module, *given)
        phase.say("calibration", DETACHED if phase.training and plain.grad_fn is None else "")
        if labels is not None:
            confirm_labels(phase, plain, losses[0], labels, self._ignored)
        return False

    def _wait(self, phase: Phase, pool: Pool, plain: Tensor, predicted: dict[Form, Predicted]) -> None:
        shape, place = self._plain.members(plain)[0].shape, place_of(plain)
        waiting = Waiting(pool, ref(plain), version_of(plain), shape, predicted, place=place, number=pool.passes)
        phase.wait_for(waiting)
        self._wait_for_gradient(phase, waiting, plain)

    def _wait_for_gradient(self, phase: Phase, waiting: Waiting, tensor: Tensor) -> None:
        """The hook holds the phase, and nothing of the graph that it hangs on. On a leaf it would stay for ever."""
        if phase.training and tensor.grad_fn is not None:
            waiting.enter_graph()
            on_gradient(tensor, self._gate, partial(self._on_gradient, phase, waiting))

    def _on_gradient(self, phase: Phase, waiting: Waiting, gradient: Tensor) -> None:
        if self._still_waits(phase, waiting):
            with self._protected(gradient):
                judge = judge_of(roots().tensors, waiting.place)
                if not waiting.candidates:
                    self._loss_modules.missed(needed=judge.kind != "whole")
                confirm_gradient(phase, waiting, self._plain.members(gradient.detach()), judge, self._draws.since())

    def _on_gradients(self, phase: Phase, waiting: Waiting, of_mean: Tensor, of_source: Tensor) -> None:
        if self._still_waits(phase, waiting):
            with self._protected(of_mean):
                if not waiting.candidates:
                    self._loss_modules.missed(needed=True)
                confirm_likelihood(phase, waiting, of_mean, of_source)

    def _on_evidence(self, phase: Phase, place: Place | None, gradient: Tensor) -> None:
        if not self._gate.failed:
            with self._protected(gradient):
                # Other distributions have an alpha, too: a Dirichlet's evidence is that of all classes together.
                phase.settle_form(EVIDENTIAL, sums_before(roots().tensors, place, _OF_DIRICHLET))

    def _still_waits(self, phase: Phase, waiting: Waiting) -> bool:
        """Whether targets are wanted, now that the gradient has arrived: the last that can tell them."""
        if waiting.judged or self._gate.failed:
            return False
        phase.has_judged(waiting)
        return True

    def _on_loss(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        with self._protected(args):
            call = targets.read_call(module, args, kwargs)
            phases = list(self._recent()) if self._training else self._validation.judged_by(module)
            if call is not None:
                hear([one for phase in phases for one in phase.all_outputs()], call, self._training)

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

    def _pool(
        self, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any, module: nn.Module
    ) -> tuple[Phase, Pool]:
        """The pool for an input, that of the last pass if it had the same, and the phase that it belongs to."""
        tensor = next(iter([*tensors_in(output), *given_tensors(args, kwargs)]), None)  # a distribution shows none
        draws = self._draws.end(None if tensor is None else tensor.device)
        key = InputKey((id(module), *args), kwargs, self._model(), draws)  # a list's networks are called one by one
        for phase in (self._now, *(self._recent(1) if self._training else self._validation.before)):
            pool = phase.pool(where, key)
            if pool is not None:
                return phase, pool
            if (last := phase.pools.get(where)) is not None:
                self._now.say("passes", last.why_apart(key))
        return self._now, self._now.begin(Pool(where, key, self._generators))

    @contextmanager
    def _protected(self, output: Any) -> Iterator[None]:
        tensor = main_tensor(output)
        device = torch.device("cpu") if tensor is None else tensor.device
        with self._gate.boundary(), torch.no_grad(), no_autocast(device), no_torch_function():
            yield

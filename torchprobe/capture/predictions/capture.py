"""The capture of predictions: from the output of a sampled pass to rows of uncertainty and calibration."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_registry
from torch.utils.hooks import RemovableHandle

from torchprobe.capture.compiled.graphs import in_wrapper_call
from torchprobe.capture.gate import Gate, no_autocast
from torchprobe.capture.outputs import main_tensor
from torchprobe.capture.predictions import labels
from torchprobe.capture.predictions.criteria import KINDS, read_call
from torchprobe.capture.predictions.describing import describe, members_of
from torchprobe.capture.predictions.fields import read
from torchprobe.capture.predictions.forms import BINARY, LAST, Form, Generators, is_one_of, is_usable, possible_forms
from torchprobe.capture.predictions.identity import InputKey, input_tensors
from torchprobe.capture.predictions.judging import judge_call, judge_gradient, judge_labels, judge_likelihood
from torchprobe.capture.predictions.kl import divergence_beside
from torchprobe.capture.predictions.likelihood import Pair, Spread
from torchprobe.capture.predictions.parts import Parts
from torchprobe.capture.predictions.phase import Phase, Waiting
from torchprobe.capture.predictions.pool import NUMBERS, Pool
from torchprobe.capture.predictions.predicted import Predicted
from torchprobe.capture.predictions.reading import Reading
from torchprobe.capture.predictions.reasons import NO_TARGETS, NO_VARIANCE, doubt, too_few
from torchprobe.capture.predictions.settled import Settled
from torchprobe.capture.skips import first_trained
from torchprobe.naming import ROOT
from torchprobe.probes.evidence import SURE
from torchprobe.probes.uncertainty import Uncertainty

_FORM_OF_TASK = {"classification": LAST, "regression": None}


class PredictionCapture:
    """Follows the model's outputs while a gate is open, in training and in validation apart.

    options: how to read outputs. gate: the boundary around everything here. settled: how a plain output is read.
    """

    def __init__(self, model: ReferenceType[nn.Module], options: Uncertainty, gate: Gate, settled: Settled) -> None:
        self._model = model
        self._options = options
        self._gate = gate
        self._settled = settled
        self._generators = Generators()
        self._parts = Parts(model, options.modules, self._on_part)
        self._train, self._val = Phase(training=True), Phase(training=False)
        self._phase = self._train
        self._on_modules: RemovableHandle | None = None
        self.unread = ""
        """Why the last output said nothing."""
        self.unjudged = ""
        """Why the last output could not be judged."""
        self.note = ""
        """What else is known of the model's output."""

    @property
    def training(self) -> bool:
        """Whether the last sampled pass was one of training."""
        return self._phase.training

    def has_any(self, training: bool) -> bool:
        """Whether there is something to take."""
        return self._train.touched if training else self._val.touched

    def enter(self, training: bool) -> None:
        """A sampled pass begins."""
        self._phase = self._train if training else self._val
        with self._gate.boundary():
            self._parts.arm(training)

    def leave(self) -> None:
        """A pass has ended or raised: no hook is left on the model."""
        self._parts.disarm()

    def on_output(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """A sampled pass has returned."""
        self._phase.touched = True
        with self._protected(output):
            reading = self._read(module, output)
            self.note = reading.note
            self._follow(ROOT, module, args, kwargs, reading)
            for name, outputs in self._parts.ensembles():
                self._follow_ensemble(name, outputs, main_tensor(output))
        self._parts.forget()
        if self._phase.waiting and self._on_modules is None and not in_wrapper_call():
            # Process-wide, so it is there from the output to the backward pass, or to the next pass, only.
            self._on_modules = module_registry.register_module_forward_hook(self._after_module, with_kwargs=True)

    def on_recomputed(self, output: Any) -> None:
        """A pass was run again in backward; the last one without a graph of its own gets this one's gradient."""
        with self._protected(output):
            plain = read(output).plain
            for waiting in reversed(self._train.waiting):
                if plain is not None and not (waiting.nodes or waiting.judged) and waiting.shape == tuple(plain.shape):
                    waiting.nodes = _nodes(plain)
                    plain.register_hook(functools.partial(self._on_gradient, waiting, self._train))
                    return

    def on_backward(self) -> None:
        """Gradients arrive: what was called on outputs before was the loss."""
        if self._on_modules is not None:
            self.end_pass()
        self._train.waiting = []

    def take(self, training: bool) -> Phase:
        """Everything that was gathered; starts anew."""
        phase, fresh = (self._train if training else self._val), Phase(training)
        if training:
            self._train = fresh
            self._settled.next_step()
        else:
            self._val = fresh
        self._parts.look_again()
        if self._phase is phase:
            self.end_pass()
            self._phase = fresh
        with self._protected(None):
            phase.settle()
        return phase

    def detach(self) -> None:
        """Take every hook off."""
        self.end_pass()
        self._parts.disarm()

    # ---- one output

    def _read(self, module: nn.Module, output: Any) -> Reading:
        reading = read(output)
        if reading.kl is None:
            reading.kl = divergence_beside(module, output)
        if reading.form == "logits" and not labels.form_is_known(module):
            reading.form = ""
        return reading

    def _on_part(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        with self._protected(out):
            reading = self._read(module, out)
            pool = self._pool(name, args, kwargs)
            describe(self._phase.uncertainty, pool, reading, self._options.sample_dim)
            if reading.plain is not None and reading.form:
                self._pool_plain(pool, reading, [])

    def _follow(
        self, where: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], reading: Reading
    ) -> None:
        pool = self._pool(where, args, kwargs)
        describe(self._phase.uncertainty, pool, reading, self._options.sample_dim)
        waiting = Waiting({}, (), [], pool, reading.mean, reading.variance)
        if reading.plain is not None and is_usable(reading.plain):
            waiting.predicted = self._pool_plain(pool, reading, input_tensors(args, kwargs))
            self._seek_targets(waiting, module, args, kwargs, reading.plain)
        elif reading.mean is not None:
            waiting.nodes = _nodes(reading.mean_in_graph)
            self.unjudged = NO_TARGETS
            self._phase.wait_for(waiting)
            self._seek_numbers(waiting, reading)

    def _pool_plain(self, pool: Pool, reading: Reading, inputs: Sequence[Tensor]) -> dict[Form, Predicted]:
        """Feeds a plain output to its pool in every way that it may be read; what it then predicts."""
        plain = reading.plain
        assert plain is not None
        members = members_of(plain, self._options.sample_dim)
        known = self._known_form(reading, members[0])
        possible = [known] if known else self._forms(members[0], inputs)
        forms = self._settled.of(possible) if self._phase.training else possible
        predicted = {
            form: pool.add_classes(SURE if known else form.key, form, [pool.rows(member, form) for member in members])
            for form in forms
        }
        if not known and not reading.says_something and len(forms) == len(possible):
            name = SURE if self._options.task == "regression" else NUMBERS
            pool.add_numbers(name, [member.detach() for member in members])
        return predicted

    def _known_form(self, reading: Reading, member: Tensor) -> Form | None:
        if reading.form == "binary":
            return BINARY
        several = member.dim() > 1 and member.shape[-1] > 1
        if reading.form in ("logits", "probabilities") and several:
            return LAST
        return (LAST if several else BINARY) if self._options.task == "classification" and member.dim() else None

    def _forms(self, member: Tensor, inputs: Sequence[Tensor]) -> list[Form]:
        if self._options.task == "regression":
            return []
        if self._options.sample_dim is not None and member.dim() > 1 and member.shape[-1] > 1:
            return [LAST]
        forms = possible_forms(member, inputs)
        few = too_few(member, forms)
        self.unread = few and f"{few}Uncertainty(task='classification')"
        self.unjudged = few and f"{few}call session.log_predictions(probs, targets)"
        if LAST not in forms and BINARY not in forms:
            self.unread = doubt(member)
        return forms

    def _follow_ensemble(self, name: str, outputs: Sequence[Any], root: Tensor | None) -> None:
        """Members that say what they predict, or give what the model itself gives, alone or stacked."""
        readings = [read(output) for output in outputs]
        pool = Pool(name, None, self._generators)
        means = [reading.mean for reading in readings if reading.mean is not None]
        variances = [reading.variance for reading in readings if reading.variance is not None]
        if len(means) == len(variances) == len(readings):
            pool.add_numbers(SURE, means, variances)
        plains = [reading.plain for reading in readings if reading.plain is not None]
        if root is not None and len(plains) == len(readings) and all(is_one_of(plain, root) for plain in plains):
            self._pool_members(pool, plains)
        pool.settle(self._phase.uncertainty)

    def _pool_members(self, pool: Pool, members: Sequence[Tensor]) -> None:
        for form in possible_forms(members[0], []) if members[0].dim() != 3 else [LAST]:
            pool.add_classes(form.key, form, [pool.rows(member, form) for member in members])
        pool.add_numbers(NUMBERS, [member.detach() for member in members])

    # ---- targets

    def _seek_targets(
        self, waiting: Waiting, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], plain: Tensor
    ) -> None:
        members = members_of(plain, self._options.sample_dim)
        given = labels.labels_in(module, args, kwargs)
        found = None if given is None else labels.matched(module, members[0], given)
        if found is not None:
            form, first, targets = found
            short = slice(None) if first.shape == members[0].shape else slice(None, -1)
            rows = [member if short == slice(None) else member[:, short] for member in members]
            judge_labels(self._phase, form, rows, targets, self._generators)
            return
        waiting.shape, waiting.nodes = tuple(plain.shape), _nodes(plain)
        if waiting.predicted and self._phase.training and plain.requires_grad:
            plain.register_hook(functools.partial(self._on_gradient, waiting, self._phase))
        self._phase.wait_for(waiting)

    def _seek_numbers(self, waiting: Waiting, reading: Reading) -> None:
        mean, (source, spread) = reading.mean_in_graph, reading.source or (None, Spread())
        if mean is None or source is None or mean.shape != source.shape or self._options.sample_dim is not None:
            return
        if self._phase.training and mean.grad_fn is not None and source.grad_fn is not None:  # on a leaf it would stay
            Pair(functools.partial(self._on_gradients, waiting, self._phase, spread)).watch(mean, source)

    def _on_gradients(self, waiting: Waiting, phase: Phase, spread: Spread, of_mean: Tensor, of_spread: Tensor) -> None:
        if not waiting.judged and phase is self._train:
            with self._protected(of_mean):
                judge_likelihood(phase, waiting, of_mean.detach(), of_spread.detach(), spread)

    def _on_gradient(self, waiting: Waiting, phase: Phase, gradient: Tensor | None) -> None:
        if gradient is None or waiting.judged or phase is not self._train:
            return
        waiting.judged = True
        with self._protected(gradient):
            judge_gradient(phase, waiting, members_of(gradient.detach(), self._options.sample_dim))

    def _after_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not isinstance(module, KINDS) or torch.compiler.is_compiling():
            return
        with self._protected(output):
            call = read_call(module, args, kwargs)
            if call is not None and judge_call(self._phase, call, self._generators):
                self.unjudged = NO_VARIANCE

    # ---- machinery

    def _pool(self, where: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Pool:
        weights = first_trained(self._model())
        key = InputKey(args, kwargs, 0 if weights is None else weights._version)
        return self._phase.pool(Pool(where, key, self._generators))

    @contextmanager
    def _protected(self, output: Any) -> Iterator[None]:
        tensor = main_tensor(output)
        device = torch.device("cpu") if tensor is None else tensor.device
        with self._gate.boundary(), torch.no_grad(), no_autocast(device), torch._C.DisableTorchFunction():
            yield

    def end_pass(self) -> None:
        """What is computed from now on is no loss of the last pass; outputs of its parts are let go."""
        self._parts.forget()
        if self._on_modules is not None:
            self._on_modules.remove()
            # torch forgets this one, and would warn at every call of a compiled model.
            getattr(module_registry, "_global_forward_hooks_with_kwargs", {}).pop(self._on_modules.id, None)
            self._on_modules = None


def _nodes(tensor: Tensor | None) -> list[Any]:
    return [] if tensor is None or tensor.grad_fn is None else [tensor.grad_fn]

"""Logging by explicit calls: a session's steps with a manual clock, and its probes fed by hand."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.drain import Drain
from torchprobe.buffer.outlet import Outlet
from torchprobe.buffer.step import Piece, TransferBuffers
from torchprobe.capture.gate import no_autocast
from torchprobe.logs import LogCalls
from torchprobe.naming import ROOT, named_parameters
from torchprobe.probes.attention import AttentionWeights
from torchprobe.probes.base import Reporter
from torchprobe.probes.calibration import FLAGS, GIVEN, Calibration
from torchprobe.probes.evidence import EVIDENCE, SURE
from torchprobe.probes.gradients import Gradients
from torchprobe.probes.histograms import GradientHistograms, ParameterHistograms
from torchprobe.probes.learning_rates import LearningRates
from torchprobe.probes.schedule import as_schedule
from torchprobe.probes.uncertainty import Uncertainty
from torchprobe.records import Text, Value
from torchprobe.statistics import calibration, uncertainty
from torchprobe.steps.manual import VALIDATION, ManualSteps
from torchprobe.steps.open_step import OpenStep
from torchprobe.user_values import Number, attention_layers, checked, checked_predictions, decomposition
from torchprobe.writers.hparams import HParamsWriter, checked_hparams
from torchprobe.writers.opening import check_run_name, open_writer

_SLOTS = 2**18
_FLUSH_EVERY = 100  # steps
_FLUSH_SECONDS = _AT_EXIT_SECONDS = 30.0

_log = logging.getLogger("torchprobe")
_P = ParamSpec("_P")


class TrainingLogger(LogCalls):
    """Logs what a training loop hands it, under the tags that `instrument` uses. A context manager: leaving it closes.

    Steps count from 1: what is logged before the first `increment_step()` belongs to step 1. With `prefix="val"` it
    belongs to the step that ended last, until something else is logged. No call waits, and none raises but for an
    argument that does not fit.

    Args:
        log_dir: where runs are, by default `runs`; experiment_name: this run's folder there.
        log_gradients_every, log_histograms_every: cadences of `log_gradients` and `log_model_histograms`: 1, N, 2N, ...
        writer: instead of a directory: a `SummaryWriter`, or any `torchprobe.Writer`.

    Raises:
        TypeError, ValueError: for an argument that does not fit, such as an experiment_name with a path separator.
        OSError: when `log_dir` cannot be written.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        experiment_name: str | None = None,
        log_gradients_every: int = 100,
        log_histograms_every: int = 500,
        *,
        writer: Any = None,
    ) -> None:
        if experiment_name is not None:
            check_run_name(experiment_name, "experiment_name")
        self._gradients_due = as_schedule("log_gradients_every", log_gradients_every)
        self._histograms_due = as_schedule("log_histograms_every", log_histograms_every)
        self.log_dir, opened = open_writer(writer, log_dir, experiment_name, "experiment")
        """The run's directory; None when a writer was handed over."""
        super().__init__(HParamsWriter(opened))
        decoder = Decoder(LearningRates.descriptions)
        self._drain = Drain(self._sink, decoder, _FLUSH_SECONDS)
        self._steps = ManualSteps(Outlet(TransferBuffers(_SLOTS), self._drain, decoder, _FLUSH_EVERY))
        self._probes = _Probes()
        self._said: set[str] = set()
        self._finalizer = weakref.finalize(self, _finish, self._steps, self._drain, _AT_EXIT_SECONDS)

    @property
    def global_step(self) -> int:
        """Completed steps; what is logged now belongs to the next one."""
        return self._steps.clock.completed

    def increment_step(self) -> None:
        """End the running step: the last call of an iteration."""
        self._steps.next_step()

    def log_learning_rate(self, optimizer: Optimizer) -> None:
        """`lr/<Optimizer>/group_<i>` of every group; momentum and weight decay when they change."""
        self._write("log_learning_rate", "", self._probes.put_rates, checked("optimizer", optimizer, Optimizer))

    def log_gradients(self, model: nn.Module) -> None:
        """Norms of the gradients as they are: call it after `backward()` and clipping. Writes at its cadence alone."""
        root = checked("model", model, nn.Module)
        if self._gradients_due(self._steps.clock.following):
            self._write("log_gradients", "", self._probes.put_gradients, root)

    def log_model_histograms(self, model: nn.Module) -> None:
        """Histograms of parameters, and of gradients where there are any. Writes at its cadence alone."""
        root = checked("model", model, nn.Module)
        if self._histograms_due(self._steps.clock.following):
            self._write("log_model_histograms", "", self._probes.put_histograms, root)

    def log_attention_stats(self, weights: Any, name: str = "attention", prefix: str = "") -> None:
        """Entropy, largest probability, sink and distance; `attention_collapse/<name>` is 1 below 0.1 nats in a head.

        weights: probabilities, (batch, heads, queries, keys), or a list or dict of these by layer, as models return
        them: `<name>.<layer>` are their names then. A key with probability 0 counts as not visible.
        """
        layers = list(attention_layers(weights, checked("name", name, str)))
        self._write("log_attention_stats", prefix, self._probes.add_attention, layers, prefix)

    def log_uncertainty_metrics(
        self, epistemic: Any, aleatoric: Any = None, name: str = ROOT, prefix: str = ""
    ) -> None:
        """Uncertainty of each example, any shape: mean and histogram. Calls of a step add up.

        `uncertainty_epistemic/<name>`, `_aleatoric/`, and of both their sum, `_total/`.
        """
        parts, where = decomposition(epistemic, aleatoric), checked("name", name, str)
        self._write("log_uncertainty_metrics", prefix, self._probes.add_uncertainty, parts, where, prefix)

    def log_calibration(self, probs: Any, targets: Any, prefix: str = "") -> None:
        """`calibration/ece`, `mce`, `brier`, `nll`, `accuracy`, ... of tensors or arrays. Calls of a step add up.

        probs: (..., classes), adding up to 1, and targets: (...) class numbers, -100 for ignored ones; or a binary
        task's probabilities of class 1 with targets of the same shape. Pictures: with a prefix, else as histograms.
        """
        p, y = checked_predictions(probs, targets)
        pictures = bool(prefix) or self._histograms_due(self._steps.clock.following)
        self._write("log_calibration", prefix, self._probes.add_calibration, p, y, prefix, pictures)

    def log_hparams(self, hparams: Mapping[str, Any], metrics: Mapping[str, Number] | None = None) -> None:
        """Hyperparameters (bools, numbers, strings) and metrics beside them: the HParams page, and a table as text."""
        lines = [f"| {name} | `{value}` |" for name, value in checked_hparams(hparams).items()]
        table = Text("\n".join(["| hyperparameter | value |", "| --- | --- |", *lines]))
        values = [*self._metrics.tagged(metrics or {}, ""), ("hparams", table)]
        self._sink.begin(hparams)
        self._log("log_hparams", values, VALIDATION)

    def flush(self, timeout: float | None = None) -> bool:
        """Write everything so far, waiting up to `timeout` seconds or as long as it takes. True when it is on disk."""
        if os.getpid() != self._steps.guard.pid or not self._finalizer.alive:
            return False
        self._steps.write()
        return self._drain.flush(timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Write what is left and end the thread. Safe to call twice; False when something was left unwritten."""
        return self._finalizer.detach() is None or _finish(self._steps, self._drain, timeout)

    def __enter__(self) -> TrainingLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._sink.failed = kind is not None
        self.close()

    def _log(self, call: str, values: Sequence[tuple[str, Value | Tensor]], prefix: str = "") -> None:
        self._write(call, prefix, OpenStep.put_all, values)

    def _log_rows(self, call: str, piece: Piece) -> None:
        self._write(call, VALIDATION, OpenStep.replace, piece)

    def _write(
        self, call: str, prefix: str, fill: Callable[Concatenate[OpenStep, _P], None], *args: _P.args, **kw: _P.kwargs
    ) -> None:
        """Let `fill(step, ...)` put values where they belong; what it raises ends this call alone."""
        step = self._steps.open(checked("prefix", prefix, str))
        if step is None:
            if not self._finalizer.alive:
                self._say(call, f"{call} after close() is ignored")
            return
        try:
            with torch.no_grad(), no_autocast(torch.device("cpu")), no_autocast(torch.device("cuda")):
                fill(step, *args, **kw)
        except Exception:
            self._say(call, f"{call} failed and its values are left out; training goes on", exc_info=True)

    def _say(self, call: str, message: str, exc_info: bool = False) -> None:
        """Once for each kind of call."""
        if call not in self._said:
            self._said.add(call)
            _log.warning(message, exc_info=exc_info)


def _finish(steps: ManualSteps, drain: Drain, timeout: float | None) -> bool:
    if os.getpid() != steps.guard.pid:  # a child has no drain thread, and not its own file
        return True
    steps.write()
    steps.guard.stop()
    return drain.close(timeout)


class _Probes:
    """The probes of `instrument`, fed by hand: of two calls in a step the later counts, or rows add up."""

    def __init__(self) -> None:
        self._rates = LearningRates().reporter()
        self._gradients = Gradients().reporter()
        self._histograms = GradientHistograms().reporter(), ParameterHistograms().reporter()
        self._attention = AttentionWeights().reporter()
        self._uncertainty = Uncertainty().reporter()
        self._calibration = Calibration().reporter()

    def put_rates(self, step: OpenStep, optimizer: Optimizer) -> None:
        """What the optimizer uses."""
        step.put_all(self._rates.observe(optimizer))

    def put_gradients(self, step: OpenStep, model: nn.Module) -> None:
        """Norms of the gradients that there are."""
        _put(step, self._gradients, _gradients(model))

    def put_histograms(self, step: OpenStep, model: nn.Module) -> None:
        """Histograms of the gradients that there are, and of all parameters."""
        of_gradients, of_parameters = self._histograms
        _put(step, of_gradients, _gradients(model))
        _put(step, of_parameters, {name: p.detach() for name, p in named_parameters(model)})

    def add_attention(self, step: OpenStep, layers: Sequence[tuple[str, Tensor]], prefix: str) -> None:
        """A row a head of each layer."""
        for name, weights in layers:
            _add(step, self._attention, name, self._attention.probe.compute(weights), prefix)

    def add_uncertainty(self, step: OpenStep, parts: uncertainty.Decomposition, name: str, prefix: str) -> None:
        """The row of a batch; no evidence is needed for what the user says it is."""
        row = uncertainty.compute(parts)
        row = torch.cat((row, row.new_zeros(len(EVIDENCE))))
        _add(step, self._uncertainty, f"{SURE}||{name}", row[None], prefix)

    def add_calibration(self, step: OpenStep, probs: Tensor, targets: Tensor, prefix: str, pictures: bool) -> None:
        """The row of a batch, as of validation: it is not added up over steps."""
        row = calibration.compute(probs, targets)
        flags = [row.new_full((1,), float(pictures or flag != "pictures")) for flag in FLAGS]
        row = torch.cat((row, row.new_zeros(len(EVIDENCE)), *flags))
        _add(step, self._calibration, f"{SURE}|{GIVEN}|val", row[None], prefix)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that parameters hold now; of a sparse one the stored values, duplicates summed."""
    found = {name: p.grad.detach() for name, p in named_parameters(model) if p.grad is not None}
    return {name: grad.coalesce().values() if grad.is_sparse else grad for name, grad in found.items()}


def _put(step: OpenStep, reporter: Reporter, tensors: Mapping[str, Tensor]) -> None:
    """A row a tensor, those of one device together."""
    for device in {tensor.device for tensor in tensors.values()}:
        group = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        step.replace(Piece(reporter, list(group), reporter.probe.compute_all(list(group.values()))))


def _add(step: OpenStep, reporter: Reporter, name: str, rows: Tensor, prefix: str) -> None:
    """Rows of shape (several, fields), all under one name, together with those of earlier calls."""
    step.add(Piece(reporter, [name] * len(rows), rows, f"{prefix}/" if prefix else ""), reporter.probe.combine)
